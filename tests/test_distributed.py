# SPDX-License-Identifier: Apache-2.0
"""Two processes compute what one does. Each property is a function that both run, in one launch for all of them."""

import copy
import os
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import xpu_fp4
from helpers import DTYPES, assert_same_bits, at_once, seeded
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.multiprocessing.spawn import spawn
from xpu_fp4 import Mode, MXFP4Linear, reference
from xpu_fp4.distributed import ColumnParallel, RowParallel, tensor_parallel_plan
from xpu_fp4.distributed_experts import ColumnParallelExperts, ExpertParallel, expert_parallel_plan
from xpu_fp4.moe import MXFP4Experts
from xpu_fp4.weight import Gate

RANKS = 2
N, K = 48, 320  # 5 blocks a rank: a quad that is not full, and one that one process would cut elsewhere
MODES: tuple[Mode, ...] = get_args(Mode)
DEFINED_MODES: dict[Mode, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "w4a4": reference.quantize,
    "w4a8": reference.mxint8_quantize,
}


def linear(mode: Mode, dtype: torch.dtype, *, seed: int = 0) -> tuple[MXFP4Linear, Tensor]:
    """Makes the same module and input in every process."""
    torch.manual_seed(seed)
    module = MXFP4Linear.from_linear(nn.Linear(K, N, dtype=dtype), mode=mode)
    spread = torch.exp2(torch.randint(-10, 10, (3, 5, K // 32)).float()).repeat_interleave(32, -1)
    return module, torch.randn(3, 5, K, dtype=dtype) * spread.to(dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = MXFP4Linear.from_linear(nn.Linear(64, 128))
        self.down = MXFP4Linear.from_linear(nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.silu(self.up(x)))
        return y


def zeroed(block: Block) -> Block:
    for parameter in block.parameters():
        parameter.data.zero_()
    return block


PLAN: dict[str, Any] = {"up": ColumnParallel(), "down": RowParallel()}


def column_gives_the_bits_of_one_process(mesh: DeviceMesh, tmp: Path) -> None:
    for mode in MODES:
        for dtype in DTYPES:
            module, x = linear(mode, dtype)
            expected = module(x)
            assert module.is_prepacked
            whole = parallelize_module(copy.deepcopy(module), mesh, ColumnParallel(gather_output=True))
            assert_same_bits(whole(x), expected)
            share = parallelize_module(copy.deepcopy(module), mesh, ColumnParallel())
            assert_same_bits(share(x), expected.chunk(RANKS, -1)[mesh.get_local_rank()].contiguous())


def row_adds_partial_sums_in_the_order_of_ranks(mesh: DeviceMesh, tmp: Path) -> None:
    differs = dict.fromkeys(DEFINED_MODES, False)
    for (mode, quantize), dtype in product(DEFINED_MODES.items(), DTYPES):
        module, x = linear(mode, dtype)
        assert module.bias is not None
        total = torch.zeros(15, N)
        w, w_scale = module.weight_packed.chunk(RANKS, 1), module.weight_scale.chunk(RANKS, 1)
        for rank, part in enumerate(x.flatten(0, 1).chunk(RANKS, 1)):
            p = reference.gemm(*quantize(part), w[rank].contiguous(), w_scale[rank].contiguous(), torch.float32)
            total = p if rank == 0 else total + p
        expected = (total + module.bias.float()).to(dtype).view(3, 5, N)
        sharded = parallelize_module(copy.deepcopy(module), mesh, RowParallel())
        assert_same_bits(sharded(x.chunk(RANKS, -1)[mesh.get_local_rank()]), expected)
        split = parallelize_module(copy.deepcopy(module), mesh, RowParallel(split_input=True))
        assert_same_bits(split(x), expected)
        differs[mode] |= not torch.equal(module(x), expected)
    assert all(differs.values()), "the data does not tell the order of additions"


def transformed_inputs_are_transformed_by_shares(mesh: DeviceMesh, tmp: Path) -> None:
    module = MXFP4Linear(K, N, hadamard=32, input_offset=True)
    assert module.input_offset is not None
    assert module.bias is not None
    module.input_offset.data.normal_(generator=seeded(1))
    module.bias.data.normal_(generator=seeded(2))
    stored = linear("w4a4", torch.float32)[0]
    module.weight_packed, module.weight_scale = stored.weight_packed, stored.weight_scale
    offsets = module.input_offset.chunk(RANKS)
    for (mode, quantize), dtype in product(DEFINED_MODES.items(), DTYPES):
        module.mode = mode
        _, x = linear(mode, dtype)
        column = parallelize_module(copy.deepcopy(module), mesh, ColumnParallel(gather_output=True))
        assert_same_bits(column(x), module(x))
        w, w_scale = module.weight_packed.chunk(RANKS, 1), module.weight_scale.chunk(RANKS, 1)
        parts = [reference.transform(p, 32, o) for p, o in zip(x.flatten(0, 1).chunk(RANKS, 1), offsets, strict=True)]
        first, second = (
            reference.gemm(*quantize(part), w[rank].contiguous(), w_scale[rank].contiguous(), torch.float32)
            for rank, part in enumerate(parts)
        )
        row = parallelize_module(copy.deepcopy(module), mesh, RowParallel(split_input=True))
        assert_same_bits(row(x), (first + second + module.bias).to(dtype).view(3, 5, N))
    assert isinstance(row.input_offset, DTensor)
    assert row.input_offset.placements == (Shard(0),)


def shards_of_whole_groups_keep_the_codes_of_one_process(mesh: DeviceMesh, tmp: Path) -> None:
    """x in MXINT8 keeps them at K / ranks = 256; at 160 a group that one process has lies on both sides of the cut."""
    for k, are_kept in ((512, True), (K, False)):
        x = torch.randn(4, k, generator=seeded(k)) * torch.exp2(torch.arange(k) // 32 % 7).float()
        codes, scale = reference.mxint8_quantize(x)
        module = MXFP4Linear.from_linear(nn.Linear(k, N, bias=False), mode="w4a8")
        weight = zip(module.weight_packed.chunk(RANKS, 1), module.weight_scale.chunk(RANKS, 1), strict=True)
        operands = zip(codes.chunk(RANKS, 1), scale.chunk(RANKS, 1), weight, strict=True)
        first, second = (
            reference.gemm(q, s, w.contiguous(), w_scale.contiguous(), torch.float32) for q, s, (w, w_scale) in operands
        )
        sharded = parallelize_module(module, mesh, RowParallel(split_input=True))
        assert torch.equal(sharded(x), first + second) == are_kept


def row_w4a16_is_near_one_process(mesh: DeviceMesh, tmp: Path) -> None:
    module, x = linear("w4a16", torch.float32)
    sharded = parallelize_module(copy.deepcopy(module), mesh, RowParallel(split_input=True))
    torch.testing.assert_close(sharded(x), module(x), rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def a_block_is_never_cut(mesh: DeviceMesh, tmp: Path) -> None:
    with pytest.raises(ValueError, match="in_features 96 on 2 ranks is 48 for each, expected a multiple of 32"):
        parallelize_module(MXFP4Linear(96, 64), mesh, RowParallel())
    with pytest.raises(ValueError, match="in_features 320 on 2 ranks is 160 for each, expected a multiple of 64: a block"):
        parallelize_module(MXFP4Linear(320, 64, hadamard=64), mesh, RowParallel())
    parallelize_module(MXFP4Linear(320, 64, hadamard=64), mesh, ColumnParallel())
    with pytest.raises(ValueError, match="out_features 33 does not divide by 2 ranks"):
        parallelize_module(MXFP4Linear(64, 33), mesh, ColumnParallel())
    with pytest.raises(TypeError, match="is a Linear, expected MXFP4Linear"):
        parallelize_module(nn.Linear(64, 64), mesh, ColumnParallel())
    grid = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    with pytest.raises(ValueError, match="the mesh has 2 dimensions, expected 1"):
        ColumnParallel()._apply(MXFP4Linear(64, 64), grid)
    parallelize_module(MXFP4Linear(64, 64), grid["tensor"], ColumnParallel())


def a_shard_holds_its_part_of_codes_and_scales(mesh: DeviceMesh, tmp: Path) -> None:
    whole = Block()
    block = Block()
    block(torch.zeros(1, 64))  # prepacks
    sharded = parallelize_module(block, mesh, PLAN)
    rank = mesh.get_local_rank()
    for name, dimension in (("up", 0), ("down", 1)):
        for part in ("weight_packed", "weight_scale"):
            parameter = sharded.get_parameter(f"{name}.{part}")
            assert isinstance(parameter, DTensor)
            expected = whole.get_parameter(f"{name}.{part}").chunk(RANKS, dimension)[rank]
            assert_same_bits(parameter.to_local(), expected.contiguous())
    before = {name: tensor.to_local().clone() for name, tensor in sharded.state_dict().items()}
    assert before.keys() == whole.state_dict().keys()
    sharded(torch.zeros(1, 64))
    assert all(sharded.get_submodule(name).is_prepacked for name in ("up", "down"))
    for name, tensor in sharded.state_dict().items():
        assert isinstance(tensor, DTensor)
        assert_same_bits(tensor.to_local(), before[name])


def a_sharded_state_dict_is_saved_and_loaded(mesh: DeviceMesh, tmp: Path) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    sharded = parallelize_module(Block(), mesh, PLAN)
    expected = sharded(x)
    save(sharded.state_dict(), checkpoint_id=tmp / "tensor_parallel")

    other = parallelize_module(zeroed(Block()), mesh, PLAN)
    assert not torch.equal(other(x), expected)
    state = other.state_dict()
    load(state, checkpoint_id=tmp / "tensor_parallel")
    other.load_state_dict(state)
    assert_same_bits(other(x), expected)
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert_same_bits(other(x), x)
    other.load_state_dict(sharded.state_dict())
    assert_same_bits(other(x), expected)
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()}, assign=True)
    assert_same_bits(other(x), x)

    alone = zeroed(Block())
    state = alone.state_dict()
    load(state, checkpoint_id=tmp / "tensor_parallel", no_dist=True)
    alone.load_state_dict(state)
    for name, parameter in Block().state_dict().items():
        assert_same_bits(alone.state_dict()[name], parameter)


def fsdp_gives_the_bits_of_one_process(mesh: DeviceMesh, tmp: Path) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2 + mesh.get_local_rank()))  # other data on each rank
    blocks = nn.Sequential(Block(), Block())
    expected = copy.deepcopy(blocks)(x)
    whole = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(blocks, mesh=mesh)
    for _ in range(2):
        assert_same_bits(blocks(x), expected)
        held = {name for block in blocks for name, parameter in block.named_parameters() if isinstance(parameter, DTensor)}
        assert held == {f"{layer}.{part}" for layer in ("up", "down") for part in ("weight_packed", "weight_scale", "bias")}
    linears = [module for module in blocks.modules() if isinstance(module, MXFP4Linear)]
    assert not any(module.is_prepacked for module in linears), "a rank would keep all of every weight"
    save(blocks.state_dict(), checkpoint_id=tmp / "fsdp")
    gathered = get_model_state_dict(blocks, options=StateDictOptions(full_state_dict=True))
    if mesh.get_local_rank() == 0:
        for name, tensor in whole.items():
            got = gathered[name]
            assert isinstance(got, Tensor)
            assert_same_bits(got, tensor)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in blocks.state_dict().items()}
    blocks.load_state_dict(zeros)
    assert_same_bits(blocks(x), x)
    state = blocks.state_dict()
    load(state, checkpoint_id=tmp / "fsdp")
    blocks.load_state_dict(state)
    assert_same_bits(blocks(x), expected)


def a_transformers_model_is_sharded_by_its_own_plan(mesh: DeviceMesh, tmp: Path) -> None:
    from checkpoint_files import IDS, llama_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = llama_config()
    config.num_key_value_heads, config.intermediate_size = 2, 128
    model = xpu_fp4.quantize_(LlamaForCausalLM(config).eval())
    with torch.inference_mode():
        expected = model(IDS).logits
    parallelize_module(model, mesh, tensor_parallel_plan(model))
    assert sum(isinstance(parameter, DTensor) for parameter in model.parameters()) == 2 * 7 * 2
    with torch.inference_mode():
        logits = model(IDS).logits
    both = [torch.empty_like(logits) for _ in range(RANKS)]
    dist.all_gather(both, logits)
    assert_same_bits(both[0], both[1])
    # Bits differ: sums are partial, and a flipped rounding of one activation's code travels on.
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="Block has no tensor parallel plan"):
        tensor_parallel_plan(Block())


def threads_share_a_shard(mesh: DeviceMesh, tmp: Path) -> None:
    module, x = linear("w4a4", torch.bfloat16)
    expected = module(x).chunk(RANKS, -1)[mesh.get_local_rank()].contiguous()
    sharded = parallelize_module(module, mesh, ColumnParallel())
    before = {name: tensor.to_local().clone() for name, tensor in sharded.state_dict().items()}

    def forward() -> None:
        assert_same_bits(sharded(x), expected)

    def save_and_undo() -> None:
        for name, tensor in sharded.state_dict().items():
            assert_same_bits(tensor.to_local(), before[name])
        module.unprepack_()  # the same module: it is sharded in place

    for _ in range(5):
        at_once(forward, forward, save_and_undo, save_and_undo)


EXPERTS = 6
KINDS: dict[str, dict[str, Any]] = {
    "silu_mul": {},
    "gpt-oss": {"gate": Gate("swiglu_oai", interleaved=True), "bias": True},
    "llama 4": {"router_on_input": True},
    "turned": {"hadamard": 32, "bias": True, "input_offset": True},
}


def experts_and_input(kind: str, mode: Mode, dtype: torch.dtype) -> tuple[MXFP4Experts, tuple[Tensor, Tensor, Tensor]]:
    """Makes the same in every process: tokens with several experts of one rank, of none, and with no expert."""
    generator = seeded(20)
    module = MXFP4Experts(EXPERTS, 96, 64, mode=mode, dtype=dtype, **KINDS[kind])
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        elif name.endswith("input_offset"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
        else:
            low, high = (0, 256) if name.endswith("blocks") else (118, 123)
            parameter.data = torch.randint(low, high, parameter.shape, generator=generator, dtype=torch.uint8)
    x = torch.randn(11, 96, generator=generator).to(dtype)
    ids = torch.rand(11, EXPERTS, generator=generator).argsort(-1)[:, :3]
    ids[0], ids[1, 1], ids[2, 0] = -1, EXPERTS, EXPERTS + 1
    return module, (x, ids, torch.rand(11, 3, generator=generator) * 2 - 1)


def experts_exchanged_or_by_columns_give_the_bits_of_one_process(mesh: DeviceMesh, tmp: Path) -> None:
    for mode, kind, dtype in product(MODES, KINDS, DTYPES):
        module, given = experts_and_input(kind, mode, dtype)
        expected = copy.deepcopy(module)(*given)
        for style in (ExpertParallel(combine="ordered"), ColumnParallelExperts()):
            sharded = parallelize_module(copy.deepcopy(module), mesh, style)
            for _ in range(2):
                assert_same_bits(sharded(*given), expected)


def experts_of_ranks_are_added_in_the_order_of_ranks(mesh: DeviceMesh, tmp: Path) -> None:
    differs = False
    here = EXPERTS // RANKS
    for mode, kind, dtype in product(MODES, KINDS, DTYPES):
        module, (x, ids, weights) = experts_and_input(kind, mode, dtype)
        shares = [module(x, torch.where(ids // here == rank, ids, -1), weights).float() for rank in range(RANKS)]
        sharded = parallelize_module(copy.deepcopy(module), mesh, ExpertParallel())
        assert_same_bits(sharded(x, ids, weights), (shares[0] + shares[1]).to(dtype))
        assert sharded.is_prepacked
        differs |= not torch.equal(sharded(x, ids, weights), module(x, ids, weights))
    assert differs, "the data does not tell the order of additions"


def sharded_experts_are_saved_and_loaded(mesh: DeviceMesh, tmp: Path) -> None:
    module, given = experts_and_input("gpt-oss", "w4a8", torch.bfloat16)
    whole = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, style, dim in (("rows", ExpertParallel(), 0), ("columns", ColumnParallelExperts(), 1)):
        sharded = parallelize_module(copy.deepcopy(module), mesh, style)
        expected = sharded(*given)
        for part, tensor in sharded.state_dict().items():
            assert isinstance(tensor, DTensor)
            assert_same_bits(tensor.to_local(), whole[part].chunk(RANKS, dim)[mesh.get_local_rank()].contiguous())
        save(sharded.state_dict(), checkpoint_id=tmp / name)
        other = parallelize_module(
            MXFP4Experts(EXPERTS, 96, 64, True, gate=module.gate, mode="w4a8", dtype=torch.bfloat16), mesh, style
        )
        assert not torch.equal(other(*given), expected)
        state = other.state_dict()
        load(state, checkpoint_id=tmp / name)
        other.load_state_dict(state)
        assert_same_bits(other(*given), expected)


def fsdp_gives_the_bits_of_one_process_for_experts(mesh: DeviceMesh, tmp: Path) -> None:
    for kind in KINDS:
        module, (x, ids, weights) = experts_and_input(kind, "w4a4", torch.bfloat16)
        x = x * (mesh.get_local_rank() + 1)  # other data on each rank
        expected = copy.deepcopy(module)(x, ids, weights)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for _ in range(2):
            assert_same_bits(module(x, ids, weights), expected)
            assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
        assert not module.is_prepacked, "a rank would keep all experts"


def a_model_has_an_expert_parallel_plan(mesh: DeviceMesh, tmp: Path) -> None:
    from checkpoint_files import IDS
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_key_value_heads=2)
    model = xpu_fp4.quantize_(Qwen3MoeForCausalLM(config).eval())
    with torch.inference_mode():
        expected = model(IDS).logits
        parallelize_module(model, mesh, expert_parallel_plan(model, combine="ordered"))
        assert_same_bits(model(IDS).logits, expected)
    assert sum(isinstance(parameter, DTensor) for parameter in model.parameters()) == 0, "all are prepacked by now"
    with pytest.raises(ValueError, match="Block has no MXFP4Experts"):
        expert_parallel_plan(Block())
    with pytest.raises(ValueError, match="3 experts do not divide by 2 ranks"):
        parallelize_module(MXFP4Experts(3, 32, 32), mesh, ExpertParallel())
    with pytest.raises(TypeError, match="is a Block, expected MXFP4Experts"):
        parallelize_module(Block(), mesh, ExpertParallel())


PROPERTIES: list[Callable[[DeviceMesh, Path], None]] = [
    column_gives_the_bits_of_one_process,
    row_adds_partial_sums_in_the_order_of_ranks,
    transformed_inputs_are_transformed_by_shares,
    shards_of_whole_groups_keep_the_codes_of_one_process,
    row_w4a16_is_near_one_process,
    a_block_is_never_cut,
    a_shard_holds_its_part_of_codes_and_scales,
    a_sharded_state_dict_is_saved_and_loaded,
    fsdp_gives_the_bits_of_one_process,
    threads_share_a_shard,
    a_transformers_model_is_sharded_by_its_own_plan,
    experts_exchanged_or_by_columns_give_the_bits_of_one_process,
    experts_of_ranks_are_added_in_the_order_of_ranks,
    sharded_experts_are_saved_and_loaded,
    fsdp_gives_the_bits_of_one_process_for_experts,
    a_model_has_an_expert_parallel_plan,
]


def run_all(rank: int, tmp: Path) -> None:
    """Every property in one process. What fails is written down, and the others go on."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp / 'rendezvous'}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for check in PROPERTIES:
        try:
            check(mesh, tmp)
        except Exception:
            (tmp / f"{check.__name__}.{rank}").write_text(traceback.format_exc())
        else:
            (tmp / f"{check.__name__}.{rank}").write_text("passed")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("ranks")
    spawn(run_all, (tmp,), nprocs=RANKS)
    return tmp


@pytest.mark.parametrize("check", [check.__name__ for check in PROPERTIES])
@pytest.mark.parametrize("rank", range(RANKS))
def test_two_processes(results: Path, check: str, rank: int) -> None:
    assert (results / f"{check}.{rank}").read_text() == "passed"
