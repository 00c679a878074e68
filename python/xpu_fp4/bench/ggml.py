# SPDX-License-Identifier: Apache-2.0
"""ggml's MXFP4 product over ctypes, as llama.cpp runs it: weights in a layout that llama.cpp loads, one thread pool."""

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._library import BLOCK

DIR_VARIABLE = "XPU_FP4_BENCH_GGML_DIR"
MXFP4, F32, I32 = 39, 0, 26  # enum ggml_type
INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8")


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_BASE: dict[str, tuple[Any, ...]] = {  # function: result, arguments
    "ggml_version": (c_char_p,),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_new_tensor_3d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_mul_mat_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_threadpool_params_init": (None, c_void_p, c_int),
    "ggml_gallocr_new": (c_void_p, c_void_p),
    "ggml_gallocr_alloc_graph": (c_bool, c_void_p, c_void_p),
    "ggml_gallocr_free": (None, c_void_p),
    "ggml_backend_get_default_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
}
_CPU: dict[str, tuple[Any, ...]] = {
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_threadpool_new": (c_void_p, c_void_p),
    "ggml_threadpool_pause": (None, c_void_p),
}


def _load(library: Path, functions: dict[str, tuple[Any, ...]]) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    for name, (result, *arguments) in functions.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def folder() -> Path:
    """Says where libggml-base.so and libggml-cpu.so are: the environment's folder, or a package's. Raises ImportError."""
    named = os.environ.get(DIR_VARIABLE)
    if named:
        if not (Path(named) / "libggml-cpu.so").exists():
            raise ImportError(f"{DIR_VARIABLE} is {named!r}, where there is no libggml-cpu.so")
        return Path(named)
    for package in ("libggml", "llama_cpp"):  # of libggml-python, of llama-cpp-python
        found = importlib.util.find_spec(package)
        for root in (found.submodule_search_locations or ()) if found else ():
            for library in sorted(Path(root).glob("lib*/libggml-cpu.so")):
                return library.parent
    raise ImportError(f"neither libggml-python nor llama-cpp-python is installed, and {DIR_VARIABLE} is not set")


class Ggml:
    """ggml's CPU backend. Raises ImportError where its libraries cannot be loaded or lack a function."""

    def __init__(self) -> None:
        try:
            self.base = _load(folder() / "libggml-base.so", _BASE)
            self.cpu = _load(folder() / "libggml-cpu.so", _CPU)
        except (OSError, AttributeError) as error:
            raise ImportError(f"ggml does not fit: {error}") from error
        self._log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, user: None)
        self.base.ggml_log_set(self._log, None)  # it tells of every weight
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.device = self.base.ggml_backend_get_device(self.backend)
        self._pools: dict[int, int] = {}

    @property
    def version(self) -> str:
        found: bytes = self.base.ggml_version()
        return found.decode()

    @property
    def instruction_sets(self) -> list[str]:
        """Returns what it was compiled for."""
        return [name for name in INSTRUCTION_SETS if getattr(self.cpu, f"ggml_cpu_has_{name}", int)()]

    def use_threads(self, threads: int) -> None:
        if threads not in self._pools:
            parameters = ctypes.create_string_buffer(4096)  # larger than the structure, in any version
            self.base.ggml_threadpool_params_init(parameters, threads)
            self._pools[threads] = self.cpu.ggml_threadpool_new(parameters)
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.cpu.ggml_backend_cpu_set_threadpool(self.backend, self._pools[threads])

    def rest(self) -> None:
        """Stops the threads' polling; the next product wakes them."""
        for pool in self._pools.values():
            self.cpu.ggml_threadpool_pause(pool)

    def context(self, tensors: int, graphs: int = 0) -> int:
        """A context with room for descriptions alone."""
        size = tensors * self.base.ggml_tensor_overhead() + graphs * self.base.ggml_graph_overhead() + 1024
        context: int = self.base.ggml_init(_InitParams(size, None, True))
        return context

    @property
    def plain(self) -> int:
        """The buffer type of rows of blocks, as a file holds them."""
        found: int = self.base.ggml_backend_get_default_buffer_type(self.backend)
        return found

    @property
    def repacking(self) -> list[int]:
        """The buffer types that llama.cpp tries first for weights."""
        registry = self.base.ggml_backend_dev_backend_reg(self.device)
        address = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        types: list[int] = []
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
            while extra and extra[len(types)]:
                types.append(extra[len(types)])
        return types


@lru_cache(maxsize=1)
def instance() -> Ggml:
    return Ggml()


def to_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes uint8 [n, k/2] and scale bytes [n, k/32] -> [n, k/32, 17]: scale, then elements j and j + 16 in a byte."""
    elements = torch.stack([codes & 15, codes >> 4], -1).view(codes.shape[0], -1, BLOCK)
    pairs = elements[..., : BLOCK // 2] | (elements[..., BLOCK // 2 :] << 4)
    return torch.cat([scale[..., None], pairs], -1).contiguous()


class Weight:
    """A weight [n, k], or one for each expert [E, n, k], in the first of the layouts in which ggml multiplies it. Raises
    ValueError if there is none."""

    def __init__(self, ggml: Ggml, blocks: Tensor, layouts: list[int]) -> None:
        *experts, n, k = *blocks.shape[:-2], blocks.shape[-2] * BLOCK
        for buffer_type in layouts:
            context = ggml.context(4)
            if experts:
                self.tensor = ggml.base.ggml_new_tensor_3d(context, MXFP4, k, n, *experts)
            else:
                self.tensor = ggml.base.ggml_new_tensor_2d(context, MXFP4, k, n)
            buffer = ggml.base.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            if experts:
                row = ggml.base.ggml_new_tensor_3d(context, F32, k, 1, 1)
                ids = ggml.base.ggml_new_tensor_2d(context, I32, 1, 1)
                product = ggml.base.ggml_mul_mat_id(context, self.tensor, row, ids)
            else:
                product = ggml.base.ggml_mul_mat(context, self.tensor, ggml.base.ggml_new_tensor_2d(context, F32, k, 1))
            weakref.finalize(self, ggml.base.ggml_free, context)
            weakref.finalize(self, ggml.base.ggml_backend_buffer_free, buffer)
            if buffer and ggml.base.ggml_backend_dev_supports_op(ggml.device, product):
                break
        else:
            raise ValueError(f"ggml has no such layout for MXFP4 {[*experts, n, k]}")
        ggml.base.ggml_backend_tensor_set(self.tensor, blocks.data_ptr(), 0, blocks.nbytes)


class Products:
    """x [m, k] float32 times each of the weights, one result in memory at a time; or x [T, 1 or top_k, k] times weights of
    experts, for each of them the ids int32 [T, top_k]."""

    def __init__(self, ggml: Ggml, x: Tensor, weights: list[Weight], n: int, ids: Sequence[Tensor] = ()) -> None:
        base = ggml.base
        self.ggml, self.shape = ggml, (*(ids[0].shape if ids else x.shape[:-1]), n)
        self.weights = weights  # kept alive
        inputs, results = ggml.context(1 + len(ids)), ggml.context(len(weights), len(weights))
        new = base.ggml_new_tensor_3d if ids else base.ggml_new_tensor_2d
        x_tensor = new(inputs, F32, *reversed(x.shape))
        id_tensors = [base.ggml_new_tensor_2d(inputs, I32, *reversed(of.shape)) for of in ids]
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(inputs, ggml.plain)
        for tensor, values in ((x_tensor, x), *zip(id_tensors, ids, strict=True)):
            base.ggml_backend_tensor_set(tensor, values.contiguous().data_ptr(), 0, values.nbytes)
        allocator = base.ggml_gallocr_new(ggml.plain)
        for free, what in (
            (base.ggml_gallocr_free, allocator),
            (base.ggml_backend_buffer_free, buffer),
            (base.ggml_free, results),
            (base.ggml_free, inputs),
        ):
            weakref.finalize(self, free, what)
        self.graphs, self.outputs = [], []
        for i, weight in enumerate(weights):
            if ids:
                output = base.ggml_mul_mat_id(results, weight.tensor, x_tensor, id_tensors[i])
            else:
                output = base.ggml_mul_mat(results, weight.tensor, x_tensor)
            graph = base.ggml_new_graph(results)
            base.ggml_build_forward_expand(graph, output)
            base.ggml_gallocr_alloc_graph(allocator, graph)
            self.graphs.append(graph)
            self.outputs.append(output)

    def run(self, index: int) -> None:
        status = self.ggml.base.ggml_backend_graph_compute(self.ggml.backend, self.graphs[index])
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute gives {status}")

    def result(self, index: int) -> Tensor:
        """Returns what the last run of this weight gave, float32."""
        y = torch.empty(self.shape)
        self.ggml.base.ggml_backend_tensor_get(self.outputs[index], y.data_ptr(), 0, y.nbytes)
        return y
