"""Refusals: by name where the mistake is made, and on every rank when one rank makes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

import cpflex
from cpflex.ring.handles import resolve
from patience import patience
from processes import Outcome, RankProcesses

SEQ_LEN = 64
Arguments = dict[str, Any]


def softcap(s, b, h, q, k):
    return 20 * torch.tanh(s / 20)


def other_softcap(s, b, h, q, k):
    return 21 * torch.tanh(s / 21)


def summed(s, b, h, q, k):
    return s + LONG.sum()


def indexed_too_far(s, b, h, q, k):
    return s + SHORT[k]


def divides_by_zero(s, b, h, q, k):
    return s * (1 / 0)


def of_numpy(s, b, h, q, k):
    return s + np.zeros(SEQ_LEN)[q]


def of_meta(s, b, h, q, k):
    return s + META[q]


def branches(s, b, h, q, k):
    return s if q > k else s * 0.5


META = torch.zeros(SEQ_LEN, device="meta")
LONG, SHORT = torch.zeros(SEQ_LEN), torch.zeros(SEQ_LEN - 1)


def arguments(group: Any = None) -> Arguments:
    """Of a correct call; ``group`` beside them."""
    ids = torch.arange(SEQ_LEN) // 20
    plan = cpflex.make_plan(cpflex.causal() & cpflex.document(ids), SEQ_LEN, group, layout=cpflex.zigzag)
    q, k, v = (torch.randn(2, 4, plan.local_len, 16) for _ in "qkv")
    return {"query": q, "key": k, "value": v, "score_mod": softcap, "block_mask": plan}


def attend(made: Arguments) -> Any:
    return cpflex.flex_attention(**made)


# name -> (change the arguments of a call; the error where it is made; its message)
Change = Callable[[Arguments, Any], None]


def each(fn: Callable) -> Change:
    """A change of q, k and v alike."""

    def change(made: Arguments, group: Any) -> None:
        for name in ("query", "key", "value"):
            made[name] = fn(made[name])

    return change


def one(name: str, fn: Callable) -> Change:
    def change(made: Arguments, group: Any) -> None:
        made[name] = fn(made[name])

    return change


def put(**values: Any) -> Change:
    return lambda made, group: made.update(values)


def as_dtensor(made: Arguments, group: Any) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    made["query"] = DTensor.from_local(made["query"], mesh, [Replicate()], run_check=False)


def several_kinds(made: Arguments, group: Any) -> None:
    masks = {"full": cpflex.full(), "causal": cpflex.causal()}
    made["block_mask"] = cpflex.make_plan(masks, SEQ_LEN, group, layout=cpflex.zigzag)


def shorter_keys(made: Arguments, group: Any) -> None:
    made["key"], made["value"] = made["key"][:, :, :-1], made["value"][:, :, :-1]


LOCAL: dict[str, tuple[Change, type[Exception], str]] = {
    "mixed dtypes": (one("key", torch.Tensor.bfloat16), ValueError, "one dtype; got torch.float32, torch.bfloat16"),
    "float64": (
        each(torch.Tensor.double),
        NotImplementedError,
        "must be float32, bfloat16 or float16; got torch.float64",
    ),
    "integers": (each(torch.Tensor.long), NotImplementedError, "must be float32"),
    "cross attention": (shorter_keys, NotImplementedError, r"one length under this plan .no KV cache.*cpflex\.cross"),
    "keys without values": (one("value", lambda x: x[:, :, :-1]), ValueError, "key and value must have one length"),
    "a wrong local length": (each(lambda x: x[:, :, :-1]), ValueError, r"local_len=\d+ for seq_len=64.*plan\.shard"),
    "the whole sequence": (each(lambda x: torch.cat([x, x, x], 2)), ValueError, r"shard the inputs with plan\.shard"),
    "three dims": (one("query", lambda x: x[0]), ValueError, r"query must be \[B, H, S_local, D\]"),
    "no tensor": (put(value=[1.0]), TypeError, "value must be a Tensor; got list"),
    "batch sizes": (one("value", lambda x: x[:1]), ValueError, "batch sizes differ"),
    "head dims": (one("key", lambda x: x[..., :8]), ValueError, "one head dim; got 16 and 8"),
    "heads of keys and values": (one("value", lambda x: x[:, :2]), ValueError, "equally many heads; got 4 and 2"),
    "grouped queries unasked": (
        lambda made, group: made.update(key=made["key"][:, :2], value=made["value"][:, :2]),
        ValueError,
        "pass enable_gqa=True",
    ),
    "heads that do not divide": (
        lambda made, group: made.update(key=made["key"][:, :3], value=made["value"][:, :3], enable_gqa=True),
        ValueError,
        "multiple of those of key; got 4 and 3",
    ),
    "an unknown kernel option": (
        put(kernel_options={"BLOCK_M": 64}),
        NotImplementedError,
        "BLOCK_M.*supported: 'backend'",
    ),
    "an unknown backend": (
        put(kernel_options={"backend": "cuda"}),
        ValueError,
        "backend must be 'triton', .* got 'cuda'",
    ),
    "lse asked for twice": (
        put(return_lse=True, return_aux=AuxRequest(lse=True)),
        ValueError,
        "pass return_lse or return_aux, not both",
    ),
    "a backend of torch's": (
        put(kernel_options={"BACKEND": "TRITON_DECODE"}),
        ValueError,
        "or 'auto'; got 'TRITON_DECODE'",
    ),
    "FlashAttention-4 where it cannot run": (
        put(kernel_options={"BACKEND": "FLASH"}),
        NotImplementedError,
        "backend 'flash' needs the package flash-attn-4, which is not installed|backend 'flash' needs sm_90",
    ),
    "two backends": (
        put(kernel_options={"BACKEND": "TRITON", "backend": "reference"}),
        ValueError,
        "must name one backend; got 'backend' and 'BACKEND'",
    ),
    "a score mod that is not pointwise": (put(score_mod=summed), cpflex.UnsupportedMod, "reduction"),
    "a score mod with a short table": (put(score_mod=indexed_too_far), ValueError, "63 elements .*seq_len=64"),
    "a score mod that is no function": (put(score_mod=3.0), TypeError, "score_mod must be callable; got float"),
    "a scale that is no number": (put(scale="half"), ValueError, "half"),
    "a scale of nan": (put(scale=float("nan")), ValueError, "scale must be a finite number; got nan"),
    "an infinite scale": (put(scale=float("inf")), ValueError, "scale must be a finite number"),
    "an empty batch": (each(lambda x: x[:0]), ValueError, r"none of them 0; got shape \(0, 4, \d+, 16\)"),
    "no heads": (each(lambda x: x[:, :0]), ValueError, "none of them 0"),
    "no head dim": (each(lambda x: x[..., :0]), ValueError, "none of them 0"),
    "a sparse tensor": (
        one("key", torch.Tensor.to_sparse),
        TypeError,
        r"key must be a dense tensor; got torch\.sparse_coo",
    ),
    "complex numbers": (each(lambda x: x + 0j), NotImplementedError, "must be float32.*got torch.complex64"),
    "kernel options that are no dict": (put(kernel_options=["triton"]), TypeError, "must be a dict or None; got list"),
    "a return_aux that is no request": (put(return_aux=True), TypeError, "must be an AuxRequest or None; got bool"),
    "a score mod that raises": (put(score_mod=divides_by_zero), ZeroDivisionError, "division by zero"),
    "a score mod of too few arguments": (put(score_mod=lambda s, q, k: s), TypeError, "positional arguments"),
    "a score mod of numpy": (put(score_mod=of_numpy), cpflex.UnsupportedMod, r"uses numpy; torch\.from_numpy"),
    "a score mod of integers": (
        put(score_mod=lambda s, b, h, q, k: q - k),
        cpflex.UnsupportedMod,
        "floating point score",
    ),
    "a score mod with Python if": (put(score_mod=branches), cpflex.UnsupportedMod, r"control flow.*torch\.where"),
    "a score mod of a table without data": (put(score_mod=of_meta), cpflex.UnsupportedMod, "without data"),
    "a plan of several kinds": (several_kinds, ValueError, "index it first"),
    "a DTensor": (as_dtensor, TypeError, r"query is a DTensor; pass the local tensor, `query\.to_local\(\)`"),
}


@pytest.mark.parametrize("name", [name for name in LOCAL if name != "a DTensor"])
def test_a_call_that_cannot_be_honoured_is_refused_by_name(name: str):
    change, kind, message = LOCAL[name]
    made = arguments()
    attend(made)
    change(made, None)
    with pytest.raises(kind, match=f"(?s){message}"):
        attend(made)


def block_mask() -> Any:
    return create_block_mask(lambda b, h, q, k: q >= k, 1, 1, SEQ_LEN // 2, SEQ_LEN // 2, device="cpu")


def test_a_trained_tensor_on_another_device_is_refused():
    slopes = torch.ones(4, requires_grad=True)
    made = arguments() | {"score_mod": lambda s, b, h, q, k: s * slopes[h]}
    for name in ("query", "key", "value"):
        made[name] = made[name].to("meta")
    with pytest.raises(ValueError, match="requires grad on cpu; query is on meta - move it there"):
        attend(made)


WITHOUT_A_PLAN = {
    "a torch BlockMask of another length": (block_mask, ValueError, r"seq_lengths=\(32, 32\), query must be .*, 32, D"),
    "no mask": (lambda: None, TypeError, "must be a plan made by cpflex.make_plan; got NoneType"),
    "a mask": (cpflex.causal, TypeError, "must be a plan made by cpflex.make_plan; got MaskMod"),
}


@pytest.mark.parametrize("name", WITHOUT_A_PLAN)
def test_a_block_mask_that_is_no_plan_is_refused(name: str):
    make, kind, message = WITHOUT_A_PLAN[name]
    with pytest.raises(kind, match=message):
        attend(arguments() | {"block_mask": make()})


@pytest.mark.parametrize("name", ["dropout_p", "is_causal", "attn_mask", "mask_mod"])
def test_an_argument_that_does_not_exist_is_refused(name: str):
    with pytest.raises(TypeError, match=name):
        attend(arguments() | {name: 0.1})


@pytest.mark.parametrize(
    ("sizes", "message"), [((3, 4), "batch_size=2; query has batch size 3"), ((2, 5), "num_heads=4; query has 5 heads")]
)
def test_other_sizes_than_planned_for_are_refused(sizes: tuple[int, int], message: str):
    def mask(b, h, q, k):
        return (q + b) % 3 <= (k + h) % 5

    plan = cpflex.make_plan(mask, SEQ_LEN, batch_size=2, num_heads=4)
    q = torch.randn(*sizes, SEQ_LEN, 16)
    with pytest.raises(ValueError, match=message):
        cpflex.flex_attention(q, q, q, block_mask=plan)


def test_sizes_that_the_mask_does_not_depend_on_may_differ():
    plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN, batch_size=2, num_heads=4)
    q = torch.randn(3, 5, SEQ_LEN, 16)
    cpflex.flex_attention(q, q, q, block_mask=plan)


# -- on every rank


def needs_grad(made: Arguments, group: Any) -> None:
    made["query"] = made["query"].requires_grad_()


def replan(**options: Any) -> Change:
    def change(made: Arguments, group: Any) -> None:
        mask = options.get("mask", cpflex.causal() & cpflex.document(torch.arange(SEQ_LEN) // 20))
        rest = {"layout": cpflex.zigzag, "schedule": cpflex.auto} | {x: y for x, y in options.items() if x != "mask"}
        made["block_mask"] = cpflex.make_plan(mask, SEQ_LEN, group, **rest)

    return change


def shorter(made: Arguments, group: Any) -> None:
    """By one token, which is padded: local lengths are the same."""
    mask = cpflex.causal() & cpflex.document(torch.arange(SEQ_LEN - 1) // 20)
    made["block_mask"] = cpflex.make_plan(mask, SEQ_LEN - 1, group, layout=cpflex.zigzag)


def of_version(**other: Any) -> Change:
    return lambda made, group: resolve(made["block_mask"].handle).facts.update(other)


# name -> (change on one rank; what the ranks disagree about)
MISMATCHES: dict[str, tuple[Change, str]] = {
    "another mask": (replan(mask=cpflex.causal()), "mask"),
    "another captured content": (
        replan(mask=cpflex.causal() & cpflex.document(torch.arange(SEQ_LEN) // 19)),
        "tensors captured by the mask",
    ),
    "another layout": (replan(layout=cpflex.contiguous), "layout"),
    "another schedule": (replan(schedule=cpflex.direct), "schedule"),
    "another topology": (replan(topology=cpflex.Topology.named("h100-ib")), "machine"),
    "another length": (shorter, "seq_len"),
    "another version of cpflex": (of_version(**{"cpflex version": "0.0.9"}), "cpflex version"),
    "another format of plans": (of_version(**{"plan format": 99}), "plan format"),
    "other heads": (each(lambda x: x[:, :2]), "query"),
    "fewer heads of keys": (
        lambda made, group: made.update(key=made["key"][:, :2], value=made["value"][:, :2], enable_gqa=True),
        "key",
    ),
    "another backend": (put(kernel_options={"backend": "reference"}), "backend"),
    "another order of sums": (put(kernel_options={"deterministic": False}), "whether it is deterministic"),
    "another scale": (put(scale=0.5), "scale"),
    "another score mod": (put(score_mod=other_softcap), "score_mod"),
    "no score mod": (put(score_mod=None), "score_mod"),
    "gradients wanted": (needs_grad, "whether gradients are needed"),
    "another dtype": (each(torch.Tensor.bfloat16), "query"),
    "another batch size": (each(lambda x: x[:1]), "query"),
    "another head dim of values": (one("value", lambda x: x[..., :8]), "value"),
}


def call_with_a_mistake(group: dist.ProcessGroup, name: str, culprit: int) -> None:
    made = arguments(group)
    if group.rank() == culprit:
        change = LOCAL[name][0] if name in LOCAL else MISMATCHES[name][0]
        change(made, group)
    attend(made)


def assert_all_raise(outcomes: list[Outcome]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is not None, f"rank {rank} did not raise"
        assert not isinstance(outcome.error, TimeoutError), f"rank {rank} waited"
        assert outcome.seconds < patience(10)


@pytest.mark.parametrize("name", LOCAL)
def test_a_mistake_of_one_rank_is_raised_on_all(name: str, two_processes: RankProcesses):
    culprit = list(LOCAL).index(name) % 2
    outcomes = two_processes.outcomes(call_with_a_mistake, name, culprit, timeout=12)
    assert_all_raise(outcomes)
    _, kind, _ = LOCAL[name]
    assert isinstance(outcomes[culprit].error, kind)
    other = outcomes[1 - culprit].error
    assert isinstance(other, cpflex.RankMismatch)
    assert f"group rank {culprit} raised {type(outcomes[culprit].error).__name__}: {outcomes[culprit].error}" in str(
        other
    )


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_call_unlike_the_others_is_raised_on_all(name: str, two_processes: RankProcesses):
    outcomes = two_processes.outcomes(call_with_a_mistake, name, 1, timeout=20)
    assert_all_raise(outcomes)
    for outcome in outcomes:
        assert isinstance(outcome.error, cpflex.RankMismatch)
        assert f"the ranks disagree about {MISMATCHES[name][1]}: group rank 0" in str(outcome.error)


@pytest.mark.parametrize("name", ["float64", "a DTensor", "another mask", "gradients wanted"])
def test_every_one_of_four_ranks_raises(name: str, four_processes: RankProcesses):
    outcomes = four_processes.outcomes(call_with_a_mistake, name, 2, timeout=20)
    assert_all_raise(outcomes)
    assert all("2" in str(outcome.error) for outcome in outcomes if isinstance(outcome.error, cpflex.RankMismatch))


def call_correctly(group: dist.ProcessGroup) -> bool:
    return bool(attend(arguments(group)).isfinite().all())


def test_a_call_without_a_mistake_goes_through(two_processes: RankProcesses):
    assert two_processes.run(call_correctly) == [True, True]


# -- numbers that are not finite are no mistake of the call: they go where they would in one dense attention


def rows_that_are_not_finite(name: str, at: int, value: float) -> set[int]:
    inputs = {x: torch.randn(1, 1, 512, 16) for x in ("query", "key", "value")}
    inputs[name][:, :, at] = value
    plan = cpflex.make_plan(cpflex.causal(), 512)
    out = cpflex.flex_attention(**inputs, block_mask=plan)
    assert isinstance(out, torch.Tensor)
    return set(torch.nonzero(~out.isfinite().all(-1))[:, 2].tolist())


def test_nan_in_a_query_stays_in_its_row():
    assert rows_that_are_not_finite("query", 300, float("nan")) == {300}


def test_nan_in_a_key_reaches_the_queries_that_see_it_and_no_others():
    assert rows_that_are_not_finite("key", 300, float("nan")) == set(range(300, 512))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_never_hidden_and_stays_in_the_tiles_that_see_its_key(value: float):
    """0 * inf is NaN: within a tile with seen and hidden pairs it shows in all rows, as in torch's own attention."""
    rows = rows_that_are_not_finite("value", 300, value)
    assert set(range(300, 512)) <= rows
    assert rows <= set(range(256, 512)), "tiles that the mask empties are not touched"


def test_the_table_of_refusals_is_current():
    from refusal_table import DOC, sections, text

    def without_words(table: str) -> str:  # those of Python differ from version to version
        return re.sub(r"`: .*", "`", table)

    assert without_words(DOC.read_text()) == without_words(text()), "run python tests/refusal_table.py --write"
    assert sum(map(len, sections().values())) >= 60
