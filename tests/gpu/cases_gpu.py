"""The attentions that are checked on a GPU: sizes, masks, score mods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One attention; `str` of it is a test id."""

    mask: str
    score: str = "none"
    seq_len: int = 4096
    dims: tuple[int, int] = (128, 128)
    heads: tuple[int, int] = (8, 2)
    batch: int = 2
    dtype: str = "bf16"

    def __str__(self) -> str:
        sizes = f"S{self.seq_len}-D{self.dims[0]}-Dv{self.dims[1]}-H{self.heads[0]}-{self.heads[1]}-B{self.batch}"
        return f"{self.mask}-{self.score}-{sizes}-{self.dtype}"

    def mask_mod(self, device: str) -> MaskFn:
        """Also in words that the oracle can run on the GPU."""
        ids = (torch.arange(self.seq_len, device=device) * 7 // self.seq_len + 1) // 2  # documents of uneven lengths
        windows = torch.arange(1, self.heads[0] + 1, device=device) * 100
        masks: dict[str, MaskFn] = {
            "full": lambda b, h, q, k: (q >= 0) & (k >= 0),
            "causal": lambda b, h, q, k: q >= k,
            "window": lambda b, h, q, k: (q >= k) & (q - k < 1024),
            "doc_causal": lambda b, h, q, k: (q >= k) & (ids[q] == ids[k]),
            "doc_window": lambda b, h, q, k: (q >= k) & (q - k < 300) & (ids[q] == ids[k]),
            "prefix_lm": lambda b, h, q, k: (q >= k) | (k < self.seq_len // 3),
            "dilated": lambda b, h, q, k: (q >= k) & ((q - k) % 5 == 0),
            "window_per_head": lambda b, h, q, k: (q >= k) & (q - k < windows[h]),
            "some_see_nothing": lambda b, h, q, k: (q >= k) & (q % 3 != 0),
        }
        return masks[self.mask]

    def score_mod(self, device: str) -> Callable | None:
        slopes = 2.0 ** -torch.arange(1.0, self.heads[0] + 1, device=device)
        bias = torch.linspace(-1, 1, 129, device=device)
        mods = {
            "none": None,
            "softcap": lambda s, b, h, q, k: 20.0 * torch.tanh(s / 20.0),
            "alibi": lambda s, b, h, q, k: s - slopes[h] * (q - k).abs(),
            "relative_bias": lambda s, b, h, q, k: s + bias[(q - k).clamp(-64, 64) + 64],
        }
        return mods[self.score]


CASES = [
    *(Case(mask, dtype=dtype) for mask in ("full", "causal", "doc_causal") for dtype in ("bf16", "fp16")),
    *(Case(mask, dims=(64, 64)) for mask in ("window", "doc_window", "prefix_lm", "dilated", "window_per_head")),
    *(Case("causal", score, dims=(dim, dim)) for score in ("softcap", "alibi", "relative_bias") for dim in (64, 128)),
    *(Case("doc_causal", "alibi", dims=dims) for dims in ((16, 16), (80, 80), (96, 96), (192, 128), (256, 256))),
    Case("some_see_nothing", "softcap"),
    Case("causal", heads=(7, 7), batch=1, seq_len=5001),
    Case("causal", heads=(16, 1), batch=1),
    Case("causal", dims=(24, 40), seq_len=1000),
    *(Case("causal", dims=(dim, dim), seq_len=1024, dtype="fp32") for dim in (64, 128)),
    *(Case(mask, seq_len=32768, batch=2, heads=(16, 4)) for mask in ("full", "causal", "doc_window")),
    Case("causal", "softcap", seq_len=32768, batch=1, heads=(32, 8), dims=(64, 64), dtype="fp16"),
]
