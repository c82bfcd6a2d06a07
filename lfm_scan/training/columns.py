"""Which columns of a manifest label its images. Apart from what reads them, so that `--help` loads no Arrow."""

from __future__ import annotations

from dataclasses import dataclass

from lfm_scan.errors import ConfigError
from lfm_scan.options import flag_of


@dataclass(frozen=True, kw_only=True)
class LabelColumns:
    """Columns of a manifest, a Parquet file or a scan's results that label images; a source may lack any of them.

    Attributes:
        label_column: 0, false or real; 1, true, fake or generated. Without it, folders named 0_real and 1_fake tell.
        set_column: Name of the data set; metrics are given for each.
        class_column: What the image shows.
        pair_column: Images with the same value show the same content: they are augmented alike and never split.
    """

    label_column: str = "label"
    set_column: str = "set"
    class_column: str = "class"
    pair_column: str = "pair"

    def __post_init__(self) -> None:
        names = self.names
        for flag in ("label_column", "set_column", "class_column", "pair_column"):
            if not getattr(self, flag):
                raise ConfigError(f"{flag_of(flag)} names no column")
        if len(set(names)) != len(names):
            raise ConfigError(f"one column cannot be two of label, set, class and pair: {', '.join(names)}")

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Of the columns, in the order label, set, class, pair."""
        return self.label_column, self.set_column, self.class_column, self.pair_column
