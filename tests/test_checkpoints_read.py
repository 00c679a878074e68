# SPDX-License-Identifier: Apache-2.0
"""Every format's files become one description with the right bits."""

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
    Q0,
    QUARK_WEIGHT,
    auto_round_config,
    compressed_tensors,
    compressed_tensors_config,
    group,
    llama,
    quark,
    quark_config,
    refuse,
    save_gpt_oss,
    split,
    tensors_of,
)
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from helpers import assert_same_bits
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from xpu_fp4 import Mode, dequantize, reference
from xpu_fp4.checkpoints import Checkpoint, Scheme, open_checkpoint


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


def test_codes_and_scales_may_be_in_different_shards(tmp_path: Path) -> None:
    split(compressed_tensors(tmp_path), 3)
    checkpoint = open_checkpoint(tmp_path)
    layer = checkpoint.layers[Q0]
    assert len({info.file for info in checkpoint.files.values()}) == 3
    assert checkpoint.files[layer.packed].file != checkpoint.files[layer.scale].file
    assert_reads_the_reference_values(checkpoint, "weight_packed")
