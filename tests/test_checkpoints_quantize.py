# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint: what is chosen, what is refused, and that an interrupted run never looks like a finished one."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import LINEARS, llama_config, llama_json, save_llama, tensors_of, write_checkpoint
from helpers import assert_same_bits
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from xpu_fp4.checkpoints import CheckpointError, Scheme, open_checkpoint, plan_quantization, quantize_checkpoint
from xpu_fp4.checkpoints.tensor_files import INDEX

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("source"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pooling").mkdir()
    (folder / "pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights in another format")
    return folder


def unquantized_json() -> dict[str, object]:
    return {key: value for key, value in llama_json({}).items() if key != "quantization_config"}


def assert_same_tensors(folder: Path, expected: Path) -> None:
    tensors, want = tensors_of(folder), tensors_of(expected)
    assert tensors.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(tensors[name], tensor)


def test_shards_small_files_and_the_rest_are_kept(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    assert len(list(source.glob("*.safetensors"))) > 2
    names = {path.name for path in source.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "pooling" / "config.json").read_text() == "{}"
    assert not (tmp_path / "out.partial").exists()
    before, after = tensors_of(source), tensors_of(out)
    assert after.keys() - before.keys() == {f"{name}.{part}" for name in LINEARS for part in ("weight_packed", "weight_scale")}
    for name in before.keys() & after.keys():
        assert_same_bits(after[name], before[name])
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"].keys() == after.keys()
    assert all(
        stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((out / "config.json").stat().st_mode) for path in out.glob("*.s*")
    )


def test_the_same_weights_in_other_formats_are_left_out(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    weights = {"original/consolidated.00.pth", "onnx/model.onnx", "onnx/model.onnx_data", "metal/model.bin", "model.gguf"}
    kept = {"original/params.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"}
    for name in weights | kept | {".cache/state"}:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    (source / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]))
    out = quantize_checkpoint(plan_quantization(source), source / "out")
    expected = kept | {path.name for path in source.iterdir() if path.is_file()} - {"model.gguf"}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == expected
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"original", "2_Dense"}


def test_config_says_what_was_done(source: Path, tmp_path: Path) -> None:
    plan = plan_quantization(source, [Q0, r"re:lm_.*"])
    out = quantize_checkpoint(plan, tmp_path / "out", mode="w4a16", scale_mode="rceil")
    config = json.loads((out / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    described = config.pop("quantization_config")
    assert config == original
    assert described["ignore"] == ["lm_head", Q0]
    assert described["config_groups"]["group_0"]["input_activations"] is None
    assert open_checkpoint(out).layers.keys() == LINEARS.keys() - {Q0}
    assert f"{Q0}.weight" in tensors_of(out)


def test_only_a_rule_that_others_do_not_know_is_recorded_for_us(source: Path, tmp_path: Path) -> None:
    for scale_mode, recorded in (("even", None), ("floor", {"scale_mode": "floor"})):
        out = quantize_checkpoint(
            plan_quantization(source),
            tmp_path / scale_mode,
            mode="w4a4",
            scale_mode=scale_mode,  # type: ignore[arg-type]
        )
        assert json.loads((out / "config.json").read_text())["quantization_config"].get("xpu_fp4") == recorded
        assert {layer.scheme.scale_mode for layer in open_checkpoint(out).layers.values()} == {scale_mode}


def test_w4a8_is_written_weight_only_with_a_hint_for_us(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "w4a8", mode="w4a8")
    weight_only = quantize_checkpoint(plan_quantization(source), tmp_path / "w4a16", mode="w4a16")
    described, others = (json.loads((folder / "config.json").read_text()) for folder in (out, weight_only))
    assert described["quantization_config"].pop("xpu_fp4") == {"activations": "mxint8", "group": 128}
    assert described == others
    assert_same_tensors(out, weight_only)
    assert {layer.scheme for layer in open_checkpoint(out).layers.values()} == {Scheme("w4a8")}


# ---- what cannot be done is named, before anything is written ----


def test_a_pattern_that_ignores_nothing_is_named(source: Path) -> None:
    with pytest.raises(ValueError, match=r"ignore has 'q_proj', which matches no linear layer; a regex starts with re:"):
        plan_quantization(source, ["q_proj"])


def test_an_unknown_mode_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='mode is \'w8a8\', expected "w4a4" or "w4a8" or "w4a16"'):
        quantize_checkpoint(plan_quantization(source), tmp_path / "out", mode="w8a8")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_everything_ignored_is_refused(source: Path) -> None:
    with pytest.raises(CheckpointError, match="has no linear layer to quantize"):
        plan_quantization(source, ["re:.*"])


def test_a_quantized_model_is_refused(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is quantized already, by 'compressed-tensors'"):
        plan_quantization(out)


def test_an_existing_output_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="exists already"):
        quantize_checkpoint(plan_quantization(source), tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        quantize_checkpoint(plan_quantization(source), tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_layer_that_does_not_fit_in_blocks_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(save_llama(tmp_path / "whole"))
    tensors[f"{Q0}.weight"] = torch.zeros(64, 48, dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "bad", tensors, unquantized_json())
    message = r"model.safetensors: tensor .*q_proj.weight has shape \[64, 48\], expected \[N, K\] with K a multiple of 32"
    with pytest.raises(CheckpointError, match=message):
        plan_quantization(tmp_path / "bad")
    assert Q0 not in plan_quantization(tmp_path / "bad", [Q0]).quantized
    tensors[f"{Q0}.weight"] = torch.zeros(64, 64, dtype=torch.float64)
    write_checkpoint(tmp_path / "bad", tensors, unquantized_json())
    with pytest.raises(CheckpointError, match=r"q_proj.weight has dtype F64, expected one of BF16, F16, F32"):
        plan_quantization(tmp_path / "bad")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    tensors = tensors_of(save_llama(tmp_path / "whole"))
    tensors[f"{Q0}.weight"][3, 5] = value
    plan = plan_quantization(write_checkpoint(tmp_path / "bad", tensors, unquantized_json()))
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor .*q_proj.weight holds NaN or Inf"):
        quantize_checkpoint(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- interruption ----


def test_finished_shards_of_an_interrupted_run_are_kept(source: Path, tmp_path: Path) -> None:
    expected = quantize_checkpoint(plan_quantization(source), tmp_path / "expected")
    written: dict[str, int] = {}

    def stop_after_two(done: int, total: int) -> None:
        written.update({path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")})
        if len(written) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan_quantization(source), tmp_path / "out", progress=stop_after_two)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path / "out.partial")
    (tmp_path / "out.partial" / ".tmpA1b2").touch()  # as a killed writer of tensor files leaves it
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    assert_same_tensors(out, expected)


def test_shards_of_other_settings_are_not_kept(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan_quantization(source), tmp_path / "out", scale_mode="ceil", progress=stop)
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    assert_same_tensors(out, quantize_checkpoint(plan_quantization(source), tmp_path / "expected"))


def test_two_writers_of_one_output_are_kept_apart(source: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(BlockingIOError, match=r"another process is writing .*out\.partial"):
            quantize_checkpoint(plan_quantization(source), tmp_path / "out")

    quantize_checkpoint(plan_quantization(source), tmp_path / "out", progress=second)


# Quantizes again and again in forked children, which share the imported torch, and kills each at a random moment of its run.
KILLER = """
import os, pathlib, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)  # no threads, so that children may be forked
from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint
source, out, kills, seed = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
plan = plan_quantization(source)
partial = out.with_name(out.name + ".partial")

def start():
    child = os.fork()
    if child == 0:
        try:
            quantize_checkpoint(plan, out)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child

begin = time.monotonic()
os.waitpid(start(), 0)
duration = time.monotonic() - begin
random.seed(seed)
killed = 0
print("whole", flush=True)
while killed < kills:
    sys.stdin.readline()  # the test has looked at what is there
    if out.exists():
        shutil.rmtree(out)
    child = start()
    time.sleep(random.uniform(0, 1.1 * duration))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run after a killed one failed"
    killed += os.WIFSIGNALED(status)
    if killed % 3 == 0:
        shutil.rmtree(partial, ignore_errors=True)  # some runs begin anew, the others go on
    print("killed" if os.WIFSIGNALED(status) else "whole", flush=True)
"""


def test_a_killed_run_never_leaves_a_wrong_output(source: Path, tmp_path: Path) -> None:
    expected = quantize_checkpoint(plan_quantization(source), tmp_path / "expected")
    out, kills = tmp_path / "out", 24
    arguments = [sys.executable, "-c", KILLER, str(source), str(out), str(kills), "0"]
    outcomes = {"nothing": 0, "whole": 0}
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None
        assert killer.stdout is not None
        for line in killer.stdout:
            if out.exists():
                assert_same_tensors(out, expected)
                assert (out / "config.json").read_text() == (expected / "config.json").read_text()
                assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
            else:
                assert line == "killed\n"
                with pytest.raises(CheckpointError):
                    open_checkpoint(out)
            partial = tmp_path / "out.partial"
            if partial.exists() and (partial / "config.json").exists():
                assert_same_tensors(partial, expected)  # killed between the last file and the rename
            elif partial.exists():
                with pytest.raises(CheckpointError):
                    open_checkpoint(partial)
            outcomes["whole" if out.exists() else "nothing"] += 1
            if killer.poll() is None:
                try:
                    killer.stdin.write("\n")
                    killer.stdin.flush()
                except BrokenPipeError:  # that was the last
                    break
    assert killer.returncode == 0
    assert outcomes["nothing"] >= 20, outcomes


# ---- memory ----

MEMORY = """
import resource, sys
import xpu_fp4
from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint
if sys.argv[1] == "quantize":
    quantize_checkpoint(plan_quantization(sys.argv[2]), sys.argv[3])
else:
    xpu_fp4.load_model(sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def save_large_llama(folder: Path) -> None:
    """4.4 GB in shards of three layers: all weights are parts of the same random numbers."""
    hidden, layers = 4096, 24
    config = llama_config()
    config.update({"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers})
    config.update({"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128})
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    numbers = torch.randn(hidden * hidden).bfloat16()
    names = list(shapes)
    size = -(-len(names) // 8)
    weight_map: dict[str, str] = {}
    for shard in range(8):
        mine = names[shard * size : (shard + 1) * size]
        file = f"model-{shard}.safetensors"
        save_file({name: numbers[: shapes[name].numel()].clone().view(shapes[name]) for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.large
def test_memory_is_bounded_by_the_largest_shard(tmp_path: Path) -> None:
    """Quantizing needs less than twice the largest shard and 1 GB; loading, less than the weights in high precision."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_large_llama(source)
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert sum(sizes) > 4e9

    def peak(what: str) -> int:
        arguments = [sys.executable, "-c", MEMORY, what, str(source), str(out)]
        return int(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)

    quantizing, loading = peak("quantize"), peak("load")
    packed = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{sum(sizes) / 1e6:.0f} MB, largest shard {max(sizes) / 1e6:.0f} MB: peak {quantizing / 1e6:.0f} MB")
    print(f"{packed / 1e6:.0f} MB quantized: peak {loading / 1e6:.0f} MB while loading")
    assert quantizing < 2 * max(sizes) + 1e9
    assert loading < 2 * packed + 1e9 < sum(sizes)
