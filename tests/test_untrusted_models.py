# SPDX-License-Identifier: Apache-2.0
"""A model directory of somebody else's: nothing outside of it is read, every pattern ends, every wrong type is named."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xpu_fp4
from checkpoint_files import (
    LINEARS,
    auto_round_config,
    compressed_tensors_config,
    llama_json,
    packed_llama,
    quark_config,
    save_llama,
    write_checkpoint,
)
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from xpu_fp4.checkpoints import CheckpointError, open_checkpoint, plan_quantization, quantize_checkpoint
from xpu_fp4.checkpoints.errors import printable
from xpu_fp4.checkpoints.patterns import LONGEST, MOST_PATTERNS, NameSet, Patterns, ShellPatterns
from xpu_fp4.checkpoints.reader import _FORMATS as FORMATS
from xpu_fp4.checkpoints.reader import check_keys
from xpu_fp4.checkpoints.untrusted import model_files, open_file, read_json
from xpu_fp4.cli import main


def packed(folder: Path, **changes: Any) -> Path:
    """A small MXFP4 model whose quantization_config has these changes."""
    config = llama_json(compressed_tensors_config(**changes))
    return write_checkpoint(folder, packed_llama("weight_packed", "weight_scale"), config)


def refuse(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    for part in parts:
        assert part in str(raised.value)


# ---- links and files that are none ----


def test_a_link_that_leads_out_of_the_directory_is_refused_with_its_target(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    source = save_llama(tmp_path / "model", shards=False)
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"model/notes\.txt is a link to .*secret, out of the model directory"):
        plan_quantization(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_are_read_are_no_links_out(tmp_path: Path, name: str) -> None:
    folder = packed(tmp_path / "model")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    refuse(folder, name, "elsewhere, out of the model directory")


def test_links_within_the_directory_are_followed_and_copied_as_contents(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model", shards=False)
    (source / "notes.txt").write_text("notes")
    (source / "again.txt").symlink_to("notes.txt")
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    assert (out / "again.txt").read_text() == "notes"
    assert not (out / "again.txt").is_symlink()


def test_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    folder = packed(tmp_path / "models--a" / "snapshots" / "0123")
    blobs = tmp_path / "models--a" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert len(open_checkpoint(folder).layers) == len(LINEARS)
    (tmp_path / "models--a" / "refs").write_text("main")
    (folder / "notes.txt").symlink_to("../../refs")
    refuse(folder, "notes.txt is a link to")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model")
    os.mkfifo(folder / "tokenizer.json")
    refuse(folder, "tokenizer.json is no regular file")
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refuse(folder, "config.json is no regular file")


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_to_a_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "again").symlink_to(target)
    with pytest.raises(CheckpointError, match="again is"):
        list(model_files(tmp_path / "model"))


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises((CheckpointError, OSError)):
        open_file(tmp_path / "a")


def test_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model", shards=False)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin and no safetensors files: pickles run code"):
        plan_quantization(source)


def test_a_model_without_linear_layers_says_what_it_has(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no linear layer to quantize; kept: .*transformer\.h\.0\.attn\.c_attn"):
        plan_quantization(tmp_path)


# ---- JSON ----

WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "ignore a number": ({"ignore": 3}, "quantization_config.ignore is 3, expected an array"),
    "ignore of numbers": ({"ignore": ["lm_head", 3]}, "quantization_config.ignore[1] is 3, expected a string"),
    "group a number": ({"config_groups": {"group_0": 7}}, "quantization_config.config_groups.group_0 is 7, expected an object"),
    "target a list": (
        {"config_groups": {"group_0": {"targets": [["Linear"]]}}},
        "config_groups.group_0.targets[0] is ['Linear'], expected a string",
    ),
    "groups a list": ({"config_groups": [1]}, "quantization_config.config_groups is [1], expected an object"),
    "format an object": ({"format": {}}, "quantization_config.format is {}, expected a string"),
    "method a list": ({"quant_method": ["x"]}, "quant_method ['x']"),
    "apply a number": (
        {"transform_config": {"config_groups": {"R1": {"apply": 1}}}},
        "transform_config.config_groups.R1.apply is 1, expected an array",
    ),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_a_wrong_type_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    changes, message = WRONG_TYPES[case]
    refuse(packed(tmp_path / "model", **changes), "config.json", message)


@pytest.mark.parametrize("key", ["quantization_config", "text_config", "architectures"])
def test_a_wrong_type_in_the_model_config_is_named(tmp_path: Path, key: str) -> None:
    folder = packed(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 7}))
    refuse(folder, f"{key} is 7")


def full_configs() -> dict[str, dict[str, Any]]:
    """A quantization_config of each format with every key that is read."""
    places = [
        {"location": where, "targets": ["Linear"], "ignore": ["lm_head"], "inverse": False}
        for where in ("input", "weight_input")
    ]
    transform = {"type": "hadamard", "head_dim": 32, "randomize": False, "precision": "torch.float32", "apply": places}
    transforms = {"config_groups": {"R1": transform}}
    ours = {"scale_mode": "even", "group": 128, "input_offset": False, "groups": {"group_0": {"activations": "mxint8"}}}
    schemes = quark_config()["global_quant_config"]
    return {
        "compressed-tensors": compressed_tensors_config(
            transform_config=transforms, sparsity_config={"format": "dense"}, xpu_fp4=ours, kv_cache_scheme=None
        ),
        "quark": quark_config()
        | {"exclude": ["lm_head"], "algo_config": [{"r4": None}], "softmax_quant_spec": None, "kv_cache_quant_config": {}}
        | {"export": {"kv_cache_group": ["*k"]}, "layer_quant_config": {"x*": schemes}}
        | {"layer_type_quant_config": {"Linear": schemes}},
        "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        "auto-round": auto_round_config(extra_config={"lm_head": {"bits": 16}, ".*q_proj.*": {"act_bits": 16}}),
    }


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or array in a value, with a key or an index in it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places_in(value[key])


ANYTHING: list[Any] = [None, True, 7, 1.5, "x", [], {}, [1], [[]], [{}], {"a": 1}, {"a": {}}, {"a": []}, {"": None}]


@pytest.mark.parametrize("method", ["compressed-tensors", "quark", "mxfp4", "auto-round"])
def test_any_type_anywhere_is_a_checkpoint_error_or_no_matter(tmp_path: Path, method: str) -> None:
    files = open_checkpoint(packed(tmp_path / "model")).files
    config = full_configs()[method]
    count = 0
    for owner, key in places_in(config):
        kept = owner[key]
        for owner[key] in ANYTHING:
            count += 1
            with contextlib.suppress(CheckpointError):
                check_keys(config, "config.json: quantization_config")
                FORMATS[method].read_layers(config, files)
        owner[key] = kept
    assert count >= len(ANYTHING) * len(config)


UNREADABLE = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "huge integer": '{"a": ' + "1" * 5000 + "}",
    "latin-1": '{"a": "\xe9"}',
    "list": "[1]",
    "cut": '{"a": ',
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_json_that_is_none_is_named(tmp_path: Path, case: str) -> None:
    (tmp_path / "config.json").write_bytes(UNREADABLE[case].encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json (is not readable JSON|holds a list)"):
        read_json(tmp_path / "config.json")


def test_a_large_json_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(CheckpointError, match="expected JSON of at most 64 MiB"):
        read_json(tmp_path / "config.json")


def test_infinity_is_read_as_published_configurations_have_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json") == {"time_step_limit": [0.0, float("inf")]}


def test_a_file_longer_or_shorter_than_its_header_says_is_refused(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole + b"\0", whole[:-1], b"\xff" * 8 + whole[8:]):
        (folder / "model.safetensors").write_bytes(content)
        refuse(folder, "model.safetensors is not a whole safetensors file")


# ---- patterns ----


def test_patterns_are_matched_from_the_beginning() -> None:
    names = NameSet(["lm_head", r"re:model\.layers\.\d+\.mlp", r"re:(?!visual).*\.up_proj$"], Patterns("ignore"))
    assert "lm_head" in names
    assert "model.layers.3.mlp.gate" in names
    assert "a.model.layers.3.mlp" not in names
    assert "text.up_proj" in names
    assert "visual.up_proj" not in names
    assert "lm_head.x" not in names


# Each takes ages where matching backtracks; the last two are refused by RE2.
ENDLESS = [r"^(([a-z._0-9]+)+)+!$", r"(a|a)*b", r"(?=(a|aa)+$)(?:(a|aa)+)+c", r"(?!x)((?:a|a|b)*)*\1c"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_every_pattern_ends(pattern: str) -> None:
    begin = time.thread_time()
    patterns = Patterns("ignore")
    try:
        for _ in range(100):
            patterns.matches("a" * 60, pattern)
    except CheckpointError as error:
        assert "takes more than 1 s to match" in str(error)  # noqa: PT017
    assert time.thread_time() - begin < 3


def test_the_second_is_for_all_patterns_of_a_checkpoint_together() -> None:
    patterns = Patterns("ignore")
    patterns._left = 0.0
    with pytest.raises(CheckpointError, match="takes more than"):
        patterns.matches("a" * 60, r"(?=(a|aa)+$)(?:(a|aa)+)+c")


def test_patterns_are_limited_in_number_and_length() -> None:
    patterns = Patterns("ignore")
    with pytest.raises(CheckpointError, match=f"of {LONGEST + 1} characters"):
        patterns.matches("a", "b" * (LONGEST + 1))
    for number in range(MOST_PATTERNS):
        patterns.matches("a", str(number))
    with pytest.raises(CheckpointError, match=f"more than {MOST_PATTERNS} patterns"):
        patterns.matches("a", "one more")
    with pytest.raises(CheckpointError, match="patterns, expected at most"):
        ShellPatterns([f"{number}*" for number in range(MOST_PATTERNS + 1)], "exclude")
    ShellPatterns(map(str, range(10 * MOST_PATTERNS)), "exclude")  # names are no patterns


def test_a_pattern_that_is_none_is_named(tmp_path: Path) -> None:
    refuse(packed(tmp_path / "model", ignore=["re:["]), "quantization_config has the pattern '[', which is no regex")


def test_shell_patterns_keep_their_order() -> None:
    patterns = ShellPatterns(["a*", "ab", "*"], "exclude")
    assert [patterns.find(name) for name in ("ab", "b")] == ["a*", "*"]


# ---- names ----


def test_what_is_not_printable_is_escaped() -> None:
    assert printable("a\x1b[31m\n\u202e\ud800é") == r"a\x1b[31m\n\u202e\ud800é"
    assert str(CheckpointError("a\x1b\n")) == r"a\x1b\n"


def test_names_are_no_markup_and_reach_no_terminal_raw(tmp_path: Path) -> None:
    name = "a[/b]\x1b[31m"
    tensors = {
        f"{name}.{kind}": torch.zeros(32, 32 // size, dtype=torch.uint8)
        for kind, size in (("weight_packed", 2), ("weight_scale", 32))
    }
    folder = write_checkpoint(tmp_path / "m[/i]", tensors, llama_json(compressed_tensors_config()))
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    assert r"a[/b]\x1b[31m" in result.output
    assert "\x1b" not in result.output
    save_file({f"{name}.weight_packed": tensors[f"{name}.weight_packed"]}, folder / "model.safetensors")
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 1
    assert "\x1b" not in result.output


# ---- code ----


def test_code_of_a_directory_is_never_run(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    command = f"import xpu_fp4; xpu_fp4.load_model({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", command], input="y\n" * 9, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="trust_remote_code is True, expected False"):
        xpu_fp4.load_model(folder, trust_remote_code=True)


def test_an_architecture_that_is_no_model_is_refused(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    with pytest.raises(CheckpointError, match="names the architecture pipeline"):
        xpu_fp4.load_model(folder)


def test_what_transformers_raises_over_a_config_is_one_line(tmp_path: Path) -> None:
    folder = packed(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": ["\x1b"], "num_attention_heads": 0}))
    with pytest.raises(CheckpointError, match=r"config\.json: transformers refuses it: ") as raised:
        xpu_fp4.load_model(folder)
    assert str(raised.value).isprintable()


# ---- shapes ----

OTHER_SHAPES = {
    "broadcasts": ("model.norm.weight", (1,)),
    "broadcasts in two dimensions": ("model.norm.weight", (1, 64)),
    "fewer rows": ("model.embed_tokens.weight", (64, 64)),
    "transposed": ("lm_head.weight", (64, 128)),
}


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_an_unquantized_tensor_of_another_shape_is_refused(tmp_path: Path, case: str) -> None:
    name, shape = OTHER_SHAPES[case]
    tensors = packed_llama("weight_packed", "weight_scale") | {name: torch.zeros(shape, dtype=torch.bfloat16)}
    folder = write_checkpoint(tmp_path / "model", tensors, llama_json(compressed_tensors_config()))
    with pytest.raises(CheckpointError) as raised:
        xpu_fp4.load_model(folder)
    assert f"tensor {name} has shape {list(shape)}, but the model's {name} has" in str(raised.value)


# ---- disks ----


def test_a_full_disk_ends_quantize_with_one_line(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model", shards=False)
    program = (
        "import resource, signal, sys; from xpu_fp4.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); main()"
    )
    command = [sys.executable, "-c", program, "quantize", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "model.safetensors cannot be written" in done.stderr
