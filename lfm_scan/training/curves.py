"""A picture of a training: loss, learning rate, and AUC and ACC of each set, by epoch. Needs matplotlib."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_SETS: Final = 14
"""Sets with a colour and a name of their own; more would not be told apart."""
_MAX_NAME: Final = 32

_logger: Final = logging.getLogger(__name__)


def draw_curves(history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Return a PNG, or None, with a note in the log, where matplotlib is not installed.

    Args:
        history: For each epoch its "epoch", "loss" and "learning_rate", and in "by_set" the figures of each set by name
            (see `evaluation.metrics.Metrics`), with their means in "mean_auc" and "mean_acc"; a figure may be None.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - it is an extra, and slow to load
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        _logger.warning("no picture of the training curves: matplotlib is missing (pip install 'lfm-scan[train]')")
        return None
    # Names of sets come from folders: they are no formulas, and may be in any script.
    with mpl.rc_context({"text.parse_math": False, "font.size": 9}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
        (loss, auc), (rate, acc) = figure.subplots(2, 2, sharex=True, width_ratios=(2, 3))
        epochs = [entry["epoch"] for entry in history]
        marker = "o" if len(epochs) < 20 else ""
        for axes, key, title in ((loss, "loss", "Training loss"), (rate, "learning_rate", "Learning rate")):
            axes.plot(epochs, [entry[key] for entry in history], marker=marker, markersize=3, color="black")
            axes.set_title(title, loc="left")
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        _draw_sets(auc, history, "auc", "AUC of each validation set")
        _draw_sets(acc, history, "acc", "ACC of each validation set")
        for axes in (rate, acc):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in (loss, auc, rate, acc):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _draw_sets(axes: Axes, history: Sequence[Mapping[str, Any]], key: Literal["auc", "acc"], title: str) -> None:
    """Draw a line for each set, and their mean, in the order of the last values, which the legend gives."""
    from matplotlib import colormaps  # noqa: PLC0415

    epochs = [entry["epoch"] for entry in history]
    names = sorted({name for entry in history for name in entry.get("by_set", {})})
    lines = {name: [_number(entry.get("by_set", {}).get(name, {}).get(key)) for entry in history] for name in names}
    colors = colormaps["tab10" if len(names) <= 10 else "tab20"]
    marker = "o" if len(epochs) < 20 else ""
    for index, name in enumerate(names):  # a set has the same colour whatever the figure, so count all of them
        if not any(map(math.isfinite, lines[name])):
            continue
        is_named = index < _MAX_SETS
        axes.plot(
            epochs,
            lines[name],
            color=colors(index) if is_named else "lightgrey",
            label=f"{lines[name][-1]:.3f}  {_printable(name)}" if is_named else None,
            marker=marker,
            markersize=3,
            linewidth=1.2,
            zorder=2 if is_named else 1,
        )
    if len(names) > _MAX_SETS:
        axes.plot([], [], color="lightgrey", label=f"{len(names) - _MAX_SETS} more sets")
    mean = [_number(entry.get(f"mean_{key}")) for entry in history]
    if any(map(math.isfinite, mean)):
        label = f"{mean[-1]:.3f}  mean of sets with both classes"
        axes.plot(epochs, mean, color="black", linewidth=2.2, label=label, zorder=3)
    axes.set_title(title, loc="left")
    axes.set_ylim(-0.02, 1.02)
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, title="last epoch")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _printable(name: str) -> str:
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 1] + "…"
