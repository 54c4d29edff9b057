"""What is said of numbers that a GPU computed. Where a GPU is only pretended (tests/pretend), shapes are compared instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases_gpu import Case
from dense_head import dense_head
from torch import Tensor


def exact(case: Case, tensors: list[Tensor], precision: torch.dtype) -> dict[str, Tensor]:
    """Of the last group."""
    heads, kv_heads = case.heads
    group, first = heads // kv_heads, heads - heads // kv_heads
    mask_mod, score_mod = case.mask_mod("cuda"), case.score_mod("cuda")
    b = torch.tensor(case.batch - 1, device="cuda")

    def head_of(place: int) -> Tensor:
        return torch.tensor(first + place, device="cuda")

    def seen(place: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, head_of(place), q_idx, kv_idx).expand(len(q_idx), len(kv_idx))

    def modified(scores: Tensor, place: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return scores if score_mod is None else score_mod(scores, b, head_of(place), q_idx, kv_idx)

    q, k, v, grad_out = (x[-1] for x in tensors)
    return dense_head(q[-group:], k[-1], v[-1], grad_out[-group:], seen, modified, precision)


def last_group(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    group = case.heads[0] // case.heads[1]
    return {name: x[-1, -1] if name in ("dk", "dv") else x[-1, -group:] for name, x in results.items()}


def errors(case: Case, tensors: list[Tensor], results: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Of each result (error, what is allowed): 2 x error of the same precision on one device + one rounding, all against
    float64 (DESIGN.md 7).
    """
    true, close = exact(case, tensors, torch.float64), exact(case, tensors, torch.float32)
    found = {}
    for name, value in last_group(case, results).items():
        finite = true[name].isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
        error, same = (
            (x.double() - true[name])[finite].abs().max().item() if finite.any() else 0.0 for x in (value, close[name])
        )
        size = true[name][finite].abs().max().item() if finite.any() else 0.0
        found[name] = error, 2 * same + torch.finfo(value.dtype).eps * size
    return found


def assert_within_budget(case: Case, tensors: list[Tensor], results: dict[str, Tensor]) -> None:
    for name, (error, allowed) in errors(case, tensors, results).items():
        assert error <= allowed, f"{name}: {error:.3e}; {allowed:.3e} are allowed"


def assert_same_bits(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    differ = [name for name in results if not torch.equal(results[name], expected[name])]
    assert not differ, f"other bits: {differ}"


def assert_other_bits(x: Tensor, y: Tensor) -> None:
    assert not torch.equal(x, y)


def assert_near(x: Tensor, expected: Tensor, part: float) -> None:
    """``part`` of a number, and of the largest."""
    torch.testing.assert_close(x, expected, rtol=part, atol=part * expected.abs().max().item())


def assert_pages_within_budget(found: dict[str, Tensor], true: dict[str, Tensor], close: dict[str, Tensor]) -> None:
    """The same budget, for out and lse of new tokens; ``true`` in float64, ``close`` in the same precision."""
    assert found.keys() == true.keys() == close.keys()
    for name, value in found.items():
        assert value.dtype == close[name].dtype, f"{name} is {value.dtype}"
        finite = true[name].isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
        error, allowed = ((x.double() - true[name])[finite].abs().max().item() for x in (value, close[name]))
        rounding = torch.finfo(value.dtype).eps * max(1.0, true[name][finite].abs().max().item())
        assert error <= 2 * allowed + 2 * rounding, f"{name}: {error:.3e}; 2 x ({allowed:.3e} + {rounding:.3e})"


def assert_near_twin(found: dict[str, Tensor], twin: dict[str, Tensor], part: float) -> None:
    """``part`` of a number, and of the largest that is finite; what is not is the same."""
    assert found.keys() == twin.keys()
    for name, value in found.items():
        finite = twin[name].isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
        assert_near(value[finite], twin[name][finite], part)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as one CUDA graph; what its result is written to is written again at each replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
