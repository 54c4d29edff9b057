"""Toy tasks whose answers can be checked: a prompt, the one right answer, and how right a completion is."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data import read

END = b"\n"
"""Ends prompts and answers."""

READ_BYTES = 1 << 16


class Question(NamedTuple):
    prompt: bytes
    answer: bytes


Draw = Callable[[random.Random, Sequence[bytes]], Question]
"""A question, from a generator and words."""


def copy(draw: random.Random, words: Sequence[bytes]) -> Question:
    word = draw.choice(words)
    return Question(b"copy " + word + END, word + END)


def reverse(draw: random.Random, words: Sequence[bytes]) -> Question:
    word = draw.choice(words)
    return Question(b"reverse " + word + END, word[::-1] + END)


def add(draw: random.Random, words: Sequence[bytes]) -> Question:
    """Two numbers below 10."""
    a, b = draw.randrange(10), draw.randrange(10)
    return Question(f"add {a} {b}\n".encode(), f"{a + b}\n".encode())


TASKS: dict[str, Draw] = {"copy": copy, "reverse": reverse, "add": add}

LONGEST = 6
"""Bytes of an answer at most, its end included."""


def reward(completion: bytes, answer: bytes) -> float:
    """The part of the bytes that are right, each at its place: 1 for the answer and nothing else, 0 to 1."""
    right = sum(a == b for a, b in zip(completion, answer, strict=False))
    return right / max(len(completion), len(answer))


def words_of(files: Sequence[Path]) -> list[bytes]:
    """Words of 3 to 5 lowercase letters in the first bytes of files, in order, each once."""
    found: set[bytes] = set()
    for file in files:
        found.update(re.findall(rb"(?<![A-Za-z])[a-z]{3,5}(?![A-Za-z])", read(file, 0, READ_BYTES)))
    if not found:
        raise ValueError(f"there must be words of 3 to 5 lowercase letters in --data; {len(files)} files have none")
    return sorted(found)
