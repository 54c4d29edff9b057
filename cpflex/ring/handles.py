"""Handles: a 0-d CPU tensor that stands for a Python object, so that the object can cross an operator of torch.

For `torch.compile` a handle is a tensor like any other: another plan is another value, not another program. The object
lives as long as its tensor does, saved for backward included.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(target: Any) -> Tensor:
    """A new handle, int64 []; it keeps ``target`` alive."""
    number = next(_numbers)
    with torch.inference_mode(False):  # it is saved for backward
        handle = torch.tensor(number, dtype=torch.int64)
    handle.cpflex_target = target  # type: ignore[attr-defined]
    _objects[number] = target
    return handle


def resolve(handle: Tensor) -> Any:
    """The object of a handle.

    Raises:
        RuntimeError: the object is gone: its plan was dropped while a copy of the handle lived on.
    """
    target = _objects.get(int(handle))
    if target is None:
        raise RuntimeError("the plan of this attention call no longer exists; keep the plan until backward has run")
    return target
