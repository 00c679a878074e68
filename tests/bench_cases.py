# SPDX-License-Identifier: Apache-2.0
"""Small cases of the benchmark for its tests."""

import torch
from xpu_fp4.bench.cases import Case, Experts

CASE = Case("square", 96, 128, "gaussian", 1, 3)
LAYER = Case("gpt-oss-20b", 96, 160, "gaussian", 1, 5, (), Experts(6, 2, "swiglu_oai", "skewed"))
CPU = torch.device("cpu")
