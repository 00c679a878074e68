# SPDX-License-Identifier: Apache-2.0
"""The examples in the README run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from xpu_fp4 import backends

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[-1])
def test_readme_example_runs(code: str) -> None:
    if '"sycl"' in code and not backends()["sycl"].available:
        pytest.skip(backends()["sycl"].detail)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_has_examples() -> None:
    assert len(EXAMPLES) == 2
