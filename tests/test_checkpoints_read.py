# SPDX-License-Identifier: Apache-2.0
"""Every format's files become one description with the right bits, and whatever is wrong is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from checkpoint_files import (
    EXPERTS,
    HIDDEN,
    INT8_ARGUMENTS,
    INTERMEDIATE,
    LINEARS,
    MXFP4_ARGUMENTS,
    QUARK_WEIGHT,
    auto_round_config,
    compressed_tensors_config,
    llama,
    llama_json,
    packed_llama,
    quark_config,
    save_gpt_oss,
    tensors_of,
    write_checkpoint,
)
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from helpers import assert_same_bits
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from xpu_fp4 import Mode, dequantize, load_model, reference
from xpu_fp4.checkpoints import Checkpoint, CheckpointError, Scheme, open_checkpoint

Q0 = "model.layers.0.self_attn.q_proj"


def compressed_tensors(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    content = packed_llama("weight_packed", "weight_scale") | tensors
    return write_checkpoint(folder, content, llama_json(config or compressed_tensors_config()))


def quark(folder: Path, config: dict[str, Any] | None = None) -> Path:
    return write_checkpoint(folder, packed_llama("weight", "weight_scale"), llama_json(config or quark_config()))


def group(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = compressed_tensors_config()["config_groups"]["group_0"]
    return found | changes


def assert_reads_the_reference_values(checkpoint: Checkpoint, packed_name: str) -> None:
    stored = tensors_of(checkpoint.folder)
    assert {name: layer.shape for name, layer in checkpoint.layers.items()} == LINEARS
    for name in LINEARS:
        codes, scale = stored[f"{name}.{packed_name}"], stored[f"{name}.weight_scale"]
        assert_same_bits(dequantize(*checkpoint.weight(name)), reference.values(codes, scale).float())


@pytest.mark.parametrize("mode", get_args(Mode))
def test_compressed_tensors_has_the_reference_values(tmp_path: Path, mode: Mode) -> None:
    checkpoint = open_checkpoint(compressed_tensors(tmp_path, compressed_tensors_config(mode=mode)))
    assert checkpoint.format == "compressed-tensors"
    assert {layer.scheme for layer in checkpoint.layers.values()} == {Scheme(mode)}
    assert_reads_the_reference_values(checkpoint, "weight_packed")


@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_auto_round_has_the_reference_values(tmp_path: Path, mode: Mode) -> None:
    checkpoint = open_checkpoint(compressed_tensors(tmp_path, auto_round_config(mode=mode)))
    assert {layer.scheme for layer in checkpoint.layers.values()} == {Scheme(mode, "floor" if mode == "w4a4" else "even")}
    assert checkpoint.left_aside == ()
    assert_reads_the_reference_values(checkpoint, "weight_packed")


def test_auto_round_has_schemes_by_name_and_by_regex(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    extra: dict[str, dict[str, Any]] = {"lm_head": {"bits": 16}, name: {"act_bits": 16}, ".*q_proj.*": {"bits": 8}}
    extra[r".*mlp\.up_proj.*"] = {"act_data_type": "mx_fp_rceil"}
    folder = compressed_tensors(tmp_path, auto_round_config(extra_config=extra))
    refuse(folder, "extra_config..*q_proj.* is not MXFP4: bits 8, expected 4")
    extra[".*q_proj.*"] = {"act_bits": 4}
    layers = open_checkpoint(compressed_tensors(tmp_path, auto_round_config(extra_config=extra))).layers
    assert layers[name].scheme == Scheme("w4a16")
    assert layers["model.layers.1.mlp.up_proj"].scheme == Scheme("w4a4", "rceil")
    assert layers["model.layers.1.self_attn.q_proj"].scheme == Scheme("w4a4", "floor")
    extra[".*proj"] = {"act_bits": 16}
    refuse(
        compressed_tensors(tmp_path, auto_round_config(extra_config=extra)),
        "extra_config has several schemes for model.layers.",
    )


@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_quark_has_the_reference_values(tmp_path: Path, mode: str) -> None:
    checkpoint = open_checkpoint(quark(tmp_path, quark_config(mode=mode)))
    assert {layer.scheme for layer in checkpoint.layers.values()} == {Scheme("w4a4" if mode == "w4a4" else "w4a16")}
    assert_reads_the_reference_values(checkpoint, "weight")


def test_gpt_oss_has_the_values_of_transformers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_gpt_oss(tmp_path))
    stored = tensors_of(tmp_path)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        assert checkpoint.layers[f"{experts}.gate_up_proj"].shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        assert checkpoint.layers[f"{experts}.down_proj"].shape == (EXPERTS, HIDDEN, INTERMEDIATE)
        for name in (f"{experts}.gate_up_proj", f"{experts}.down_proj"):
            expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"]).transpose(1, 2)
            packed, scale = checkpoint.weight(name)
            assert_same_bits(dequantize(packed, scale, torch.bfloat16), expected.contiguous())
            assert_same_bits(dequantize(packed, scale), reference.values(packed, scale).float())
            assert checkpoint.layers[name].scheme == Scheme("w4a16")


def test_other_tensors_are_those_of_no_layer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(compressed_tensors(tmp_path))
    names = set(checkpoint.other_tensors())
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= names
    assert not any("_proj" in name for name in names)


def test_format_may_stand_in_the_group(tmp_path: Path) -> None:
    config = compressed_tensors_config(config_groups={"group_0": group(format="mxfp4-pack-quantized")})
    for outer in ({}, {"format": "mixed-precision"}):
        config = {key: value for key, value in config.items() if key != "format"} | outer
        assert open_checkpoint(compressed_tensors(tmp_path, config)).layers.keys() == LINEARS.keys()


def test_scale_dtype_may_be_there(tmp_path: Path) -> None:
    config = compressed_tensors_config(config_groups={"g": group(weights=MXFP4_ARGUMENTS | {"scale_dtype": "torch.uint8"})})
    assert open_checkpoint(compressed_tensors(tmp_path, config)).layers.keys() == LINEARS.keys()


def test_names_go_before_regexes_and_regexes_before_the_class(tmp_path: Path) -> None:
    down = "model.layers.1.mlp.down_proj"
    groups = {
        "a": group(targets=["Linear"]),
        "b": group(targets=[r"re:.*\.down_proj$"], input_activations=None),
        "c": group(targets=[down]),
    }
    checkpoint = open_checkpoint(compressed_tensors(tmp_path, compressed_tensors_config(config_groups=groups)))
    a16 = {name for name, layer in checkpoint.layers.items() if layer.scheme.mode == "w4a16"}
    assert a16 == {"model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_of_several_groups_a_layer_takes_the_one_that_compressed_tensors_gives_it(tmp_path: Path, order: Any) -> None:
    targets = (["re:.*self_attn.*"], ["re:.*o_proj", "re:.*mlp.down.*"], ["re:.*mlp.*", "Linear"])
    inputs = (MXFP4_ARGUMENTS | {"dynamic": True}, None, MXFP4_ARGUMENTS | {"dynamic": True})
    groups = {str(i): group(targets=targets[i], input_activations=inputs[i]) for i in order}
    config = compressed_tensors_config(config_groups=groups)
    peer = llama()
    apply_quantization_config(peer, QuantizationConfig(**config))
    expected = {
        name: "w4a16" if module.quantization_scheme.input_activations is None else "w4a4"
        for name, module in peer.named_modules()
        if getattr(module, "quantization_scheme", None)
    }
    checkpoint = open_checkpoint(compressed_tensors(tmp_path, config))
    assert {name: layer.scheme.mode for name, layer in checkpoint.layers.items()} == expected
    assert set(expected.values()) == {"w4a4", "w4a16"}


@pytest.mark.parametrize("group_size", [32, 128])
def test_int8_activations_of_another_tool_are_w4a8(tmp_path: Path, group_size: int) -> None:
    for more in ({}, {"scale_dtype": "torch.uint8"}):
        activations = INT8_ARGUMENTS | {"group_size": group_size} | more
        config = compressed_tensors_config(config_groups={"g": group(input_activations=activations)})
        schemes = {layer.scheme for layer in open_checkpoint(compressed_tensors(tmp_path, config)).layers.values()}
        assert schemes == {Scheme("w4a8", group=group_size)}  # type: ignore[arg-type]


def test_our_hint_is_for_groups_without_activations(tmp_path: Path) -> None:
    groups = {
        "a": group(targets=["Linear"], input_activations=None),
        "b": group(targets=["re:.*up_proj$"]),
        "c": group(targets=["re:.*down_proj$"], input_activations=INT8_ARGUMENTS),
    }
    for hint, rest in (
        ({"activations": "mxint8", "group": 32, "scale_mode": "ceil"}, Scheme("w4a8", "ceil", 32)),
        ({"activations": "mxint8"}, Scheme("w4a8")),
        ({"activations": None}, Scheme("w4a16")),
    ):
        config = compressed_tensors_config(config_groups=groups, xpu_fp4=hint)
        schemes = {name: layer.scheme for name, layer in open_checkpoint(compressed_tensors(tmp_path, config)).layers.items()}
        named = {"up_proj": Scheme("w4a4", rest.scale_mode), "down_proj": Scheme("w4a8", rest.scale_mode)}
        assert schemes == {name: named.get(name.rpartition(".")[2], rest) for name in LINEARS}


def test_quark_patterns_go_before_the_class_and_the_rest(tmp_path: Path) -> None:
    a16 = {"weight": QUARK_WEIGHT, "input_tensors": None}
    a4 = {"weight": QUARK_WEIGHT, "input_tensors": QUARK_WEIGHT | {"is_dynamic": True, "scale_calculation_mode": "floor"}}
    config = quark_config(layer_quant_config={"*.mlp.*": a16}, layer_type_quant_config={"Linear": a4})
    schemes = {name: layer.scheme for name, layer in open_checkpoint(quark(tmp_path, config)).layers.items()}
    assert schemes == {name: Scheme("w4a16") if ".mlp." in name else Scheme("w4a4", "floor") for name in LINEARS}


def split(folder: Path, parts: int) -> dict[str, str]:
    """Turns a directory of one file into one of shards; returns its index's map."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = names[part::parts]
        save_file({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_codes_and_scales_may_be_in_different_shards(tmp_path: Path) -> None:
    split(compressed_tensors(tmp_path), 3)
    checkpoint = open_checkpoint(tmp_path)
    layer = checkpoint.layers[Q0]
    assert len({info.file for info in checkpoint.files.values()}) == 3
    assert checkpoint.files[layer.packed].file != checkpoint.files[layer.scale].file
    assert_reads_the_reference_values(checkpoint, "weight_packed")


# ---- what is wrong is named ----


def refuse(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, parts))):
        open_checkpoint(folder)


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


# ---- keys that change nothing for us ----

FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
ROTATED_OFFLINE = {"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False, "online_r1_rotation": False}

SILENT: dict[str, dict[str, Any]] = {
    "as compressed-tensors writes it": compressed_tensors_config(
        version="0.20.1",
        quantization_status="compressed",
        global_compression_ratio=None,
        kv_cache_scheme=None,
        sparsity_config={},
        transform_config={},
        moe_sparsity_config=None,
        config_groups={"g": group(output_activations=None, weights=MXFP4_ARGUMENTS | {"actorder": None, "observer": "mse"})},
    ),
    "null": compressed_tensors_config(transform_config=None, sparsity_config=None, future=None),
    "no transforms, dense": compressed_tensors_config(
        transform_config={"config_groups": {}}, sparsity_config={"format": "dense"}
    ),
    "as quark writes it": quark_config(
        algo_config=[{"name": "awq"}, ROTATED_OFFLINE],
        softmax_quant_spec=None,
        kv_cache_quant_config={},
        kv_cache_post_rope=False,
        quant_mode="eager_mode",
        version="0.10",
        export={"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized"},
    ),
    "quark null": quark_config(algo_config=None, layer_quant_config=None, layer_type_quant_config=None),
}


@pytest.mark.parametrize("case", SILENT)
def test_known_and_empty_keys_are_no_matter(tmp_path: Path, case: str, recwarn: pytest.WarningsRecorder) -> None:
    config = SILENT[case]
    folder = (quark if config["quant_method"] == "quark" else compressed_tensors)(tmp_path, config)
    assert open_checkpoint(folder).layers.keys() == LINEARS.keys()
    assert not recwarn.list


KV_CACHE = {"weight": QUARK_WEIGHT, "input_tensors": None, "output_tensors": FP8}
LEFT_ASIDE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        compressed_tensors_config(
            future=1, config_groups={"g": group(more=[1], weights=MXFP4_ARGUMENTS | {"most": "x"}), "h": group(targets=["X"])}
        ),
        "future (unknown), config_groups.g.more (unknown), config_groups.g.weights.most (unknown)",
    ),
    "kv cache": (compressed_tensors_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme (the KV cache is not quantized)"),
    "quark unknown": (
        quark_config(future=1, layer_quant_config={"*q_proj": {"weight": QUARK_WEIGHT | {"more": 1}}}),
        "future (unknown), layer_quant_config.*q_proj.weight.more (unknown)",
    ),
    "quark kv cache": (
        quark_config(
            layer_quant_config={"*k_proj": KV_CACHE, "*v_proj": KV_CACHE},
            kv_cache_quant_config={"*k_proj": KV_CACHE},
            export={"kv_cache_group": ["*v_proj"]},
        ),
        "kv_cache_quant_config (the KV cache is not quantized)",
    ),
}


@pytest.mark.parametrize("case", LEFT_ASIDE)
def test_what_is_left_aside_is_named_once(tmp_path: Path, case: str, recwarn: pytest.WarningsRecorder) -> None:
    config, notes = LEFT_ASIDE[case]
    folder = (quark if config["quant_method"] == "quark" else compressed_tensors)(tmp_path, config)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layers.keys() == LINEARS.keys()
    said = f"{tmp_path}/config.json: left aside in quantization_config: {notes}"
    assert [str(warning.message) for warning in recwarn.list] == [said]
    recwarn.clear()
    load_model(folder)
    assert [str(w.message) for w in recwarn.list if "left aside" in str(w.message)] == [said], "once, by load_model too"
