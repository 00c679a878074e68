# SPDX-License-Identifier: Apache-2.0
"""The types of what is read of config.json and modules.json: checked once, so that all else may rely on them.

Keys that are not here are read by nobody, or have a check of their own.
"""

from typing import Any

import msgspec

from .untrusted import check_type


class Config(msgspec.Struct):
    """config.json."""

    architectures: list[str] | None = None
    dtype: str | dict[str, Any] | None = None
    torch_dtype: str | dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


class Part(msgspec.Struct):
    """An entry of modules.json, which sentence-transformers has."""

    path: str | None = None


class CompressedTensors(msgspec.Struct):
    """A quantization_config of compressed-tensors."""

    format: str | None = None
    config_groups: dict[str, Any] | None = None
    ignore: list[str] | None = None
    xpu_fp4: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None


class Group(msgspec.Struct):
    """An entry of config_groups."""

    targets: list[str] | None = None
    format: str | None = None
    weights: dict[str, Any] | None = None
    input_activations: dict[str, Any] | None = None


class Apply(msgspec.Struct):
    """Where a transform is applied."""

    location: str | None = None
    targets: list[str] | str | None = None
    ignore: list[str] | str | None = None
    inverse: bool | None = None


class Transform(msgspec.Struct):
    """An entry of transform_config.config_groups."""

    type: str | None = None
    apply: list[Apply] | None = None
    head_dim: int | None = None
    randomize: bool | None = None


class Extension(msgspec.Struct):
    """Our own key."""

    activations: str | None = None
    input_offset: bool | None = None
    groups: dict[str, dict[str, Any]] | None = None


class Quark(msgspec.Struct):
    """A quantization_config of AMD Quark."""

    exclude: list[str] | None = None
    layer_quant_config: dict[str, Any] | None = None
    layer_type_quant_config: dict[str, Any] | None = None
    kv_cache_quant_config: dict[str, Any] | None = None
    export: dict[str, Any] | None = None


class Export(msgspec.Struct):
    """Quark's export."""

    kv_cache_group: list[str] | None = None


class AutoRound(msgspec.Struct):
    """A quantization_config of AutoRound."""

    extra_config: dict[str, dict[str, Any]] | None = None


class FpQuant(msgspec.Struct):
    """A quantization_config of FP-Quant."""

    forward_dtype: str | None = None
    forward_method: str | None = None
    hadamard_group_size: int | None = None
    transform_init: str | None = None
    pseudoquantization: bool | None = None
    store_master_weights: bool | None = None
    modules_to_not_convert: list[str] | None = None


class GptOss(msgspec.Struct):
    """A quantization_config of gpt-oss."""

    modules_to_not_convert: list[str] | None = None
    xpu_fp4: dict[str, Any] | None = None


class Message(msgspec.Struct):
    """A turn of a conversation."""

    role: str
    content: str


class Conversation(msgspec.Struct):
    """An entry of a file of conversations."""

    messages: list[Any]


def check_compressed_tensors(config: dict[str, Any], where: str) -> None:
    check_type(config, CompressedTensors, where)
    for name, group in (config.get("config_groups") or {}).items():
        check_type(group, Group, f"{where}.config_groups.{name}")
    check_type(config.get("xpu_fp4"), Extension | None, f"{where}.xpu_fp4")
    for name, group in ((config.get("xpu_fp4") or {}).get("groups") or {}).items():
        check_type(group, Extension, f"{where}.xpu_fp4.groups.{name}")
    transforms = (config.get("transform_config") or {}).get("config_groups")
    check_type(transforms, dict[str, Any] | None, f"{where}.transform_config.config_groups")
    for name, transform in (transforms or {}).items():
        check_type(transform, Transform, f"{where}.transform_config.config_groups.{name}")


def check_quark(config: dict[str, Any], where: str) -> None:
    check_type(config, Quark, where)
    check_type(config.get("export"), Export | None, f"{where}.export")


def check_auto_round(config: dict[str, Any], where: str) -> None:
    check_type(config, AutoRound, where)


def check_fp_quant(config: dict[str, Any], where: str) -> None:
    check_type(config, FpQuant, where)


def check_gpt_oss(config: dict[str, Any], where: str) -> None:
    check_type(config, GptOss, where)
