# SPDX-License-Identifier: Apache-2.0
"""Files of AutoRound, which comes with llm-compressor: in compressed-tensors' format and in its own."""

import json
from pathlib import Path

import pytest
import torch
import xpu_fp4
from auto_round import AutoRound
from checkpoint_files import IDS, LINEARS, layers, llama, save_tokenizer, tensors_of
from checkpoints_of_others import load_theirs
from helpers import assert_same_bits
from xpu_fp4 import reference
from xpu_fp4.checkpoints import open_checkpoint

FORMATS = ("llm_compressor", "auto_round")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Writes the same model, tuned for two steps, in each format."""
    folder = tmp_path_factory.mktemp("models")
    source = folder / "llama"
    llama(hidden=128, intermediate=256).save_pretrained(source)
    save_tokenizer(source)
    texts = [" ".join(f"w{(7 * i + j) % 100}" for j in range(40)) for i in range(16)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = {}
    deterministic = torch.are_deterministic_algorithms_enabled()
    for name in FORMATS:
        tuner = AutoRound(
            str(source),
            scheme="MXFP4",
            iters=2,
            nsamples=8,
            seqlen=32,
            batch_size=4,
            dataset=str(folder / "texts.jsonl"),
            device_map="cpu",
            enable_torch_compile=False,
        )
        tuner.quantize_and_save(output_dir=str(folder / name), format=name)
        found[name] = next((folder / name).rglob("config.json")).parent
    torch.use_deterministic_algorithms(deterministic)  # AutoRound turns it on, for all that follows
    return found


def test_its_export_computes_what_compressed_tensors_does(exported: dict[str, Path]) -> None:
    theirs, ours = load_theirs(exported["llm_compressor"], IDS), xpu_fp4.load_model(exported["llm_compressor"], dtype="float32")
    assert layers(ours).keys() == LINEARS.keys()
    assert {(module.mode, module.scale_mode) for module in layers(ours).values()} == {("w4a4", "even")}
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_its_own_format_is_read(exported: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(exported["auto_round"])
    assert checkpoint.format == "auto-round"
    assert checkpoint.layers.keys() == LINEARS.keys()
    # Tuning for the other format takes the same steps.
    expected, found = tensors_of(exported["llm_compressor"]), tensors_of(exported["auto_round"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)
    model = xpu_fp4.load_model(exported["auto_round"], dtype="float32")
    name, module = next(iter(layers(model).items()))
    rule = module.scale_mode
    assert rule == "floor"
    x = torch.randn(8, module.in_features, generator=torch.Generator().manual_seed(0))
    q, scale = reference.quantize(x, rule)
    weight = reference.values(*checkpoint.weight(name))
    torch.testing.assert_close(module(x), (reference.values(q, scale) @ weight.T).float(), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert model(IDS).logits.isfinite().all()
