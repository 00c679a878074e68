# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong in a checkpoint, or of another scheme, is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    INT8_ARGUMENTS,
    MXFP4_ARGUMENTS,
    Q0,
    QUARK_WEIGHT,
    auto_round_config,
    compressed_tensors,
    compressed_tensors_config,
    group,
    llama_json,
    packed_llama,
    quark,
    quark_config,
    refuse,
    split,
    tensors_of,
    write_checkpoint,
    write_index,
)
from safetensors.torch import save_file
from torch import Tensor

WRONG_TENSORS: dict[str, tuple[str, Tensor, str]] = {
    "dtype of codes": ("weight_packed", torch.zeros(64, 32), "dtype F32, expected U8"),
    "dtype of scales": ("weight_scale", torch.zeros(64, 2, dtype=torch.float16), "dtype F16, expected U8"),
    "rank": ("weight_packed", torch.zeros(64 * 32, dtype=torch.uint8), "shape [2048], expected [N, K/2]"),
    "K": ("weight_packed", torch.zeros(64, 24, dtype=torch.uint8), "shape [64, 24], so K is 48, expected a multiple of 32"),
    "scales transposed": ("weight_scale", torch.zeros(2, 64, dtype=torch.uint8), "shape [2, 64], expected [64, 2]"),
    "bias": ("bias", torch.zeros(63), "shape [63], expected [64]"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    kind, tensor, message = WRONG_TENSORS[case]
    folder = compressed_tensors(tmp_path, None, **{f"{Q0}.{kind}": tensor})
    refuse(folder, "model.safetensors", f"{Q0}.{kind}", message)


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    tensors = packed_llama("weight_packed", "weight_scale")
    del tensors[f"{Q0}.weight_scale"]
    refuse(write_checkpoint(tmp_path, tensors, llama_json(compressed_tensors_config())), "has no tensor", f"{Q0}.weight_scale")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    split(compressed_tensors(tmp_path), 2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:size])
        refuse(tmp_path, shard.name, "not a whole safetensors file")


def test_files_that_do_not_match_their_index_are_named(tmp_path: Path) -> None:
    weight_map = split(compressed_tensors(tmp_path), 2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    name = next(name for name, file in weight_map.items() if file == first)
    write_index(tmp_path, weight_map | {name: second})
    refuse(tmp_path, second, "has no tensor", name)
    write_index(tmp_path, weight_map | {name: "../elsewhere.safetensors"})
    refuse(tmp_path, "names the file '../elsewhere.safetensors'")
    write_index(tmp_path, ["not a map"])
    refuse(tmp_path, "has no weight_map")
    write_index(tmp_path, weight_map)
    (tmp_path / second).unlink()
    refuse(tmp_path, second, "does not exist")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refuse(tmp_path, "index.json is not readable JSON")


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    weight_map = split(compressed_tensors(tmp_path), 2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    name = next(name for name, file in weight_map.items() if file != second.name)
    save_file(
        {key: value for key, value in tensors_of(tmp_path).items() if weight_map[key] == second.name or key == name}, second
    )
    refuse(tmp_path, second.name, f"tensor {name} is also in")


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "config.json does not exist")
    (tmp_path / "config.json").write_text(json.dumps(llama_json(compressed_tensors_config())))
    refuse(tmp_path, "has no safetensors files")
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b.safetensors").touch()
    refuse(tmp_path, "has 2 safetensors files and neither")


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def test_an_unquantized_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, packed_llama("weight_packed", "weight_scale"), without_quantization(llama_json({})))
    refuse(tmp_path, "has no quantization_config: the model is not quantized")


def arguments(**changes: Any) -> dict[str, Any]:
    return compressed_tensors_config(config_groups={"g": group(weights=MXFP4_ARGUMENTS | changes)})


def int8_activations(**changes: Any) -> dict[str, Any]:
    return compressed_tensors_config(config_groups={"g": group(input_activations=INT8_ARGUMENTS | changes)})


def quark_scheme(**changes: Any) -> dict[str, Any]:
    return quark_config(global_quant_config={"weight": QUARK_WEIGHT | changes, "input_tensors": None})


UNKNOWN_SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "gptq"}, "quant_method 'gptq'"),
    "nvfp4": (compressed_tensors_config(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized', expected"),
    "no format": (compressed_tensors_config(format=None), "format None"),
    "int4": (arguments(type="int"), "weights is not MXFP4: type 'int', expected 'float'"),
    "group of 16": (arguments(group_size=16), "group_size 16, expected 32"),
    "fp8 scales": (arguments(scale_dtype="torch.float8_e4m3fn"), "scale_dtype 'torch.float8_e4m3fn', expected 'torch.uint8'"),
    "static activations": (
        compressed_tensors_config(config_groups={"g": group(input_activations=MXFP4_ARGUMENTS)}),
        "input_activations is not MXFP4: dynamic False, expected True",
    ),
    "fp8 activations": (
        compressed_tensors_config(
            config_groups={"g": group(input_activations={"num_bits": 8, "type": "float", "dynamic": True})}
        ),
        "num_bits 8, expected 4",
    ),
    "int8 in other groups": (int8_activations(group_size=64), "input_activations.group_size is 64, expected 32 or 128"),
    "int8 by token": (int8_activations(strategy="token", group_size=None), "group_size is None, expected 32 or 128"),
    "static int8": (int8_activations(dynamic=False), "input_activations is not MXINT8: dynamic False, expected True"),
    "int8 with zero points": (int8_activations(symmetric=False), "is not MXINT8: symmetric False, expected True"),
    "unknown hint": (compressed_tensors_config(xpu_fp4={"activations": "mxfp8"}), "'mxfp8', expected one of mxint8"),
    "hint of another group": (
        compressed_tensors_config(xpu_fp4={"activations": "mxint8", "group": 64}),
        "quantization_config.xpu_fp4.group is 64, expected 32 or 128",
    ),
    "unknown key of ours": (compressed_tensors_config(xpu_fp4={"offset": 1}), "xpu_fp4 has the keys offset, expected scale"),
    "key of ours without object": (compressed_tensors_config(xpu_fp4="mxint8"), "xpu_fp4 is 'mxint8', expected an object"),
    "quantized outputs": (
        compressed_tensors_config(config_groups={"g": group(output_activations=MXFP4_ARGUMENTS)}),
        "output_activations is set",
    ),
    "no groups": (compressed_tensors_config(config_groups={}), "has no config_groups"),
    "no target": (
        compressed_tensors_config(config_groups={"g": group(targets=["re:.*mlp"])}),
        "no target in quantization_config matches model.layers.0.self_attn",
    ),
    "packed and ignored": (compressed_tensors_config(ignore=[r"re:.*q_proj$"]), "quantization_config.ignore lists"),
    "unknown scale mode": (compressed_tensors_config(xpu_fp4={"scale_mode": "odd"}), "scale mode 'odd', expected one of floor"),
    "legacy mx": (quark_scheme(dtype="mx", mx_element_dtype="fp4"), 'weight has the legacy dtype "mx" (17-byte blocks'),
    "quark fp8": (quark_scheme(dtype="fp8_e4m3", qscheme="per_tensor"), "dtype 'fp8_e4m3', expected 'fp4'"),
    "quark scale format": (quark_scheme(scale_format="float32"), "scale_format 'float32', expected 'e8m0'"),
    "quark excluded": (quark_config(exclude=["*q_proj"]), "quantization_config.exclude lists"),
    "quark without weights": (
        quark_config(layer_quant_config={"*q_proj": {"weight": None, "input_tensors": None}}),
        "has no weight scheme for",
    ),
    "transform of a kind that nobody knows": (
        compressed_tensors_config(transform_config={"config_groups": {"R9": {"type": "hadamard", "apply": [{}]}}}),
        "config.json: quantization_config.transform_config.config_groups.R9 applies a hadamard transform",
    ),
    "transform of another type": (
        compressed_tensors_config(transform_config={"config_groups": ["R9"]}),
        "quantization_config.transform_config.config_groups is ['R9'], expected an object",
    ),
    "sparse": (compressed_tensors_config(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config stores sparse"),
    "pruned experts": (
        compressed_tensors_config(moe_sparsity_config={"method": "novice", "num_experts": [2]}),
        "quantization_config.moe_sparsity_config gives layers different numbers or kinds of experts",
    ),
    "reordered columns": (arguments(actorder="group"), "config_groups.g.weights.actorder reorders the columns"),
    "quark online rotation": (
        quark_config(algo_config=[{"name": "awq"}, {"name": "rotation", "r1": True, "r4": True}]),
        "config.json: quantization_config.algo_config.r4 rotates the inputs of layers",
    ),
    "quark online R1": (
        quark_config(algo_config={"name": "rotation", "online_r1_rotation": True}),
        "config.json: quantization_config.algo_config.online_r1_rotation rotates the inputs of layers",
    ),
    "quark softmax": (quark_config(softmax_quant_spec=QUARK_WEIGHT), "quantization_config.softmax_quant_spec quantizes"),
    "auto-round in integers": (auto_round_config(data_type="int"), "is not MXFP4: data_type 'int', expected 'mx_fp'"),
    "auto-round static": (auto_round_config(act_dynamic=False), "is not MXFP4: act_dynamic False, expected True"),
    "auto-round activations": (
        auto_round_config(act_data_type="fp8"),
        "act_data_type is 'fp8', expected one of mx_fp, mx_fp_rceil",
    ),
    "auto-round rotation": (
        auto_round_config(rotation_config={"hadamard_type": "hadamard"}),
        "config.json: quantization_config.rotation_config rotates the inputs of layers",
    ),
    "auto-round spinquant": (auto_round_config(spinquant_config={"r4": True}), "quantization_config.spinquant_config rotates"),
    "auto-round attention": (auto_round_config(static_attention_dtype="fp8"), "static_attention_dtype quantizes attention"),
    "quark biases": (
        quark_config(global_quant_config={"weight": QUARK_WEIGHT, "bias": QUARK_WEIGHT}),
        "quantization_config.global_quant_config.bias quantizes biases",
    ),
    "quark rounding": (
        quark_config(
            global_quant_config={
                "weight": QUARK_WEIGHT,
                "input_tensors": QUARK_WEIGHT | {"is_dynamic": True, "round_method": "floor"},
            }
        ),
        "global_quant_config.input_tensors.round_method rounds inputs by 'floor'",
    ),
    "quark outputs": (
        quark_config(layer_quant_config={"*q_proj": {"weight": QUARK_WEIGHT, "output_tensors": QUARK_WEIGHT}}),
        "layer_quant_config.*q_proj.output_tensors is set, expected null",
    ),
    "quark of two steps": (
        quark_config(global_quant_config={"weight": [QUARK_WEIGHT, QUARK_WEIGHT], "input_tensors": None}),
        "global_quant_config.weight is [",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN_SCHEMES)
def test_another_scheme_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, message = UNKNOWN_SCHEMES[case]
    make: Callable[[Path, dict[str, Any]], Path] = quark if config["quant_method"] == "quark" else compressed_tensors
    refuse(make(tmp_path, config), str(tmp_path), message)


def test_a_config_without_its_tensors_is_refused(tmp_path: Path) -> None:
    folder = quark(tmp_path, compressed_tensors_config())
    refuse(folder, "has no MXFP4 weights, but config.json says that it is quantized by compressed-tensors")
