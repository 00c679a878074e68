# SPDX-License-Identifier: Apache-2.0
"""Contenders from other packages, each of them optional: torchao's MX linear and ggml's MXFP4."""

import importlib.metadata
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import linear

from .._library import BLOCK
from . import ggml
from .contenders import Contender, Unavailable
from .measure import Job, Run
from .operands import Problem


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao warns of its GPU libraries when it is imported."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _torchao(problem: Problem, *, activations: torch.dtype) -> Run:
    try:
        with _quiet():
            from torchao.prototype.mx_formats.config import ScaleCalculationMode
            from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    except ImportError as error:
        raise Unavailable(f"torchao cannot be imported: {error}") from error
    even = ScaleCalculationMode.EVEN
    quantize_x = QuantizeTensorToMXKwargs(elem_dtype=activations, block_size=BLOCK, scaling_mode=even)
    # Its products take both operands in one format. One copy: beside its time, that of fetching the weight is nothing.
    weight = MXTensor.to_mx(problem.weights.bf16, activations, BLOCK, even, act_quant_kwargs=quantize_x)
    x = problem.x
    return lambda: linear(x, weight)


def _torchao_contender(name: str, about: str, dtype: torch.dtype) -> Contender:
    setup = partial(_torchao, activations=dtype)
    return Contender(name, "peer", f"torchao MXTensor F.linear, {about}, emulated", setup, device="cpu")


def _ggml(problem: Problem, *, repacked: bool) -> Job:
    try:
        library = ggml.instance()
        layouts = library.repacking if repacked else [library.plain]
        weights = problem.weights
        blocks = ggml.to_blocks(weights.codes, weights.scale)
        form = "ggml repacked" if repacked else "ggml"
        copies = weights.copies(form, blocks.nbytes, lambda: ggml.Weight(library, blocks, layouts))
    except (ImportError, ValueError) as error:
        raise Unavailable(str(error)) from error
    library.use_threads(problem.case.threads)
    products = ggml.Products(library, problem.x.float(), copies, problem.case.n)
    index = itertools.cycle(range(len(copies))).__next__
    return Job(lambda: products.run(index()), library.rest)


def _ggml_contender(name: str, about: str, repacked: bool) -> Contender:
    return Contender(name, "peer", f"ggml_mul_mat: x as Q8_0 inside, {about}", partial(_ggml, repacked=repacked), device="cpu")


PEERS = (
    _torchao_contender("torchao-mx", "W4A4", torch.float4_e2m1fn_x2),
    _torchao_contender("torchao-mxfp8", "MXFP8 weight and activations", torch.float8_e4m3fn),
    _ggml_contender("ggml-mxfp4", "MXFP4 weight as in a GGUF file", False),
    _ggml_contender("ggml-mxfp4-repacked", "MXFP4 weight repacked, as llama.cpp loads it where it can", True),
)


def versions() -> dict[str, str]:
    """Versions of the libraries behind the peers, and what ggml was compiled for."""
    try:
        found = {"torchao": importlib.metadata.version("torchao")}
    except importlib.metadata.PackageNotFoundError:
        found = {"torchao": "not installed"}
    try:
        library = ggml.instance()
        found["ggml"] = f"{library.version}, compiled for {', '.join(library.instruction_sets) or 'no vectors'}"
    except ImportError:
        found["ggml"] = "not installed"
    return found
