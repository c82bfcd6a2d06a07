from __future__ import annotations

import json
from typing import Any

import pytest

from lfm_scan.errors import ConfigError
from lfm_scan.options import InputConfig
from lfm_scan.synth.config import SynthConfig
from lfm_scan.synth.kinds import KINDS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "no photographs"),
        ({"output": ""}, "--output"),
        ({"networks": ("nearest",)}, "'nearest' is not known"),
        ({"networks": ("nearest-f2", "nearest-f2")}, "twice"),
        ({"networks": ("nearest-f2",), "networks_per_crop": 2}, "--networks-per-crop must be 1 to 1"),
        ({"crop_px": 100}, "multiple of 8"),
        ({"crop_px": 56}, "64 to 512"),
        ({"min_shrink": 3.0, "max_shrink": 2.0}, "--min-shrink"),
        ({"min_shrink": 0.5}, "--min-shrink"),
        ({"rescale_share": 1.5}, "--rescale-share must be 0 to 1, got 1.5"),
        ({"vary_share": -0.1}, "--vary-share"),
        ({"crops": 0}, "--crops"),
        ({"steps": 0}, "--steps"),
        ({"validation_share": 1.0}, "--validation-share"),
        ({"seed": -1}, "--seed"),
        ({"min_psnr": float("nan")}, "--min-psnr"),
        ({"inputs": InputConfig(since="runs/1")}, "--since"),
        ({"inputs": InputConfig(carry=("label",))}, "--carry"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SynthConfig(**{"sources": ("photographs",), "output": "out", **changes})


def test_all_kinds_of_network_are_trained_unless_some_are_named() -> None:
    assert SynthConfig(("photographs",), output="out").kinds == tuple(KINDS)
    assert SynthConfig(("photographs",), output="out", networks=("vae-f8",)).kinds == ("vae-f8",)


def test_settings_as_json_do_not_say_where_the_pairs_go() -> None:
    settings = SynthConfig(("photographs",), output="out").to_json()

    assert json.loads(json.dumps(settings))["crop_px"] == 256
    assert not {"output", "storage"} & set(settings)
