# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in where vLLM is absent, or not the one that it knows: a stand-in package whose interface is another one."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The part of vLLM 0.32 that the plug-in uses. `changes` counts what registration did.
STAND_IN = {
    "model_executor/kernels/linear/__init__.py": """
from abc import ABC, abstractmethod
from dataclasses import dataclass
changes = 0
@dataclass
class MxFp4LinearLayerConfig:
    activation_quant_key: object = None
class MxFp4LinearKernel(ABC):
    @abstractmethod
    def apply_weights(self, layer, x, bias=None): ...
def register_linear_kernel(kernel, platform, kind="mp"):
    if kind != "mxfp4": raise ValueError(kind)
    global changes; changes += 1
def init_mxfp4_linear_kernel(activation_quant_key=None): ...
""",
    "model_executor/layers/quantization/__init__.py": """
def register_quantization_config(name):
    from vllm.model_executor.kernels import linear
    linear.changes += 1
    return lambda cls: cls
""",
    "model_executor/layers/quantization/utils/quant_utils.py": """
kMxfp4Dynamic = kMxfp4Static = object()
def GroupShape(*size): return size
def ScaleDesc(*scale): return scale
class QuantKey:
    def __init__(self, *key): ...
""",
    "model_executor/layers/quantization/compressed_tensors/compressed_tensors.py": "class CompressedTensorsConfig: ...",
    "model_executor/layers/quantization/compressed_tensors/transform/linear.py": """
class CompressedTensorsLinearTransformMethod: ...
def get_layer_partition_names(name, mapping): ...
def get_linear_transform_schemes(layer, name, config, mapping): ...
""",
    "model_executor/layers/vocab_parallel_embedding.py": "class ParallelLMHead: ...",
    "model_executor/parameter.py": """
class ChannelQuantScaleParameter: ...
class RowvLLMParameter: ...
""",
    "model_executor/layers/quantization/compressed_tensors/schemes.py": """
class CompressedTensorsScheme: ...
class CompressedTensorsW4A4Mxfp4(CompressedTensorsScheme): ...
""",
    "model_executor/layers/fused_moe/modular_kernel.py": """
class FusedMoEActivationFormat: ...
class TopKWeightAndReduce: ...
class ExpertTokensMetadata: ...
class FusedMoEExpertsModular: ...
""",
    "model_executor/layers/fused_moe/activation.py": """
import enum
class MoEActivation(enum.Enum):
    SILU, SWIGLUOAI = 1, 2
""",
    "model_executor/layers/fused_moe/oracle/mxfp4.py": """
import enum
class Mxfp4MoeBackend(enum.Enum):
    CPU, XPU = 1, 2
def backend_to_kernel_cls(backend): ...
def make_mxfp4_moe_kernel(*args): ...
""",
    "model_executor/layers/fused_moe/config.py": """
class FusedMoEConfig: ...
class FusedMoEQuantConfig: ...
def mxfp4_w4a16_moe_quant_config(*args): ...
""",
    "model_executor/layers/fused_moe/__init__.py": """
class FusedMoEMethodBase: ...
class RoutedExperts: ...
""",
    "model_executor/layers/fused_moe/topk_weight_and_reduce.py": "class TopKWeightAndReduceNoOP: ...",
    "model_executor/layers/linear.py": """
class LinearBase: ...
class UnquantizedLinearMethod: ...
""",
    "model_executor/layers/quantization/fp_quant.py": """
class FPQuantConfig: ...
class FPQuantLinearMethod: ...
""",
    "model_executor/layers/quantization/mxfp4.py": """
class GptOssMxfp4Config: ...
class GptOssMxfp4MoEMethod: ...
""",
    "model_executor/layers/quantization/quark/quark.py": "class QuarkConfig: ...",
    "model_executor/layers/quantization/quark/quark_moe.py": "class QuarkOCP_MX_MoEMethod: ...",
    "model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/"
    "compressed_tensors_moe_w4a4_mxfp4.py": "class CompressedTensorsW4A4Mxfp4MoEMethod: ...",
    "envs.py": "",
    "config/__init__.py": "def get_current_vllm_config_or_none(): return None",
    "model_executor/utils.py": "def replace_parameter(layer, name, tensor): ...",
    "platforms/__init__.py": """
import enum
class PlatformEnum(enum.Enum):
    CPU, XPU = 1, 2
class current_platform:
    supported_quantization = []
    is_cpu = staticmethod(lambda: True)
    is_xpu = staticmethod(lambda: False)
""",
}
LINEAR = "model_executor/kernels/linear/__init__.py"
REGISTER = """
from xpu_fp4.integrations.vllm import register
register(); register()
from vllm.model_executor.kernels import linear
print(getattr(linear, "changes", 0))
"""


def write_stand_in(folder: Path, old: str = "", new: str = "") -> Path:
    """The stand-in, with one piece of its text replaced."""
    assert not old or any(old in text for text in STAND_IN.values())
    for name, text in STAND_IN.items():
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace(old, new) if old else text)
    return folder


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    path_variable = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path_variable},
        capture_output=True,
        text=True,
        check=True,
    )


def test_importing_xpu_fp4_does_not_import_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise AssertionError('vllm was imported')")
    run("import xpu_fp4, xpu_fp4.cli, xpu_fp4.integrations, xpu_fp4.integrations.vllm", tmp_path)


def test_importing_xpu_fp4_imports_torch_alone(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import xpu_fp4
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names - {"torch"}
print(sorted(new), xpu_fp4.load_model.__name__, xpu_fp4.checkpoints.__name__, "safetensors" in sys.modules)
"""
    assert run(code, tmp_path).stdout == "['xpu_fp4'] load_model xpu_fp4.checkpoints True\n"


def test_vllm_finds_the_plugin() -> None:
    plugins = {entry.name: entry.value for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert plugins["xpu_fp4"] == "xpu_fp4.integrations.vllm:register"


def test_a_known_interface_is_registered_with_once(tmp_path: Path) -> None:
    result = run(REGISTER, write_stand_in(tmp_path))
    assert result.stdout == "6\n"  # two platforms and four configurations
    assert "xpu_fp4" not in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("class MxFp4LinearKernel", "class AnotherName", "cannot import name 'MxFp4LinearKernel'"),
        ("def register_quantization_config", "def another_name", "cannot import name 'register_quantization_config'"),
        ("def apply_weights", "def apply", "unknown abstract methods: apply"),
        ("key: object = None", "key: object = None; group_size: int = 32", "unknown fields: group_size"),
        ('kind != "mxfp4"', 'kind == "mxfp4"', "ValueError: mxfp4"),
    ],
)
def test_another_vllm_is_left_alone_and_told_why_once(tmp_path: Path, old: str, new: str, said: str) -> None:
    result = run(REGISTER, write_stand_in(tmp_path, old, new))
    assert result.stdout == "0\n"
    assert result.stderr.count("does not fit vLLM") == 1
    assert said in result.stderr
