"""The kernels compile for GPUs that are not here, within their registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.scoring.cuda.networks import needs_triton

pytestmark = needs_triton

# In a process of its own: this one may have imported the kernels for Triton's interpreter.
_PROGRAM = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lfm_scan.scoring.cuda import kernels
from lfm_scan.scoring.cuda.fused import Launches

launches, target = Launches(), GPUTarget("cuda", int(sys.argv[1]), 32)
maps = {"x_ptr": "*fp16", "weight_ptr": "*fp16", "bias_ptr": "*fp32", "out_ptr": "*fp16", "num_rows": "i32"}
pooled = lambda side, before, after, launch: dict(
    HEIGHT=side, WIDTH=side, IN_CHANNELS=before, OUT_CHANNELS=after, LIMIT=65504.0, QUAD=launch.quad,
    BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k)
jobs = [
    (kernels.npr_conv_pool, {**maps, "pixels_ptr": "*u8"}, launches.layer1,
     dict(HEIGHT=256, WIDTH=256, CHANNELS=64, LIMIT=65504.0, BLOCK_M=launches.layer1.block_m)),
    (kernels.conv_pool, maps, launches.layer2, pooled(127, 64, 128, launches.layer2)),
    (kernels.conv_pool, maps, launches.layer3, pooled(63, 128, 256, launches.layer3)),
    (kernels.conv_project, {**maps, "projection_ptr": "*fp16", "out_ptr": "*fp32"}, launches.layer4,
     dict(HEIGHT=31, WIDTH=31, IN_CHANNELS=256, MID_CHANNELS=512, OUT_CHANNELS=64, LIMIT=65504.0,
          BLOCK_M=launches.layer4.block_m, BLOCK_N=launches.layer4.block_n, BLOCK_K=launches.layer4.block_k)),
]
found = []
for kernel, types, launch, constants in jobs:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = compile(ASTSource(kernel, signature, constants, aligned), target, options)
    found.append({"kernel": kernel.__name__, "shared": built.metadata.shared, "wgmma": "wgmma" in built.asm["ptx"],
                  "mma": "mma.sync" in built.asm["ptx"], "async": "cp.async" in built.asm["ptx"]})
print(json.dumps(found))
"""


@pytest.mark.parametrize(("capability", "shared_bytes"), [(90, 232_448), (89, 101_376), (80, 166_912)])
def test_the_default_launches_use_tensor_cores_and_fit(capability: int, shared_bytes: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4
    for kernel in found:
        assert kernel["wgmma"] == (capability == 90), kernel
        assert kernel["mma"] == (capability != 90), kernel
        assert kernel["async"] == (kernel["kernel"] != "npr_conv_pool"), kernel
        assert kernel["shared"] <= shared_bytes, kernel
