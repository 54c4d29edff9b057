"""A traced mod equals the function it was traced from; what cannot be traced is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import cpflex
from cpflex.mods.evaluate import evaluate
from cpflex.mods.trace import UnsupportedMod, trace_mask_mod, trace_score_mod

B, H, S = 2, 3, 24
IDS = torch.arange(S) // 5
TABLE = torch.randn(B, H, S, generator=torch.Generator().manual_seed(1))
BOOLS = torch.arange(S) % 3 == 0
NARROW = torch.arange(S, dtype=torch.int32) * 3
NUMBER = torch.tensor(7)


def inputs(kind: str) -> dict[str, Tensor]:
    made = {
        "b": torch.arange(B).view(B, 1, 1, 1),
        "h": torch.arange(H).view(H, 1, 1),
        "q_idx": torch.arange(S).view(S, 1),
        "kv_idx": torch.arange(S),
    }
    if kind == "score":
        made = {"score": torch.randn(B, H, S, S, generator=torch.Generator().manual_seed(2)) * 2} | made
    return made


def chained(b, h, q, k):
    return TABLE[b][h][q] > TABLE[b, h, k]


def in_place(b, h, q, k):
    distance = q - k
    distance += 3
    distance *= 2
    return distance > 4


def from_python(b, h, q, k):
    seen = q < 0
    for width in (1, 4, 9):  # Python control flow on Python numbers is fine
        if width > 2:
            seen = seen | ((q - k).abs() == width)
    return seen


MASK_MODS = {
    "causal": lambda b, h, q, k: k <= q,
    "all": lambda b, h, q, k: q >= 0,
    "constant true": lambda b, h, q, k: torch.ones_like(q, dtype=torch.bool),
    "new_ones": lambda b, h, q, k: q.new_ones((), dtype=torch.bool),
    "full": lambda b, h, q, k: torch.full_like(q, True, dtype=torch.bool),
    "documents": lambda b, h, q, k: IDS[q] == IDS[k],
    "nested gather": lambda b, h, q, k: IDS[IDS[q]] == IDS[k] // 2,
    "negative index": lambda b, h, q, k: IDS[q - S] == IDS[k],
    "bool table": lambda b, h, q, k: BOOLS[q] | BOOLS[k],
    "narrow table": lambda b, h, q, k: NARROW[q] > 2 * k,
    "chained gather": chained,
    "gather of a slice": lambda b, h, q, k: TABLE[b, :, q][h] > 0.0,
    "gather with a number": lambda b, h, q, k: TABLE[1, h, -1] > TABLE[0, 2, 3] * k,
    "captured number": lambda b, h, q, k: q - k < NUMBER,
    "batch and head": lambda b, h, q, k: (q + b) % (h + 2) == k % 2,
    "floor division of negatives": lambda b, h, q, k: (k - q) // 4 == -2,
    "remainder of negatives": lambda b, h, q, k: (k - q) % 5 == 3,
    "remainder of a number": lambda b, h, q, k: 17 % (k + 1) > q % 3,
    "truncated division": lambda b, h, q, k: torch.div(k - q, 4, rounding_mode="trunc") == 0,
    "true division": lambda b, h, q, k: (q + 1) / (k + 1) > 1.5,
    "fmod": lambda b, h, q, k: torch.fmod(k - q, 5) == -3,
    "bits": lambda b, h, q, k: ((q ^ k) & 6 | (q << 1) >> 3) == 2,
    "not of bits": lambda b, h, q, k: ~q == k - S,
    "logical": lambda b, h, q, k: torch.logical_and(q, k) | torch.logical_not(q > 3) ^ torch.logical_xor(q > 2, k > 2),
    "where": lambda b, h, q, k: torch.where(q > 9, q - k, k - q) < 4,
    "clamp": lambda b, h, q, k: (q - k).clamp(-3, 3).abs() == 3,
    "clamp_min": lambda b, h, q, k: (q - k).clamp(min=2) == (q - k).clamp_max(5),
    "maximum": lambda b, h, q, k: torch.maximum(q, k) - torch.minimum(q, k) < 5,
    "integer power": lambda b, h, q, k: q**2 > k**3 - 4,
    "float power": lambda b, h, q, k: (q + 1) ** 0.5 > k - 2,
    "square and sign": lambda b, h, q, k: (q - k).square() * torch.sign(q - k) < 9,
    "floats of positions": lambda b, h, q, k: torch.sqrt(q.float()) * torch.exp(-k / 7) > 0.1,
    "casts": lambda b, h, q, k: (q * 300).to(torch.int16) > (k * 1.7).long().to(torch.float64),
    "bool": lambda b, h, q, k: (q % 4).bool(),
    "bool arithmetic": lambda b, h, q, k: (q > k).int() + (q % 2 == 0) > 1,
    "masked_fill": lambda b, h, q, k: (q - k).masked_fill(q > 12, 0) < 2,
    "isnan": lambda b, h, q, k: torch.isnan((q - k) / (q - k)) | torch.isinf(1 / k),
    "reversed operands": lambda b, h, q, k: (3 - q) * 2 <= 5 - k,
    "ne of floats": lambda b, h, q, k: torch.ne(q * 0.1, k * 0.1),
    "clone and detach": lambda b, h, q, k: q.clone() >= k.detach(),
    "in-place on an intermediate": in_place,
    "loop over Python numbers": from_python,
    "rounding": lambda b, h, q, k: torch.floor(q / 3) + torch.ceil(k / 4) == torch.round(q / 5) + torch.trunc(k / 2),
    "alpha": lambda b, h, q, k: torch.add(q, k, alpha=2) > torch.sub(20, k, alpha=3) + torch.rsub(q, 4, alpha=2),
    "atan2": lambda b, h, q, k: torch.atan2(q - 3.0, k - 7.0) > 0.3,
}


@pytest.mark.parametrize("name", MASK_MODS)
def test_a_traced_mask_equals_its_function(name: str):
    mod = trace_mask_mod(MASK_MODS[name])
    found = evaluate(mod.graph, mod.captured, inputs("mask"))[0].expand(B, H, S, S)
    torchs = create_mask(MASK_MODS[name], B, H, S, S, device="cpu")  # calls it for one position at a time, under vmap
    torch.testing.assert_close(found, torchs)


SLOPES = torch.tensor([0.5, 0.25, 0.125], requires_grad=True)
HALF = torch.tensor([1.5, -2.25, 3.0], dtype=torch.bfloat16)

SCORE_MODS = {
    "identity": lambda s, b, h, q, k: s,
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "alibi": lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    "bf16 slopes": lambda s, b, h, q, k: s + HALF[h] * (k - q),
    "causal by where": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "causal by masked_fill": lambda s, b, h, q, k: s.masked_fill(q < k, -math.inf),
    "gelu": lambda s, b, h, q, k: F.gelu(s),
    "gelu by tanh": lambda s, b, h, q, k: F.gelu(s, approximate="tanh"),
    "silu": lambda s, b, h, q, k: F.silu(s),
    "relu": lambda s, b, h, q, k: F.relu(s) + torch.relu(-s),
    "leaky relu": lambda s, b, h, q, k: F.leaky_relu(s, 0.3) + F.leaky_relu(s),
    "hardtanh": lambda s, b, h, q, k: F.hardtanh(s) + F.hardtanh(s, -0.5, 2.0),
    "sigmoid of log": lambda s, b, h, q, k: torch.sigmoid(s) * torch.log(q + 1.0),
    "reciprocal": lambda s, b, h, q, k: torch.reciprocal(s + 9) + 1 / (s + 9),
    "in-place": lambda s, b, h, q, k: (s * 1).add_(1).mul_(2).tanh_(),
    "detach": lambda s, b, h, q, k: s - s.detach() * 0.5,
    "double precision": lambda s, b, h, q, k: s.double() * 0.1 + s,
    "half precision": lambda s, b, h, q, k: s.half() * HALF[h].half(),
    "scalar tensor": lambda s, b, h, q, k: s + torch.scalar_tensor(0.5) + torch.full((), 2.0),
    "trigonometry": lambda s, b, h, q, k: torch.sin(s) + torch.cos(s) * torch.erf(s) + torch.expm1(s) + torch.exp2(s),
}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_a_traced_score_mod_equals_its_function(name: str):
    fn = SCORE_MODS[name]
    mod = trace_score_mod(fn)
    arguments = inputs("score")
    expected = fn(*(x.clone() for x in arguments.values())).detach().float()
    found = evaluate(mod.graph, mod.captured, arguments)[0]
    torch.testing.assert_close(found.expand(B, H, S, S), expected.expand(B, H, S, S), rtol=2e-6, atol=1e-6)


def python_if(b, h, q, k):
    if q > k:
        return q >= 0
    return k >= 0


def changes_captured(b, h, q, k):
    NARROW.add_(1)
    return NARROW[q] > k


def assigns(b, h, q, k):
    scratch = torch.zeros(4)
    scratch[0] = 1
    return q > k


REFUSED = {
    "reduction": (lambda b, h, q, k: TABLE[b, h].sum() > q, r"reduction.*aten\.sum.*pointwise"),
    "softmax": (lambda b, h, q, k: TABLE[b, h].softmax(0)[q] > 0.1, "reduction"),
    "dot product": (lambda b, h, q, k: TABLE[b, h] @ TABLE[b, h] > q, r"dot product.*aten\.dot"),
    "randomness": (lambda b, h, q, k: torch.rand(()) > 0.5, r"randomness.*aten\.rand"),
    "dropout": (lambda b, h, q, k: F.dropout(q.float()) > 0.5, "randomness|not supported"),
    "Python if": (python_if, r"Python control flow.*torch\.where"),
    "and": (lambda b, h, q, k: (q > k) and (q > 3), "Python control flow"),
    "or": (lambda b, h, q, k: (q > k) or (q > 3), "Python control flow"),
    "not": (lambda b, h, q, k: not (q > k), "Python control flow"),
    "max of two": (lambda b, h, q, k: max(q, k) > 3, "Python control flow"),
    "item": (lambda b, h, q, k: q.item() > k, "Python number"),
    "int": (lambda b, h, q, k: k > int(q), "Python number"),
    "float": (lambda b, h, q, k: k > float(q), "Python number"),
    "list index": (lambda b, h, q, k: k > [1, 2, 3][q], "Python number"),
    "not bool": (lambda b, h, q, k: q - k, r"must return bool; got torch\.int64.*compare it"),
    "not a tensor": (lambda b, h, q, k: True, "must return a Tensor computed from its arguments; got bool"),
    "none": (lambda b, h, q, k: None, "must return a Tensor"),
    "not pointwise": (lambda b, h, q, k: BOOLS, r"must be pointwise: one value.*\(24,\)"),
    "in-place on captured": (changes_captured, "changes a tensor in place"),
    "assignment": (assigns, "mods must be"),
    "whole table": (lambda b, h, q, k: (IDS * 2)[q] == k, r"whole captured tensor of shape \(24,\)"),
    "cast of a whole table": (lambda b, h, q, k: IDS.float()[q] == k, "whole captured tensor"),
    "index by bool": (lambda b, h, q, k: IDS[q > k] == 0, "indexes with"),
    "too many indices": (lambda b, h, q, k: IDS[q, k] == 0, "1 dims with 2 indices"),
    "unsupported op": (lambda b, h, q, k: torch.lgamma(q + 1.0) > k, r"aten\.lgamma.*not supported; supported:.*where"),
    "tensor made inside": (lambda b, h, q, k: torch.arange(S)[q] > k, "arange"),
    "complex": (lambda b, h, q, k: torch.tensor([1j, 2j])[q].real > 0, "complex"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_pointwise_is_refused_by_name(name: str):
    fn, message = REFUSED[name]
    with pytest.raises(UnsupportedMod, match=f"(?s){message}"):
        trace_mask_mod(fn)


def test_an_integer_score_is_refused():
    with pytest.raises(UnsupportedMod, match=r"floating point score; got torch\.int64"):
        trace_score_mod(lambda s, b, h, q, k: q - k)


def test_a_captured_dtensor_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        slopes = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(UnsupportedMod, match=r"captures a DTensor.*to_local"):
            trace_score_mod(lambda s, b, h, q, k: s * slopes[h])
        scalar = distribute_tensor(torch.tensor(1.0), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(UnsupportedMod, match="captures a DTensor"):
            trace_score_mod(lambda s, b, h, q, k: s * scalar)
    finally:
        dist.destroy_process_group()


def test_an_index_out_of_range_is_found_when_tracing():
    with pytest.raises(IndexError, match="index 24 is out of"):
        trace_mask_mod(lambda b, h, q, k: IDS[24] == q)


def test_an_unsupported_mod_names_the_function():
    def my_mask(b, h, q, k):
        return q.sum() > k

    with pytest.raises(UnsupportedMod, match="mask_mod 'my_mask'"):
        trace_mask_mod(my_mask)


def test_a_captured_tensor_is_not_changed_by_tracing():
    before = NARROW.clone()
    for fn, _ in REFUSED.values():
        with pytest.raises(UnsupportedMod):
            trace_mask_mod(fn)
    torch.testing.assert_close(NARROW, before)


def test_positions_never_overflow():
    big = 2**31 - 1
    positions = {name: torch.tensor(big) for name in ("b", "h", "q_idx", "kv_idx")}
    for fn in (
        lambda b, h, q, k: q * k == big * big,
        lambda b, h, q, k: (q + k) * 2 == big * 4,
        lambda b, h, q, k: (q << 20) // 2**20 == k,
        lambda b, h, q, k: q * 1_000_003 % 97 == big * 1_000_003 % 97,
    ):
        mod = trace_mask_mod(fn)
        assert evaluate(mod.graph, mod.captured, positions)[0].item() is True


def test_the_key_is_of_the_computation_and_not_of_the_function():
    def windowed(window):
        return lambda b, h, q, k: (IDS[q] == IDS[k]) & (q - k < window)

    assert trace_mask_mod(windowed(5)).key == trace_mask_mod(windowed(5)).key
    assert trace_mask_mod(windowed(5)).key != trace_mask_mod(windowed(6)).key

    def documents(ids):
        return trace_mask_mod(lambda b, h, q, k: ids[q] == ids[k])

    one, other = documents(IDS), documents(IDS.flip(0))
    assert one.key == other.key
    assert one.content_key != other.content_key
    assert one.content_key == documents(IDS.clone()).content_key
    assert one.key != documents(IDS.int()).key


def test_graphs_with_numbers_that_python_calls_equal_differ():
    keys = {trace_score_mod(lambda s, b, h, q, k, x=x: s * torch.full((), x)).key for x in (1, 1.0, True, 0.0, -0.0)}
    assert len(keys) == 5


@pytest.mark.parametrize(("one", "other"), [(5, 6), (0.1, 0.2), (1e-30, 2e-30), (2**40, 2**40 + 1)], ids=str)
def test_another_number_is_another_graph(one, other):
    assert len({trace_mask_mod(lambda b, h, q, k, x=x: q * x > k).key for x in (one, other)}) == 2


def test_signed_zero_is_kept():
    mod = trace_score_mod(lambda s, b, h, q, k: 1.0 / (s * 0.0 + torch.full((), -0.0)))
    arguments = inputs("score") | {"score": torch.tensor(-1.0)}
    assert evaluate(mod.graph, mod.captured, arguments)[0].item() == -math.inf


def test_captured_tensors_that_the_result_does_not_need_are_dropped():
    def mask(b, h, q, k):
        TABLE[b, h, q] + HALF[h]  # computed, unused
        return IDS[q] == IDS[k]

    assert [t.data_ptr() for t in trace_mask_mod(mask).captured] == [IDS.data_ptr()]


def test_a_score_mod_reads_its_captured_tensors_at_each_call():
    temperature = torch.tensor(1.0)
    mod = cpflex.score_mod(lambda s, b, h, q, k: s * temperature)
    q = torch.randn(1, 1, 16, 16)
    plan = cpflex.make_plan(cpflex.full(), 16)
    before = cpflex.flex_attention(q, q, q, score_mod=mod, block_mask=plan)
    temperature.fill_(0.0)
    after = cpflex.flex_attention(q, q, q, score_mod=mod, block_mask=plan)
    torch.testing.assert_close(after, q.mean(dim=2, keepdim=True).expand_as(q))
    assert not torch.equal(before, after)
