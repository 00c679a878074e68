# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding by Transformers, activations rounded before every MXFP4 weight: nothing of xpu_fp4 or vLLM takes part."""

from pathlib import Path
from typing import Any

import fp_quant_of_others
import torch
from compressed_tensors.quantization import fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .checkpoints import HADAMARD, Groups, linears_of, quantize, rotate

# Far above float32's rounding errors in these models.
NOISE = 1e-6
NOISY_RUNS = 4

# Their lengths differ, and none is a multiple of another's.
PROMPTS = [[1, *range(10 + i, 10 + i + length)] for i, length in enumerate([3, 40, 7, 4, 11, 90])]
NEW_TOKENS = 8


def decode(model: nn.Module, prompt: list[int]) -> list[int]:
    tokens, ids, cache = [], torch.tensor([prompt]), None
    for _ in range(NEW_TOKENS):
        output = model(ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        tokens.append(int(ids))
    return tokens


def _round_weight(linear: Any) -> None:
    """Rounds the weight now, once, instead of in every forward."""
    scheme = linear.quantization_scheme
    linear.weight.data = fake_quantize(linear.weight.data, linear.weight_scale, None, scheme.weights)
    linear.quantization_scheme = scheme.model_copy(update={"weights": None})


def _add_noise(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = args
    return (x + NOISE * x.square().mean().sqrt() * torch.randn_like(x),)


def _round_to_mxint8(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """x rounded to 8-bit integers under a power of two for each 128 of them, the last ones of a row being fewer."""
    (x,) = args
    groups = nn.functional.pad(x.double(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    fraction, exponent = groups.abs().amax(-1, keepdim=True).frexp()  # fraction in [0.5, 1)
    unit = torch.exp2((exponent - 1 + (fraction >= 255 / 256).int() - 6).double())
    codes = (groups / unit).round().clamp(-127, 127)
    return ((codes * unit).flatten(-2)[..., : x.shape[-1]].to(x.dtype),)


def _round_as_vllm_xpu_kernels(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """x rounded to MXFP4 with vllm-xpu-kernels' numbers: scale 2^ceil(log2(amax / 6)), ties toward zero."""
    blocks = args[0].double().unflatten(-1, (-1, 32))
    scale = torch.exp2((blocks.abs().amax(-1, keepdim=True) / 6).clamp(min=1e-10).log2().ceil())
    thresholds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    code = torch.bucketize((blocks / scale).abs(), thresholds)  # how many thresholds lie below
    return ((values[code] * blocks.sign() * scale).flatten(-2).to(args[0].dtype),)


def _round_to_mxfp4(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """x rounded to MXFP4 by compressed-tensors, which has one rule for scales."""
    blocks = args[0].unflatten(-1, (-1, 32))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), _MXFP4)
    return (fake_quantize(args[0], scale, None, _MXFP4),)


_MXFP4 = PRESET_SCHEMES["MXFP4"]["weights"]

ROUNDINGS = {
    "mxfp4": _round_to_mxfp4,
    "mxint8": _round_to_mxint8,
    "vllm-xpu-kernels": _round_as_vllm_xpu_kernels,
}


@torch.no_grad()
def certain_tokens(
    source: Path, groups: Groups, *, activations: str | None = None, rotated: bool = False, fp_quant: str | None = None
) -> list[list[int]]:
    """The tokens that follow each of PROMPTS, as far as they are certain.

    A rounding error may turn the code of an activation, and so a token and all after it. Tokens count as certain as far as
    float64, float32, and float32 with noise in the input of every linear give the same. activations, one of ROUNDINGS, is how
    the inputs of linears are rounded, where groups leave them alone; rotated: whether they are transformed before that;
    fp_quant: FP-Quant's method, which does all of it in its own way.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the layers are tiny: handing them out costs more
    runs = []
    for dtype in (torch.float64, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
        if rotated:
            rotate(model)  # in the dtype of the checkpoint, so that weights are rounded alike
        model.to(dtype)
        if fp_quant is not None:
            # Inputs not with its matrix in bfloat16, by whose rounding, 1 in 10,000, tokens would be uncertain.
            stored = fp_quant_of_others.matrix(HADAMARD)
            exact = stored.double().sign() * HADAMARD**-0.5
            fp_quant_of_others.emulate(model, linears_of(model), stored, exact, fp_quant)
            linears = [model.get_submodule(name) for name in linears_of(model)]
        else:
            quantize(model, groups)
            linears = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
            for linear in linears:
                _round_weight(linear)
        if activations is not None:
            for linear in linears:
                linear.register_forward_pre_hook(ROUNDINGS[activations])
        runs.append([decode(model, prompt) for prompt in PROMPTS])
    for linear in linears:
        linear.register_forward_pre_hook(_add_noise, prepend=True)
    runs += [[decode(model, prompt) for prompt in PROMPTS] for _ in range(NOISY_RUNS)]
    return [_common_prefix(list(tokens)) for tokens in zip(*runs, strict=True)]


@torch.no_grad()
def certain_tokens_of_experts(source: Path, *, activations: str | None = None) -> list[list[int]]:
    """The same of a model whose experts alone are MXFP4: a bf16 checkpoint, the weights of its experts what MXFP4 has.

    activations: how the input of an expert's two products is rounded, one of ROUNDINGS, or not.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before = [] if activations is None else [ROUNDINGS[activations]]
    runs = []
    for dtype in (torch.float64, torch.float32):
        runs.append(_decode_with_experts(source, dtype, before))
    runs += [_decode_with_experts(source, torch.float32, [_add_noise, *before]) for _ in range(NOISY_RUNS)]
    return [_common_prefix(list(tokens)) for tokens in zip(*runs, strict=True)]


def _decode_with_experts(source: Path, dtype: torch.dtype, before: list[Any]) -> list[list[int]]:
    """before: hooks before each of the experts' products."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="batched_mm").eval()
    for experts in (module for name, module in model.named_modules() if name.endswith(".experts")):
        for hook in before:
            experts.register_forward_pre_hook(lambda module, args, hook=hook: (*hook(module, args[:1]), *args[1:]))
        # Between the products: both of Transformers' ways through batched_mm call it.
        experts._apply_gate = _with_hooks(experts, experts._apply_gate, before)
    return [decode(model, prompt) for prompt in PROMPTS]


def _with_hooks(module: nn.Module, function: Any, hooks: list[Any]) -> Any:
    def call(x: Tensor) -> Tensor:
        result = (function(x),)
        for hook in hooks:
            result = hook(module, result)
        return result[0]

    return call


def _common_prefix(runs: list[list[int]]) -> list[int]:
    length = next((i for i, tokens in enumerate(zip(*runs, strict=True)) if len(set(tokens)) > 1), NEW_TOKENS)
    return runs[0][:length]
