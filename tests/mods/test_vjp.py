"""The gradient of a score_mod, and of what it captured, is the one that torch.autograd finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpflex.mods.evaluate import evaluate, wrapped_indices
from cpflex.mods.graph import Ref
from cpflex.mods.trace import trace_score_mod
from cpflex.mods.vjp import _RULES, vjp

B, H, S = 2, 3, 11


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7))


@dataclass
class Case:
    make: Callable[..., Callable[..., Tensor]]
    captured: list[Tensor] = field(default_factory=list)
    positive: bool = False
    """Scores above 0.1: where logarithms and roots are smooth."""


def case(make, *captured: Tensor, positive: bool = False) -> Case:
    return Case(make, list(captured), positive)


PER_HEAD, PER_KEY, TABLE, NUMBER = drawn(H), drawn(S), drawn(H, 2 * S + 1), torch.tensor(0.7)

CASES = {
    "identity": case(lambda: lambda s, b, h, q, k: s),
    "constant": case(lambda: lambda s, b, h, q, k: torch.zeros_like(s)),
    "softcap": case(lambda: lambda s, b, h, q, k: 3 * torch.tanh(s / 3)),
    "alibi": case(lambda m: lambda s, b, h, q, k: s + m[h] * (q - k), PER_HEAD),
    "relative bias": case(lambda t: lambda s, b, h, q, k: s + t[h, q - k + S], TABLE),
    "relative bias by a negative index": case(lambda t: lambda s, b, h, q, k: s + t[h, q - k], TABLE),
    "bias read twice": case(lambda t: lambda s, b, h, q, k: s * t[k] + t[q], PER_KEY),
    "bias at a number": case(lambda t: lambda s, b, h, q, k: s * t[2] + t[-1], PER_KEY),
    "temperature": case(lambda t: lambda s, b, h, q, k: s * t + t * t, NUMBER),
    "temperature divides": case(lambda t: lambda s, b, h, q, k: s / t - t / (s.abs() + 1), NUMBER),
    "two captured": case(lambda t, u: lambda s, b, h, q, k: (s - t[k]) * u, PER_KEY, NUMBER),
    "bf16 captured": case(lambda t: lambda s, b, h, q, k: s + t[h] * s, PER_HEAD.bfloat16()),
    "double inside": case(lambda t: lambda s, b, h, q, k: (s.double() * t[h].double()).sin(), PER_HEAD),
    "detach": case(lambda t: lambda s, b, h, q, k: s * t[h] - (s * t[h]).detach(), PER_HEAD),
    "abs": case(lambda: lambda s, b, h, q, k: s.abs() - (s * 0.0).abs()),
    "neg and reversed minus": case(lambda: lambda s, b, h, q, k: 1 - (-s) * 2),
    "division": case(lambda: lambda s, b, h, q, k: (q + 1) / (s.abs() + k + 1)),
    "remainder": case(lambda: lambda s, b, h, q, k: torch.remainder(s, 0.7) + torch.remainder(q + 3.3, s.abs() + 0.5)),
    "fmod": case(lambda: lambda s, b, h, q, k: torch.fmod(s, 0.7) + torch.fmod(-q - 3.3, s.abs() + 0.5)),
    "power of the score": case(lambda: lambda s, b, h, q, k: s**3 + s**2 + (s.abs() + 0.1) ** 0.5 + s**0),
    "power to the score": case(lambda: lambda s, b, h, q, k: 2.5**s + 0.0 ** (s.abs() + 1)),
    "power of both": case(lambda t: lambda s, b, h, q, k: (t[k].abs() + 0.2) ** s, PER_KEY),
    "power of zero": case(lambda t: lambda s, b, h, q, k: torch.relu(s) ** (t[k].abs() + 1.5), PER_KEY),
    "atan2": case(lambda t: lambda s, b, h, q, k: torch.atan2(s, t[k] + 0.1), PER_KEY),
    "maximum": case(lambda t: lambda s, b, h, q, k: torch.maximum(s, t[k]) + torch.maximum(s, s), PER_KEY),
    "minimum": case(lambda t: lambda s, b, h, q, k: torch.minimum(s, t[k]) + torch.minimum(t[q], t[k]), PER_KEY),
    "clamp": case(lambda: lambda s, b, h, q, k: s.clamp(-0.5, 0.5) + s.clamp(min=0.1) + s.clamp(max=0.2)),
    "clamp at the bound": case(lambda: lambda s, b, h, q, k: torch.round(s).detach() + s * 0 + (s - s).clamp(0.0, 1.0)),
    "clamp by a tensor": case(lambda t: lambda s, b, h, q, k: torch.clamp(s, min=t[k]), PER_KEY),
    "where": case(lambda t: lambda s, b, h, q, k: torch.where(q > k, s * t[h], s), PER_HEAD),
    "masked fill": case(lambda: lambda s, b, h, q, k: (s * 2).masked_fill(q < k, -5.0)),
    "exp": case(lambda: lambda s, b, h, q, k: torch.exp(s) + torch.exp2(s) + torch.expm1(s)),
    "log": case(lambda: lambda s, b, h, q, k: torch.log(s) + torch.log2(s) + torch.log1p(s), positive=True),
    "sqrt": case(lambda: lambda s, b, h, q, k: torch.sqrt(s) + torch.rsqrt(s), positive=True),
    "sigmoid": case(lambda: lambda s, b, h, q, k: torch.sigmoid(s)),
    "sine": case(lambda: lambda s, b, h, q, k: torch.sin(s) + torch.cos(s) * s),
    "erf": case(lambda: lambda s, b, h, q, k: torch.erf(s)),
    "gelu": case(lambda: lambda s, b, h, q, k: F.gelu(s) + F.gelu(s, approximate="tanh")),
    "silu": case(lambda: lambda s, b, h, q, k: F.silu(s)),
    "relu": case(lambda: lambda s, b, h, q, k: F.relu(s) + F.leaky_relu(s, 0.2)),
    "hardtanh": case(lambda: lambda s, b, h, q, k: F.hardtanh(s, -0.4, 0.6)),
    "reciprocal and square": case(lambda: lambda s, b, h, q, k: torch.reciprocal(s) + torch.square(s), positive=True),
    "steps": case(lambda: lambda s, b, h, q, k: s.floor() + s.ceil() + s.round() + s.trunc() + s.sign() * s),
    "log of the position": case(lambda: lambda s, b, h, q, k: s * torch.log(q + 2.0)),
    "in place": case(lambda: lambda s, b, h, q, k: (s * 2).add_(1.0).mul_(s).tanh_()),
    "in bf16": case(lambda: lambda s, b, h, q, k: s.bfloat16() * 2),
}


def gradients(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """(of autograd, of the vjp graph): d score, then d captured."""
    score = drawn(B, H, S, S, seed=1)
    score = score.abs() + 0.1 if case.positive else score
    grad = drawn(B, H, S, S, seed=2)
    at = {
        "b": torch.arange(B).view(B, 1, 1, 1),
        "h": torch.arange(H).view(H, 1, 1),
        "q_idx": torch.arange(S).view(S, 1),
        "kv_idx": torch.arange(S),
    }
    leaves = [x.clone().requires_grad_() for x in case.captured]
    fn = case.make(*leaves)
    leaf = score.clone().requires_grad_()
    result = fn(leaf, *at.values()).float().expand_as(score)
    expected = [torch.zeros_like(x) for x in (leaf, *leaves)]
    if result.requires_grad:
        found = torch.autograd.grad(result, [leaf, *leaves], grad, allow_unused=True)
        expected = [e if f is None else f for e, f in zip(expected, found, strict=True)]

    mod = trace_score_mod(fn)
    wanted = tuple(range(len(mod.captured)))
    derivative = vjp(mod.graph, wanted)
    outputs = evaluate(derivative.graph, mod.captured, {**at, "score": score, "grad": grad})
    totals = [torch.zeros_like(x, dtype=torch.float32) for x in mod.captured]
    for read in derivative.captured:
        part = outputs[read.output].expand_as(score)
        indices = [outputs[i.index] if isinstance(i, Ref) else torch.tensor(i) for i in read.indices]
        if indices:
            places = wrapped_indices(totals[read.slot], [i.expand_as(score) for i in indices])
            totals[read.slot].index_put_(places, part, accumulate=True)
        else:
            totals[read.slot] += part.sum()
    by_leaf = {id(captured): total for captured, total in zip(mod.captured, totals, strict=True)}
    d_captured = [by_leaf.get(id(x), torch.zeros_like(x)) for x in leaves]
    return expected, [outputs[0].expand_as(score), *d_captured]


@pytest.mark.parametrize("name", CASES)
def test_the_vjp_of_a_score_mod_is_autograds(name: str):
    expected, found = gradients(CASES[name])
    for ours, theirs in zip(found, expected, strict=True):
        coarse = theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-2 if coarse else 3e-5, atol=5e-2 if coarse else 3e-5)


def test_every_rule_is_tested():
    used = {node.op for case in CASES.values() for node in trace_score_mod(case.make(*case.captured)).graph.nodes}
    assert set(_RULES) <= used


TIES = {
    "abs at 0": lambda s, b, h, q, k: s.abs(),
    "maximum of equals": lambda s, b, h, q, k: torch.maximum(s, s * 1),
    "minimum of equals": lambda s, b, h, q, k: torch.minimum(s * 2, s + s),
    "clamp at its least": lambda s, b, h, q, k: s.clamp(min=0.0),
    "clamp at its greatest": lambda s, b, h, q, k: s.clamp(max=1.0),
    "clamp at a tensor": lambda s, b, h, q, k: s.clamp(min=(q * 0).float(), max=(k + 1).float()),
    "relu at 0": lambda s, b, h, q, k: F.relu(s),
    "leaky relu at 0": lambda s, b, h, q, k: F.leaky_relu(s, 0.1),
    "hardtanh at its bounds": lambda s, b, h, q, k: F.hardtanh(s),
    "square root of 0": lambda s, b, h, q, k: torch.sqrt(s.abs()),
    "power 0 of 0": lambda s, b, h, q, k: s**0,
}


@pytest.mark.parametrize("name", TIES)
def test_at_a_kink_the_gradient_is_the_one_torch_chose(name: str):
    score = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    zero = torch.tensor(0)
    (expected,) = torch.autograd.grad(TIES[name](score, zero, zero, zero, zero).sum(), score)
    mod = trace_score_mod(TIES[name])
    at = dict.fromkeys(("b", "h", "q_idx", "kv_idx"), zero)
    found = evaluate(vjp(mod.graph, ()).graph, (), {**at, "score": score.detach(), "grad": torch.ones(3)})[0]
    torch.testing.assert_close(found.expand(3), expected, equal_nan=True)


def test_a_bound_that_is_met_gets_the_rest_of_the_gradient():
    bound = torch.zeros(3, requires_grad=True)
    score = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    expected = torch.autograd.grad(score.clamp(min=bound).sum(), (score, bound))
    mod = trace_score_mod(lambda s, b, h, q, k: s.clamp(min=bound[q]))
    zero = torch.zeros((), dtype=torch.int64)
    at = {"b": zero, "h": zero, "q_idx": torch.arange(3), "kv_idx": zero, "score": score.detach()}
    found = evaluate(vjp(mod.graph, (0,)).graph, (bound.detach(),), {**at, "grad": torch.ones(3)})[:2]
    torch.testing.assert_close(tuple(found), expected)


def test_only_wanted_tensors_get_a_gradient():
    one, other = drawn(S), drawn(S)
    mod = trace_score_mod(lambda s, b, h, q, k: s * one[q] + other[k])
    assert [read.slot for read in vjp(mod.graph, (1,)).captured] == [1]
    assert [t.data_ptr() for t in mod.captured] == [one.data_ptr(), other.data_ptr()]
