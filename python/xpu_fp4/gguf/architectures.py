# SPDX-License-Identifier: Apache-2.0
"""The models that llama.cpp and Transformers both have: names of their tensors, and metadata as config.json has it."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._text import shorten
from ..checkpoints.errors import CheckpointError, printable
from .file import GgufFile

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Parameter:
    """A parameter of the Transformers model and the GGUF tensors that it is made of: one or, whose rows alternate, two."""

    name: str
    sources: tuple[str, ...]
    rotated_heads: int = 0
    """If not 0, llama.cpp has the rows of that many heads in another order: halves of a head's rows alternate."""


@dataclass(frozen=True)
class Model:
    """What becomes of a GGUF file: config.json but for the quantization, and all parameters."""

    config: dict[str, Any]
    parameters: list[Parameter]
    stacks_experts: bool
    """Whether the file's matrices in MXFP4 are experts, all of a layer in one tensor."""


class Keys:
    """The metadata of an architecture. Raises CheckpointError, by the key's name, for what is missing or no such number."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file, self._prefix = file, f"{architecture}."
        self._used: set[str] = set()

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise self._refusal(name, value, f"an integer from 1 to {_MOST}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self._refusal(name, value, "a number above 0")
        return value

    def expect(self, name: str, *expected: Any) -> Any:
        """The value, which is one of those expected; the first of them if there is none."""
        value = self._get(name, expected[0])
        if value not in expected:
            raise self._refusal(name, value, " or ".join(map(repr, expected)))
        return value

    def left_aside(self) -> list[str]:
        return sorted(key for key in self._file.metadata if key.startswith(self._prefix) and key not in self._used)

    def _get(self, name: str, default: Any) -> Any:
        self._used.add(self._prefix + name)
        return self._file.metadata.get(self._prefix + name, default)

    def _refusal(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path}: {self._prefix}{name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class _Architecture:
    class_name: str
    model_type: str
    block: Mapping[str, tuple[str, ...]]
    """The tensors of a block, by the parameters of a layer."""
    special: Callable[[Keys], dict[str, Any]]
    """What its config.json has that others have not."""
    rotates: bool = False
    """Whether llama.cpp reorders the rows of queries and keys."""


def _alike(names: Mapping[str, str], *kinds: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in names.items() for kind in kinds}


_ATTENTION = {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"} | {"self_attn.o_proj": "attn_output"}
_DENSE = _alike(
    _ATTENTION
    | {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    | {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "weight",
)
_QWEN3 = _DENSE | _alike({"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}, "weight")
_GPT_OSS = (
    _alike(_ATTENTION | {"mlp.router": "ffn_gate_inp"}, "weight", "bias")
    | _alike({"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}, "weight")
    | {"self_attn.sinks": ("attn_sinks.weight",)}
    | {
        f"mlp.experts.{ours}{suffix}": tuple(f"ffn_{part}_exps.{kind}" for part in parts)
        for ours, parts in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items()
        for suffix, kind in {"": "weight", "_bias": "bias"}.items()
    }
)
_ROTATED = {"self_attn.q_proj.weight": "num_attention_heads", "self_attn.k_proj.weight": "num_key_value_heads"}


def _dense(keys: Keys) -> dict[str, Any]:
    keys.expect("rope.scaling.type", "none")
    theta = keys.number("rope.freq_base", 10000.0)
    return {
        "intermediate_size": keys.integer("feed_forward_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 150000.0)}
    if keys.expect("rope.scaling.type", "none", "yarn") == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": keys.number("rope.scaling.factor"),
            "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
            "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
            "truncate": False,
        }
    width = keys.integer("expert_feed_forward_length", keys.integer("feed_forward_length", 1))
    return {
        "intermediate_size": width,
        "num_local_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "sliding_window": keys.integer("attention.sliding_window"),
        "attention_bias": True,
        "rope_parameters": rope,
    }


_ARCHITECTURES = {
    "gpt-oss": _Architecture("GptOssForCausalLM", "gpt_oss", _GPT_OSS, _gpt_oss),
    "llama": _Architecture("LlamaForCausalLM", "llama", _DENSE, _dense, rotates=True),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", _QWEN3, _dense),
}


def describe(file: GgufFile) -> Model:
    """The model in a GGUF file.

    Raises CheckpointError: another architecture, metadata that is missing or means another model than Transformers has, a
    tensor that is missing or that the architecture has no place for. Keys of the architecture that are not read are named in
    a warning.
    """
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(f"{file.path} has the architecture {name!r}, expected one of {known}")
    architecture = _ARCHITECTURES[name]
    keys = Keys(file, name)
    config = {"architectures": [architecture.class_name], "model_type": architecture.model_type, **_common(file, keys)}
    config |= architecture.special(keys)
    parameters = _parameters(file, architecture, config)
    if others := keys.left_aside():
        warnings.warn(printable(f"{file.path}: left aside in the metadata: {shorten(others)}"), stacklevel=3)
    return Model(config, parameters, name == "gpt-oss")


def _common(file: GgufFile, keys: Keys) -> dict[str, Any]:
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head = keys.integer("attention.key_length", max(1, hidden // heads))
    for same in ("attention.value_length", "rope.dimension_count"):
        keys.expect(same, head)
    if "token_embd.weight" not in file:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight")
    vocabulary = file["token_embd.weight"].shape[0]
    keys.expect("vocab_size", vocabulary)
    return {
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length"),
        "vocab_size": vocabulary,
        # llama.cpp has an output of its own only where it differs from the embedding.
        "tie_word_embeddings": "output.weight" not in file,
        **_token_ids(file, vocabulary),
    }


def _token_ids(file: GgufFile, vocabulary: int) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        value = file.metadata.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value < vocabulary):
            raise CheckpointError(f"{file.path}: {key} is {value!r}, expected one of {vocabulary} tokens")
        ids[f"{ours}_token_id"] = value
    return ids


def _parameters(file: GgufFile, architecture: _Architecture, config: dict[str, Any]) -> list[Parameter]:
    layers = config["num_hidden_layers"]
    if layers > len(file):
        raise CheckpointError(f"{file.path} has {len(file)} tensors, and the metadata {layers} blocks")
    parameters = [
        Parameter("model.embed_tokens.weight", ("token_embd.weight",)),
        Parameter("model.norm.weight", ("output_norm.weight",)),
    ]
    if not config["tie_word_embeddings"]:
        parameters.append(Parameter("lm_head.weight", ("output.weight",)))
    for layer in range(layers):
        for ours, theirs in architecture.block.items():
            sources = tuple(f"blk.{layer}.{name}" for name in theirs)
            heads = config[_ROTATED[ours]] if architecture.rotates and ours in _ROTATED else 0
            parameters.append(Parameter(f"model.layers.{layer}.{ours}", sources, heads))
    expected = {source for parameter in parameters for source in parameter.sources}
    if missing := sorted(expected - file.keys()):
        raise CheckpointError(f"{file.path} has no tensors {shorten(missing)}")
    if strays := sorted(file.keys() - expected):
        raise CheckpointError(f"{file.path} has tensors that {config['architectures'][0]} has no place for: {shorten(strays)}")
    return parameters
