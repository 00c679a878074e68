# SPDX-License-Identifier: Apache-2.0
"""`make isa` refuses bad machine code: the parser and the budgets of tools/, on listings as Intel's compiler writes them."""

from collections.abc import Sequence
from pathlib import Path

import isa
import pytest
import tomllib
from gpu_programs import KERNELS, Architecture, Program, architectures
from isa_checks import FETCH as FETCHES
from isa_checks import Result, judge
from machine_code import Listing

BUDGETS = tomllib.loads(isa.BUDGETS.read_text())
BMG = next(item for item in architectures() if item.name == "bmg")
LARGE = BMG.program("gemm_large", "48x32 bf16")
MATRIX = "        dpas.8x8 (16|M0)         r10:d         r10:d             r30:b            r50.0:b           {Atomic}"
INT = "        add (16|M0)              r4.0<1>:d     r4.0<1;1,0>:d     r5.0<1;1,0>:d    //  ALU pipe: int; $7"
WIDE_FLOAT = "        mad (32|M0)              acc0.0<1>:f   r4.0<1;0>:f       r5.0<1;0>:f   r6.0<0>:f  //  ALU pipe: float; $8"
LOAD = "        load_block2d.ugm.d8.a64 (1|M0)  r25:8   [r120:1]           {I@2,$11}"
# Matrix, int and float instructions of the five paths, inside of every budget.
GOOD = ((48, 48, 96), (48, 48, 192), (48, 96, 192), (48, 96, 384), (48, 240, 768))


def listing(
    paths: Sequence[tuple[int, int, int]] = GOOD, kernel: str = "gemm_large", header: str = "", extra: str = ""
) -> Listing:
    """A loop of these paths, each behind a label of its own."""
    lines = [f"//.kernel __sycl_kernel_{kernel}", "//.thread_config numGRF=256", "//.instCount 1000", header, "_main:"]
    for i, (matrix, integer, floating) in enumerate(paths):
        lines += [f"_0_00{i}:", *[MATRIX] * matrix, *[INT] * integer, *[WIDE_FLOAT] * floating, LOAD]
    lines += [extra, "(W&f1.0) jmpi                               _0_000", "_0_end:", INT]
    return Listing("\n".join(lines), native=16)


def failures(found: Listing | None, program: Program = LARGE, device: str = "bmg") -> list[str]:
    results = judge(device, program, {found.kernel: found} if found else {}, BUDGETS)
    return [failure for result in results for failure in result.failures]


def test_the_parser_counts_paths_pipes_and_clocks() -> None:
    quad, *_ = listing().paths(least=48)
    assert (quad.matrix, quad.counts["int"], quad.counts["float"], quad.counts["send"]) == (48, 48, 96, 1)
    assert (quad.per_matrix("int"), quad.per_matrix("float")) == (1, 4)  # 32 lanes take two clocks
    assert listing().registers == 256
    assert listing().loop == (0, sum(map(sum, GOOD)) + len(GOOD) + 1)


def test_a_loop_may_end_in_either_target_of_a_goto() -> None:
    text = "\n".join(["_0_001:", MATRIX, "(~f1.0) goto.b (8|M0)      _0_002     _0_001", "_0_002:", INT])
    assert Listing(text, native=8).loop == (0, 2)


def test_a_good_kernel_passes() -> None:
    assert failures(listing()) == []


@pytest.mark.parametrize(
    ("level", "worse", "pipe"),
    [
        (0, (48, 73, 96), "int"),
        (0, (48, 48, 109), "float"),
        (1, (48, 77, 192), "int"),
        (2, (48, 126, 192), "int"),
        (4, (48, 240, 795), "float"),
    ],
)
def test_an_exceeded_budget_is_refused(level: int, worse: tuple[int, int, int], pipe: str) -> None:
    paths = [*GOOD[:level], worse, *GOOD[level + 1 :]]
    assert any(f"{pipe} per dpas is" in failure and "at most" in failure for failure in failures(listing(paths)))


def test_a_smaller_share_of_the_peak_is_refused() -> None:
    """Matrix instructions that the compiler has split count as work, not as product."""
    paths = ((53, 48, 96), *GOOD[1:])
    assert any("quad: % of the int8 peak, together is 90.6, at least 100" in failure for failure in failures(listing(paths)))


def test_a_loop_that_waits_for_its_loads_is_refused() -> None:
    """Each matrix instruction for a load of its own, which four threads cannot hide."""
    waiting = "\n".join([LOAD, MATRIX.replace("{Atomic}", "{Atomic,$11.dst}")])
    found = Listing(listing().text.replace(MATRIX, waiting), native=16)
    assert any("in which the matrix unit is busy is" in failure for failure in failures(found))


def test_spills_are_refused() -> None:
    assert failures(listing(header="//.spill size 64")) == ["bmg gemm_large (48x32 bf16): spills 64 bytes per thread"]


@pytest.mark.parametrize("opcode", ["INVALID", "illegal"])
def test_opcodes_that_the_device_lacks_are_refused(opcode: str) -> None:
    assert any("opcodes" in failure for failure in failures(listing(extra=f"        {opcode} (16|M0)   r1:d  r2:d")))


def test_a_built_in_that_stayed_a_call_is_refused() -> None:
    found = listing()
    found.unresolved = ("_Z36intel_sub_group_i8_i8_matrix_mad_k32",)
    assert any("unresolved built-ins: _Z36intel" in failure for failure in failures(found))


def test_a_missing_matrix_instruction_is_refused() -> None:
    without = listing([(0, integer, floating) for _, integer, floating in GOOD])
    assert failures(without) == ["bmg gemm_large (48x32 bf16): no matrix instruction"]


def test_a_missing_path_is_refused() -> None:
    assert any("4 paths" in failure for failure in failures(listing(GOOD[:4])))


def small_listing(
    block: int = 100, general: int = 200, matrix: int = 16, skipped: int = 50, goto: bool = False, fetches: int = 0
) -> Listing:
    """gemm_small's loop: a way around the quad, an exponent that decides between two levels, an addition that some skip."""
    conditional = "(f0.0)  goto (16|M0)   {0}   {0}" if goto else "(W&f0.0) jmpi   {0}"
    always = "goto (16|M0)   _0_join   {0}" if goto else "(W) jmpi   {0}"
    lines = ["//.kernel __sycl_kernel_gemm_small", "//.thread_config numGRF=128", "_main:"]
    lines += ["_0_head:", INT, conditional.format("_0_quad"), *[INT] * 10, always.format("_0_barrier")]
    lines += ["_0_quad:", INT, conditional.format("_0_block")]
    lines += [*[FETCH] * fetches, *[MATRIX] * matrix, *[WIDE_FLOAT] * general, always.format("_0_barrier")]
    lines += ["_0_block:", *[MATRIX] * matrix, *[WIDE_FLOAT] * block, "_0_join:"]
    lines += ["_0_barrier:", INT, conditional.format("_0_end"), *[INT] * skipped, "_0_end:", "(W&f1.0) jmpi   _0_head", INT]
    return Listing("\n".join(lines), native=16)


SMALL = BMG.program("gemm_small", "16 rows")
FETCH = "load.ugm.d8u32.a64.ca.ca (16|M0)  null:0 [r98:2]           {I@3,$8}"


@pytest.mark.parametrize("goto", [False, True])
def test_a_small_product_is_counted_along_its_longest_way_inside_of_the_window(goto: bool) -> None:
    found = small_listing(goto=goto)
    block, general = found.runs(least=4)
    assert found.longest_pass(block) == 2 + 2 + 16 + 100 + 2 + 50 + 1
    assert found.longest_pass(general) == 2 + 2 + 16 + 200 + 1 + 2 + 50 + 1
    assert failures(found, SMALL) == []


def test_a_small_product_that_memory_outruns_is_refused() -> None:
    assert failures(small_listing(block=950), SMALL) == [
        "bmg gemm_small (16 rows): instructions per 256 bytes of weights is 255.75, at most 239.832"
    ]
    assert failures(small_listing(matrix=61), SMALL) == [
        "bmg gemm_small (16 rows): matrix clocks per quad is 976.00, at most 959.326"
    ]
    assert failures(small_listing(matrix=3), SMALL) == [
        "bmg gemm_small (16 rows): 0 runs with 8 matrix instructions in the loop, expected 2"
    ]


def test_few_rows_that_ask_for_no_weights_ahead_are_refused() -> None:
    program = BMG.program("gemm_small", "8 rows, any K")
    assert failures(small_listing(fetches=2), program) == []
    xe3 = "send.ugm (16|M0)         null     r94  null:0  0x0            0x04080980           {$4}"
    xe3p = "sendg.ugm (16|M0)        null     r96:2  null:0  0x28A000 {I@3,$5}"
    for fetch in (xe3, xe3p):
        assert FETCHES.match(fetch)
        assert not FETCHES.match(fetch.replace("null:0", "r98:1"))  # a store
        assert not FETCHES.match(fetch.replace("null  ", "r15  ", 1))  # a load
    assert failures(small_listing(fetches=1), program) == [
        "bmg gemm_small (8 rows, any K): fetches of the next quad is 1.0, at least 2"
    ]


def test_a_missing_kernel_is_refused() -> None:
    assert failures(None) == ["bmg gemm_large (48x32 bf16): no machine code"]
    assert failures(listing(kernel="gemm_huge")) == ["bmg gemm_large (48x32 bf16): no machine code"]


def test_a_control_that_passes_stops_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_well(_: object, wanted: Sequence[tuple[str, Program]], __: object) -> list[Result]:
        return [Result(device, program, "gemm_large", listing()) for device, program in wanted]

    monkeypatch.setattr(isa, "run", all_well)
    with pytest.raises(SystemExit, match=r"a bad kernel passed: .* in 128 registers was to be refused for 'spills'"):
        isa.require_refusals(isa.Compiler(Path("ocloc"), Path("folder")), BUDGETS)


def test_every_source_is_compiled() -> None:
    compiled = {program.source.name for architecture in architectures() for program in architecture.programs}
    assert compiled >= {file.name for file in KERNELS.glob("*.cpp")}


@pytest.mark.parametrize("architecture", architectures(), ids=lambda item: item.name)
def test_every_product_is_compiled_for_every_device(architecture: Architecture) -> None:
    compiled = {program.source.stem for program in architecture.programs}
    assert compiled >= {"gemm_large", "gemm_small", "gemm_w4a16_matrix", "expand", "quantize", "transform", "dequantize"}
    assert ("gemm_bdpas" in compiled) == (architecture.name == "cri")
    assert architecture.name in BUDGETS["device"]


@pytest.mark.parametrize("architecture", architectures(), ids=lambda item: item.name)
def test_the_choice_of_a_kernel_weighs_the_devices_data(architecture: Architecture) -> None:
    device = BUDGETS["device"][architecture.name]
    assert architecture.costs.matrix == device["matrix_clocks"]
    assert architecture.costs.bytes == pytest.approx(device["bandwidth"] / (device["engines"] * device["ghz"]), rel=0.02)


def test_the_choice_of_a_kernel_is_held_to_what_was_counted() -> None:
    small = BMG.program("gemm_small", "8 rows")
    result = Result("bmg", small, "gemm_small", listing())
    result.paths["block"] = {"per 256 bytes": BMG.costs.small + 8 * BMG.costs.small_row}
    assert isa.stale_costs([result], [BMG]) == []
    result.paths["block"]["per 256 bytes"] *= 1.2
    (failure,) = isa.stale_costs([result], [BMG])
    assert failure.startswith("bmg gemm_small (8 rows): csrc/sycl/architectures.cpp states")


def test_the_choice_of_a_kernel_weighs_the_operand_that_the_device_takes() -> None:
    cri = next(item for item in architectures() if item.name == "cri")
    for label, taken in (("8 rows, W as int8", True), ("8 rows", False)):
        result = Result("cri", cri.program("gemm_small", label), "gemm_small", listing())
        result.paths["block"] = {"per 256 bytes": 1.0}
        assert bool(isa.stale_costs([result], [cri])) == taken
