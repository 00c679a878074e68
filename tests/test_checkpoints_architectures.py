# SPDX-License-Identifier: Apache-2.0
"""Models whose names, layers or weights are other than a plain language model's."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import xpu_fp4
from checkpoint_files import IDS, quark_config, tensors_of, write_checkpoint
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from xpu_fp4.checkpoints import Plan, plan_quantization, quantize_checkpoint
from xpu_fp4.checkpoints.names import names_in_model

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAVA = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=127)
QWEN_VL = hf.Qwen2VLConfig(
    text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 1e4}},
    vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
)
MIXTRAL = hf.MixtralConfig(**TEXT, num_local_experts=4)
DEEPSEEK = hf.DeepseekV3Config(
    **TEXT | {"num_key_value_heads": 2},
    moe_intermediate_size=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    n_shared_experts=1,
)


def save(folder: Path, model_class: Any, config: Any) -> Any:
    """A small model with random weights in its published form, and the model."""
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


def quantized(folder: Path, model_class: Any, config: Any, **options: Any) -> tuple[Plan, Path]:
    """A small model's plan, and the directory that it becomes, in W4A16."""
    save(folder / "source", model_class, config)
    plan = plan_quantization(folder / "source", **options)
    return plan, quantize_checkpoint(plan, folder / "out", mode="w4a16")


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(**inputs or {"input_ids": IDS}).logits
    return result


def as_quark(folder: Path) -> None:
    """Turns a W4A16 directory of ours into one of Quark's."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name.replace("weight_packed", "weight"): tensor for name, tensor in tensors_of(folder).items()}
    ignored = config["quantization_config"]["ignore"]
    write_checkpoint(folder, tensors, config | {"quantization_config": quark_config(mode="w4a16", exclude=ignored)})


# ---- names that Transformers converts ----


@pytest.mark.parametrize("config", [LLAVA, QWEN_VL], ids=lambda config: config.model_type)
def test_the_language_model_is_quantized_and_what_sees_is_kept(tmp_path: Path, config: Any) -> None:
    model_class = {"llava": hf.LlavaForConditionalGeneration}.get(config.model_type, hf.Qwen2VLForConditionalGeneration)
    plan, out = quantized(tmp_path, model_class, config)
    assert len(plan.quantized) == 2 * 7
    assert all(".layers." in name and "vis" not in name for name in plan.quantized)
    assert any("vis" in name for name in plan.kept)
    loaded = xpu_fp4.load_model(out)
    names = {name for name, module in loaded.named_modules() if isinstance(module, xpu_fp4.MXFP4Linear)}
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
    # Transformers looks for ignored modules by the model's names, vLLM by those in the files.
    linears = {name for name, module in loaded.named_modules() if type(module) is nn.Linear}
    assert linears <= set(plan.ignore)
    applied = xpu_fp4.apply_checkpoint(model_class._from_config(config, dtype=torch.bfloat16).eval(), out)
    assert_same_bits(logits(applied), logits(loaded))


def test_transformers_itself_loads_a_vision_language_model_of_ours(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, hf.LlavaForConditionalGeneration, LLAVA)
    theirs = hf.LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.bfloat16)
    torch.testing.assert_close(logits(theirs), logits(xpu_fp4.load_model(out)), rtol=0.05, atol=0.05)


def test_quark_has_the_published_names_of_experts(tmp_path: Path) -> None:
    plan, out = quantized(tmp_path, hf.MixtralForCausalLM, MIXTRAL)
    assert any("block_sparse_moe.experts.0.w1" in name for name in plan.quantized)
    expected = logits(xpu_fp4.load_model(out))
    as_quark(out)
    assert_same_bits(logits(xpu_fp4.load_model(out)), expected)
    model = hf.MixtralForCausalLM._from_config(MIXTRAL, dtype=torch.bfloat16).eval()
    assert_same_bits(logits(xpu_fp4.apply_checkpoint(model, out)), expected)


def test_a_model_of_ones_own_has_the_names_of_the_files() -> None:
    assert names_in_model(nn.ModuleDict({"a": nn.Linear(32, 32)}), ["a.weight"])["a.weight"][0] == "a.weight"


# ---- layers that the model leaves out ----


def add_prediction_layer(folder: Path) -> None:
    """A third layer beside the two that config.json counts, as multi-token prediction is published."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    tensors |= {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in last.items()}
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(64, 128, dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_layer_that_the_model_leaves_out_is_kept_and_named(tmp_path: Path) -> None:
    save(tmp_path / "source", hf.DeepseekV3ForCausalLM, DEEPSEEK)
    expected = plan_quantization(tmp_path / "source").quantized
    add_prediction_layer(tmp_path / "source")
    with pytest.warns(UserWarning, match=r"of the weights are not quantized, in no linear layer: model.layers.2.eh_proj"):
        plan = plan_quantization(tmp_path / "source")
    assert sorted(plan.quantized) == sorted(expected)
    assert {"model.layers.2.eh_proj", "model.layers.2.mlp.experts.3.up_proj"} <= set(plan.kept)
    out = quantize_checkpoint(plan, tmp_path / "out")
    assert logits(xpu_fp4.load_model(out)).isfinite().all()


def test_a_quantized_layer_that_the_model_leaves_out_is_named(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, hf.DeepseekV3ForCausalLM, DEEPSEEK)
    expected = logits(xpu_fp4.load_model(out))
    add_prediction_layer(out)
    with pytest.warns(UserWarning, match=r"the model has no place for model.layers.2.mlp.experts.0.down_proj"):
        loaded = xpu_fp4.load_model(out)
    assert_same_bits(logits(loaded), expected)
    model = hf.DeepseekV3ForCausalLM._from_config(DEEPSEEK, dtype=torch.bfloat16).eval()
    with pytest.warns(UserWarning, match=r"the model has no place for model.layers.2") as seen:
        applied = xpu_fp4.apply_checkpoint(model, out)
    assert len(seen) == 1
    assert_same_bits(logits(applied), expected)


# ---- what readers hold in high precision ----


def test_routers_gates_and_heads_are_kept_unless_asked_for(tmp_path: Path) -> None:
    qwen = hf.Qwen2MoeConfig(**TEXT, **EXPERTS, shared_expert_intermediate_size=64)
    save(tmp_path / "moe", hf.Qwen2MoeForCausalLM, qwen)
    save(tmp_path / "head", hf.LlamaForSequenceClassification, hf.LlamaConfig(**TEXT, num_labels=40))
    moe, head = plan_quantization(tmp_path / "moe"), plan_quantization(tmp_path / "head")
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"} <= set(moe.kept)
    assert {"model.layers.0.mlp.shared_expert.gate_proj", "model.layers.0.self_attn.k_proj"} <= set(moe.quantized)
    assert head.kept == ("score",)
    asked = plan_quantization(tmp_path / "moe", include=["re:.*shared_expert_gate", "lm_head"])
    assert {"lm_head", "model.layers.1.mlp.shared_expert_gate"} <= set(asked.quantized)
    with pytest.raises(ValueError, match=r"include has 'head', which matches no linear layer"):
        plan_quantization(tmp_path / "head", include=["head"])


def test_rows_are_counted_in_what_readers_fuse(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**TEXT | {"num_attention_heads": 4})  # k_proj has 16 rows, beside 64 of q_proj
    plan, _ = quantized(tmp_path, hf.LlamaForCausalLM, config)
    assert plan.kept == ("lm_head",)


# ---- matrices that are in no linear layer ----


def test_fused_experts_are_kept_if_they_are_ignored(tmp_path: Path) -> None:
    config = hf.GptOssConfig(**TEXT, head_dim=32, num_local_experts=4, num_experts_per_tok=2)
    with warnings.catch_warnings():  # who names them knows
        warnings.simplefilter("error")
        plan, out = quantized(tmp_path, hf.GptOssForCausalLM, config, ignore=[r"re:.*mlp\..*"])
    name = "model.layers.0.mlp.experts"
    assert name in plan.kept
    assert name in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]


def test_matrices_that_are_in_no_linear_layer_are_named_in_place() -> None:
    with pytest.warns(UserWarning, match=r"in no nn.Linear: transformer.h.0.attn.c_attn.weight"):
        xpu_fp4.quantize_(hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2)))


# ---- layers that readers fuse ----


@pytest.mark.parametrize("kept", ["self_attn.q_proj", "mlp.up_proj"])
def test_a_fused_layer_of_two_precisions_is_named(tmp_path: Path, kept: str) -> None:
    save(tmp_path / "source", hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT))
    name = f"model.layers.0.{kept}"
    with pytest.warns(UserWarning, match=rf"cannot load a fused layer of two precisions, kept is {name} beside model.layers.0"):
        plan_quantization(tmp_path / "source", [name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_quantization(tmp_path / "source", [r"re:model.layers.0.*\.(q|k|v|down)_proj"])


def test_a_single_expert_that_is_kept_is_named(tmp_path: Path) -> None:
    save(tmp_path / "source", hf.MixtralForCausalLM, MIXTRAL)
    with pytest.warns(UserWarning, match=r"kept is model.layers.1.block_sparse_moe.experts.2.w2 beside"):
        plan_quantization(tmp_path / "source", ["model.layers.1.block_sparse_moe.experts.2.w2"])


# ---- code that looks at a layer's weight ----


@pytest.mark.parametrize(
    ("model_class", "config", "inputs"),
    [
        (
            hf.T5ForConditionalGeneration,
            hf.T5Config(vocab_size=128, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2),
            {"input_ids": IDS, "decoder_input_ids": IDS},
        ),
        (hf.MambaForCausalLM, hf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, time_step_rank=32), {}),
        (
            hf.Mamba2ForCausalLM,
            hf.Mamba2Config(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_heads=4, head_dim=32, n_groups=1),
            {},
        ),
    ],
    ids=["t5", "mamba", "mamba2"],
)
def test_models_that_look_at_weights_load_and_run(
    tmp_path: Path, model_class: Any, config: Any, inputs: dict[str, Tensor]
) -> None:
    plan, out = quantized(tmp_path, model_class, config, ignore=["re:.*x_proj"] if config.model_type == "mamba" else None)
    loaded = xpu_fp4.load_model(out)
    model = model_class.from_pretrained(tmp_path / "source", dtype=torch.bfloat16).eval()
    xpu_fp4.quantize_(model, mode="w4a16", filter_fn=lambda _, name: name in plan.quantized)
    assert_same_bits(logits(model, **inputs), logits(loaded, **inputs))


# ---- a loaded model is a model like others ----


def test_a_loaded_model_may_be_copied_saved_and_sent(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, hf.MixtralForCausalLM, MIXTRAL)
    loaded = xpu_fp4.load_model(out)
    expected = logits(loaded)
    assert_same_bits(logits(copy.deepcopy(loaded)), expected)
    torch.save(loaded, tmp_path / "model.pt")
    assert_same_bits(logits(torch.load(tmp_path / "model.pt", weights_only=False)), expected)
    # A process of its own, which imports what it needs.
    code = "import sys, torch; ids, m = torch.load(sys.argv[1], weights_only=False); torch.save(m(ids).logits, sys.argv[2])"
    torch.save((IDS, loaded), tmp_path / "sent.pt")
    subprocess.run([sys.executable, "-c", code, tmp_path / "sent.pt", tmp_path / "logits.pt"], check=True)
    assert_same_bits(torch.load(tmp_path / "logits.pt").detach(), expected)
