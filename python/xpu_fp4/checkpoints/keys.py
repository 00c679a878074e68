# SPDX-License-Identifier: Apache-2.0
"""The keys of a quantization_config beside those that are read.

Some change what a layer computes: ignored, the model would load and compute noise, so they are refused by name. Some are known
to change nothing. Any other is left aside and named, once for each checkpoint.
"""

from collections.abc import Collection
from typing import Any

from .errors import CheckpointError

_REMEDY = "use a checkpoint without it, for example one that `xpu-fp4 quantize` makes from the original model"


def is_set(value: Any) -> bool:
    """Whether a key's value says anything: not null, false or empty."""
    return value not in (None, False, "", [], {})


def require_object(value: Any, where: str) -> dict[str, Any]:
    """The value, or an empty object for null. Raises CheckpointError for anything else that is no object."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {value!r}, expected an object")
    return value


def unknown_keys(found: dict[str, Any], known: Collection[str], prefix: str = "") -> list[str]:
    """A note for each key that is set and not known; prefix is where the keys stand."""
    return [f"{prefix}{key} (unknown)" for key, value in found.items() if key not in known and is_set(value)]


def refusal(where: str, does: str) -> CheckpointError:
    """The error for a key that does something to a layer's result that is not done here."""
    return CheckpointError(f"{where} {does}, which xpu_fp4 cannot do, and the model would compute noise without it: {_REMEDY}")
