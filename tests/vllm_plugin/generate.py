# SPDX-License-Identifier: Apache-2.0
"""vLLM engines, one after the other: reads their settings as JSON from the argument, prints what each answered as JSON."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch


@contextmanager
def in_float32() -> Iterator[None]:
    """vLLM lets Quark's and gpt-oss' checkpoints run in half precision only, where greedy tokens part ways."""
    from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

    with ExitStack() as patches:
        for config in (QuarkConfig, Mxfp4Config):
            patches.enter_context(mock.patch.object(config, "get_supported_act_dtypes", return_value=[torch.float32]))
        yield


@contextmanager
def drop_in() -> Iterator[None]:
    """vLLM's own XPU kernel on this CPU. It brings `vllm::xpu_mxfp4_quantize`, from a module that needs vllm_xpu_kernels."""
    import types

    import xpu_fp4  # before the stand-ins, which keep it from defining the ops

    for name, attribute in {
        "vllm_xpu_kernels": "",
        "vllm_xpu_kernels.flash_attn_interface": "flash_attn_varlen_func",
        "vllm_xpu_kernels.rotary": "apply_rotary_emb",
    }.items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], attribute or "__path__", None)
    import vllm._xpu_ops  # noqa: F401
    from vllm.model_executor.kernels.linear import XPUMxFp4LinearKernel, register_linear_kernel
    from vllm.platforms import PlatformEnum

    class XPUKernelOnCpu(XPUMxFp4LinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

    register_linear_kernel(XPUKernelOnCpu, PlatformEnum.CPU, "mxfp4")
    assert xpu_fp4
    yield


Preparation = Callable[[], AbstractContextManager[None]]
PREPARATIONS: dict[str | None, Preparation] = {None: nullcontext, "in_float32": in_float32, "drop_in": drop_in}


def count_ops(profile: torch.profiler.profile) -> dict[str, int]:
    """How often each op that can serve a linear or experts ran."""
    names = ("xpu_fp4::", "_xpu_C::", "_C::per_token")
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith(names)}


def answer(settings: dict[str, Any]) -> dict[str, Any]:
    """The tokens of one engine, which is gone afterwards, and the ops that it ran in this process."""
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in settings.pop("prompts")]
    sampling = SamplingParams(temperature=0, max_tokens=settings.pop("new_tokens"), ignore_eos=True, detokenize=False)
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    llm = LLM(skip_tokenizer_init=True, **(sizes | settings))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "ops": count_ops(profile)}


def main(engines: dict[str, dict[str, Any]]) -> None:
    for name, settings in engines.items():
        try:
            with PREPARATIONS[settings.pop("prepare")]():
                print(f"RESULT {name} {json.dumps(answer(settings))}", flush=True)
        except Exception:
            traceback.print_exc()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
elif __name__ == "__mp_main__" and "PREPARE_WORKERS" in os.environ:  # workers import this file again
    PREPARATIONS[os.environ["PREPARE_WORKERS"]]().__enter__()
