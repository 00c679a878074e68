# SPDX-License-Identifier: Apache-2.0
"""intel-extension-for-pytorch 2.8 beside us: the same bits, whichever is imported first, and through ipex.optimize.

`make test-ipex` runs this, in an environment with torch 2.8; others collect nothing.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

FIRST = {
    "ipex": "import intel_extension_for_pytorch as ipex, xpu_fp4",
    "us": "import xpu_fp4, intel_extension_for_pytorch as ipex",
}
BITS = """
import copy, hashlib, torch
{imports}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 256)).bfloat16().eval()
x = torch.randn(7, 256, dtype=torch.bfloat16)
results = []
for mode in ("w4a4", "w4a8", "w4a16"):
    packed = xpu_fp4.quantize_(copy.deepcopy(model), mode=mode)
    packed = {optimize}
    with torch.inference_mode():
        results.append(packed(x))
print(xpu_fp4.linear(torch.randn(3, 64), *xpu_fp4.quantize(torch.randn(32, 64))).sum().isfinite().item())
print(hashlib.sha256(torch.cat(results).view(torch.uint8).numpy().tobytes()).hexdigest())
"""

if importlib.util.find_spec("intel_extension_for_pytorch") is None:
    pytest.skip("intel-extension-for-pytorch is not installed: make test-ipex", allow_module_level=True)


def bits(imports: str, optimize: str = "packed") -> str:
    result = subprocess.run(
        [sys.executable, "-c", BITS.format(imports=imports, optimize=optimize)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert result.returncode == 0, result.stderr
    finite, digest = result.stdout.splitlines()[-2:]
    assert finite == "True"
    return digest


def test_whichever_is_imported_first() -> None:
    alone = bits("import xpu_fp4")
    assert {bits(imports) for imports in FIRST.values()} == {alone}


@pytest.mark.parametrize("first", FIRST)
def test_optimize_leaves_the_bits(first: str) -> None:
    assert bits(FIRST[first], "ipex.optimize(packed)") == bits("import xpu_fp4")
