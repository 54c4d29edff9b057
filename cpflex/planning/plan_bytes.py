"""A plan as bytes: a header in JSON, then raw arrays. To read one runs none of its content, unlike a pickle.

    b"cpflex plan\\n" · sha256 of all that follows · length of the header, uint64 · header · arrays, one after the other

In the header a tuple is a list, anything else than a number, a string, a bool or None is ``{"type": content}``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"cpflex plan\n"
DIGEST_SIZE = hashlib.sha256().digest_size
START = len(MAGIC) + DIGEST_SIZE


class WrongPlan(ValueError):
    """Bytes that are no plan, or a plan that `make_plan` would not make."""


def to_bytes(value: Any, version: str) -> bytes:
    """``value``: dataclasses, named tuples, tuples, dicts with string keys, tensors, arrays, numbers, strings."""
    arrays: list[bytes] = []
    tree = _encoded(value, arrays)
    header = json.dumps({"version": version, "sizes": [len(array) for array in arrays], "value": tree}).encode()
    rest = b"".join([len(header).to_bytes(8, "little"), header, *arrays])
    return MAGIC + hashlib.sha256(rest).digest() + rest


def from_bytes(data: bytes, types: Mapping[str, type], version: str) -> Any:
    """The value again; its dataclasses and named tuples are among ``types``, by name.

    Raises:
        WrongPlan: the bytes are not a plan, are damaged, or were written by another version.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise WrongPlan(f"these {len(data)} bytes are not a plan; pass what Plan.to_bytes gave")
    rest = memoryview(data)[START:]
    if hashlib.sha256(rest).digest() != data[len(MAGIC) : START]:
        raise WrongPlan("the plan is damaged: its bytes are not those that Plan.to_bytes gave")
    size = int.from_bytes(rest[:8], "little")
    header = json.loads(bytes(rest[8 : 8 + size]))
    if header["version"] != version:
        raise WrongPlan(f"the plan was made by {header['version']}; this is {version}, make it again")
    ends = np.cumsum([8 + size, *header["sizes"]]).tolist()
    arrays = [rest[begin:end] for begin, end in itertools.pairwise(ends)]
    return _decoded(header["value"], arrays, types)


def _encoded(value: Any, arrays: list[bytes]) -> Any:
    name = type(value).__name__
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        data = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        arrays.append(_bytes_of(data).tobytes() if data.numel() else b"")
        return {"Tensor": [len(arrays) - 1, str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, np.ndarray):
        arrays.append(value.tobytes())
        return {"ndarray": [len(arrays) - 1, value.dtype.str, list(value.shape)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}  # tables are made where they are needed
    if isinstance(value, dict):
        return {"dict": {key: _encoded(part, arrays) for key, part in value.items()}}
    if type(value) is tuple:
        return [_encoded(part, arrays) for part in value]
    if isinstance(value, tuple):
        return {name: [_encoded(part, arrays) for part in value]}
    state = value.__getstate__() if "__getstate__" in vars(type(value)) else None
    state = state or {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: {key: _encoded(part, arrays) for key, part in state.items()}}


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor of one element or more."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _decoded(tree: Any, arrays: list[memoryview], types: Mapping[str, type]) -> Any:
    if isinstance(tree, list):
        return tuple(_decoded(part, arrays, types) for part in tree)
    if not isinstance(tree, dict):
        return tree
    ((name, content),) = tree.items()
    match name:
        case "Tensor":
            index, dtype, shape = content
            made = torch.empty(shape, dtype=_dtype(dtype))
            if made.numel():
                _bytes_of(made)[:] = np.frombuffer(arrays[index], dtype=np.uint8)
            return made
        case "ndarray":
            index, dtype, shape = content
            return np.frombuffer(arrays[index], dtype=np.dtype(dtype)).reshape(shape).copy()
        case "dtype":
            return _dtype(content)
        case "device":
            return torch.device("cpu")
        case "dict":
            return {key: _decoded(part, arrays, types) for key, part in content.items()}
    kind = types[name]
    if isinstance(content, list):
        return kind(*(_decoded(part, arrays, types) for part in content))
    state = {key: _decoded(part, arrays, types) for key, part in content.items()}
    if not hasattr(kind, "__setstate__"):
        return kind(**state)
    made = object.__new__(kind)
    made.__setstate__(state)  # type: ignore[attr-defined]
    return made


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is not a dtype")
    return found
