# SPDX-License-Identifier: Apache-2.0
"""Keys of a quantization_config that change nothing are no matter, and what is left aside is named."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import (
    LINEARS,
    MXFP4_ARGUMENTS,
    QUARK_WEIGHT,
    compressed_tensors,
    compressed_tensors_config,
    group,
    quark,
    quark_config,
)
from xpu_fp4 import load_model
from xpu_fp4.checkpoints import open_checkpoint

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
