# SPDX-License-Identifier: Apache-2.0
"""A random gpt-oss is quantized, loaded and generates within the memory that is stated, in which bfloat16 would not fit."""

from pathlib import Path

import gpt_oss_memory
import pytest
from gpt_oss_memory import Size

SIZE = Size(layers=6, hidden=512, experts=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss") / "source"
    gpt_oss_memory.write_random(folder, SIZE)
    return folder


def test_each_step_takes_no_more_memory_than_is_stated(source: Path) -> None:
    whole = SIZE.layers * SIZE.experts_bytes
    for step, bound in gpt_oss_memory.bounds(SIZE).items():
        assert bound < whole, "the model in bfloat16 would fit, so nothing is tested"
        taken = gpt_oss_memory.measure(step, source, source.with_name("out"))
        assert SIZE.experts_bytes // 4 < taken <= bound, f"{step} takes {taken} bytes, at most {bound} are stated"
