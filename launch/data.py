"""Text as packed sequences: files become documents of bytes, documents are packed into sequences of one length."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

VOCAB_SIZE = 256
IGNORE = -100
"""The label of a token whose next token is nobody's to predict: the last one of a document."""

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
SNIFFED_BYTES = 8000


class Sample(NamedTuple):
    """One packed sequence of S tokens, whole: every rank reads the same one."""

    tokens: Tensor  # int64 [S], bytes
    labels: Tensor  # int64 [S], the next token of the same document, or IGNORE
    position_ids: Tensor  # int64 [S], counted from the start of the token's document
    cu_seqlens: Tensor  # int64 [num_docs + 1], where documents start, and S

    @property
    def num_labels(self) -> int:
        """Labels in the mean; at least 1."""
        return max(1, int((self.labels != IGNORE).sum()))


def pack(documents: Sequence[bytes]) -> Sample:
    """Documents, none empty, one after the other. Labels are shifted here, while the next token is still at hand.

    >>> pack([b"ab", b"c"]).labels.tolist()
    [98, -100, -100]
    """
    lengths = torch.tensor([len(document) for document in documents])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).long()
    labels = tokens.roll(-1)
    labels[cu_seqlens[1:] - 1] = IGNORE
    position_ids = torch.arange(len(tokens)) - cu_seqlens[:-1].repeat_interleave(lengths)
    return Sample(tokens, labels, position_ids, cu_seqlens)


class Corpus:
    """An endless list of packed sequences; ``corpus[i]`` depends on nothing drawn before, so i is enough to resume.

    An epoch takes one document from every file, in a new order: the file itself or, where that is longer than
    ``longest``, one piece of it, drawn anew. The documents are laid end to end and cut every ``seq_len`` tokens; what
    is cut off goes on as a document of its own in the next sequence. Tokens after the last full sequence are left out.

    Args:
        files: none empty.
        seq_len: tokens of a sequence.
        seed: of the order and the pieces.
        longest: tokens of a document at most; ``seq_len`` if None.
    """

    def __init__(self, files: Sequence[Path], seq_len: int, seed: int, longest: int | None = None) -> None:
        self.files = list(files)
        self.seq_len = seq_len
        self.seed = seed
        self.file_lens = np.array([file.stat().st_size for file in self.files], dtype=np.int64)
        self.document_lens = np.minimum(self.file_lens, longest or seq_len)
        self.sequences_per_epoch = int(self.document_lens.sum()) // seq_len
        if self.sequences_per_epoch == 0:
            raise ValueError(
                f"one sequence needs {seq_len} tokens; {len(self.files)} text files give {self.document_lens.sum()} - "
                "pass a larger --data or a smaller --seq-len"
            )

    @property
    def fingerprint(self) -> str:
        """Equal iff the sequences are, as long as files of the same name and size are the same."""
        names = [file.name for file in self.files]
        facts = (names, self.file_lens.tolist(), self.document_lens.tolist(), self.seq_len, self.seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> Sample:
        epoch, place = divmod(index, self.sequences_per_epoch)
        return pack([read(*where) for where in self.documents(epoch, place)])

    def documents(self, epoch: int, place: int) -> list[tuple[Path, int, int]]:
        """(file, first byte, bytes) of the documents, and parts of documents, in one sequence of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.files))
        piece = random.integers(-(-self.file_lens // self.document_lens))
        firsts = np.minimum(piece * self.document_lens, self.file_lens - self.document_lens)[order]
        stops = self.document_lens[order].cumsum()
        starts = stops - self.document_lens[order]
        begin, end = place * self.seq_len, (place + 1) * self.seq_len
        held = range(np.searchsorted(stops, begin, side="right"), np.searchsorted(starts, end))
        return [
            (
                self.files[order[i]],
                int(firsts[i] + max(0, begin - starts[i])),
                int(min(end, stops[i]) - max(begin, starts[i])),
            )
            for i in held
        ]


def text_files(directory: Path) -> list[Path]:
    """Files of text below a directory, by path: not hidden, not empty, no NUL in their first bytes (git's rule)."""
    files = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file() and _is_text(file))


def _is_text(file: Path) -> bool:
    head = read(file, 0, SNIFFED_BYTES)
    return bool(head) and b"\0" not in head


def read(file: Path, start: int, num_bytes: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(num_bytes)
