# SPDX-License-Identifier: Apache-2.0
"""GGUF files of llama.cpp whose matrices are MXFP4, converted into model directories."""

from .convert import convert_gguf

__all__ = ["convert_gguf"]
