# SPDX-License-Identifier: Apache-2.0
"""The models of tools/ for GPUs: a cache's traffic and an engine's waits, on cases that can be counted by hand."""

import pytest
from cache_model import Walk, traffic
from engine_model import PASSES, Engine, Latencies, matrix_busy
from machine_code import Instruction

LATENCIES = Latencies(alu=10, accumulator=6, matrix=24, load=100, sources=20)
MATRIX = "dpas.8x8 (16|M0) r10:d r10:d r30:b r50.0:b {Compacted,$3}"
MAD = "mad (16|M0) acc0.0<1>:f r4.0<0;0>:f r95.0<1;0>:f r103.0<0>:f {$3.dst}"
USE = "mad (16|M0) r114.0<1>:f r114.0<1;0>:f acc0.0<1;0>:f r2.0<1>:f"


def clocks(lines: list[tuple[str, str | None]], threads: int = 1) -> float:
    """Of a pass through the loop."""
    instructions = tuple(Instruction(text, pipe) for text, pipe in lines)
    matrix = sum(instruction.kind == "matrix" for instruction in instructions)
    engine = Engine(matrix_clocks=8, lanes=16, threads=threads, message_clocks=4, register_clocks=1)
    return threads * matrix * engine.matrix_clocks / matrix_busy(instructions, engine, LATENCIES)


def test_matrix_instructions_of_a_chain_follow_one_another() -> None:
    assert clocks([(MATRIX, None)] * 4) == 32


def test_what_reads_a_chain_waits_until_it_has_left_the_unit() -> None:
    # The mad is issued 8 + 24 clocks after the matrix instruction; the next pass begins a clock later, the last ends with it.
    assert clocks([(MATRIX, None), (MAD, "float")]) == pytest.approx(33)


def test_an_accumulator_is_read_when_it_is_there() -> None:
    assert clocks([(MATRIX, None), (MAD, "float"), (USE, "float")]) == pytest.approx(33 + LATENCIES.accumulator)


def test_a_second_thread_fills_the_first_ones_waits() -> None:
    assert clocks([(MATRIX, None), (MAD, "float")], threads=2) < 1.3 * 33


def test_a_load_is_awaited_with_all_of_its_registers() -> None:
    load = "load_block2d.ugm.d8.a64 (1|M0) r87:16 [r3:1] {$5}"
    wait = "sync.allwr ($5,$7)"
    assert clocks([(load, None), (wait, None), (MATRIX, None)]) == pytest.approx(16 + 100 + 1 + 1, abs=8 / PASSES)


def test_distances_count_within_their_pipe() -> None:
    integer, float = "add (16|M0) r1.0<1>:d r2.0<1;1,0>:d r3.0<1;1,0>:d", "mul (16|M0) r4.0<1>:f r1.0<1;1,0>:f r1.0<1;1,0>:f"
    after = [(f"{float} {{I@2}}", "float")]
    at_once = clocks([(MATRIX, None), (integer, "int"), (integer, "int"), *after])
    assert at_once == pytest.approx(1 + LATENCIES.alu + 1, abs=1)
    assert clocks([(MATRIX, None), (integer, "int"), (float, "float"), (integer, "int"), *after]) == pytest.approx(at_once)


@pytest.mark.parametrize("panel", [1, 3, 4])
def test_a_walk_visits_every_tile_once(panel: int) -> None:
    tiles = list(Walk(256, 128, panel).tiles(5 * 256 + 1, 3 * 128))
    assert sorted(tiles) == [(row, column) for row in range(6) for column in range(3)]
    height = {1: 1, 3: 3, 4: 3}[panel]  # six rows in panels of at most four: two of three
    assert tiles[:height] == [(row, 0) for row in range(height)]


def test_a_cache_that_holds_everything_fetches_it_once() -> None:
    assert traffic(1024, 512, 2048, Walk(256, 256, 1), 4, 1e9, 1, 2) == 1024 * 2048 + 2 * 512 * 2048 + 2 * 1024 * 512


def test_a_cache_that_holds_nothing_fetches_an_operand_for_each_tile() -> None:
    # Of a row of four tiles that step through K together, all but the first find their rows.
    assert traffic(1024, 1024, 512, Walk(256, 256, 1), 1, 0, 1, 1, 0) == 16 * 2 * 256 * 512
    assert traffic(1024, 1024, 512, Walk(256, 256, 1), 4, 256 * 512 * 5, 1, 1, 0) < 16 * 2 * 256 * 512


def test_panels_read_less_than_rows_where_the_cache_is_small() -> None:
    """Battlemage: 20 cores, 18 MB, 4096 x 4096 x 4096."""
    by_rows, panels = (traffic(4096, 4096, 4096, Walk(256, 256, panel), 20, 18e6, 1.03, 1.03) for panel in (1, 4))
    assert panels < 0.45 * by_rows
