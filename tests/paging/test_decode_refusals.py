"""Steps that cannot be right: refused by name where the mistake is made, and raised on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import AuxRequest

import cpflex
from cpflex.testing import run_ranks
from patience import patience
from processes import Outcome, RankProcesses

Made = dict[str, Any]
SHORT = torch.zeros(20)


def biased(s, b, h, q, k):
    return s + SHORT[k]


def softcap(s, b, h, q, k):
    return 20 * torch.tanh(s / 20)


def arguments(group: Any = None, rows: Any = cpflex.everyone) -> Made:
    """Of a correct step: two sequences that keep 5 and 9 tokens, with 1 and 2 new ones; an attention went before."""
    pages = cpflex.Pages(32, 4, group)
    pool = pages.pool(2, 8, 12)
    for seq, kept in (("a", 5), ("b", 9)):
        pages.reserve(seq, 40)
        pages.fill(seq, kept)
    mask = cpflex.mask_mod(cpflex.causal())
    new = {"a": 1, "b": 2}
    plan = cpflex.make_decode_plan(mask, pages, new, rows=rows)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 3, dim, generator=draw) for heads, dim in ((4, 8), (2, 8), (2, 12)))
    return {
        "q": q,
        "k": k,
        "v": v,
        "pool": pool,
        "plan": plan,
        "pages": pages,
        "mask": mask,
        "new": new,
        "group": group,
        "options": {},
    }


def step(made: Made) -> Any:
    with torch.set_grad_enabled(made.get("grad", False)):
        if made.get("assigns", True):
            made["pool"].assign(made["k"], made["v"], made["plan"])
        key, value = made.get("key", made["pool"].k), made.get("value", made["pool"].v)
        options = {"score_mod": softcap, "enable_gqa": True} | made["options"]
        out = cpflex.flex_attention(made["q"], key, value, block_mask=made["plan"], **options)
    made["plan"].advance()
    return out


def put(**values: Any) -> Callable[[Made], None]:
    return lambda made: made.update(values)


def options(**values: Any) -> Callable[[Made], None]:
    return lambda made: made["options"].update(values)


def each(fn: Callable) -> Callable[[Made], None]:
    return lambda made: made.update({name: fn(made[name]) for name in "qkv"})


def one(name: str, fn: Callable) -> Callable[[Made], None]:
    return lambda made: made.update({name: fn(made[name])})


def wants_gradients(name: str) -> Callable[[Made], None]:
    return lambda made: made.update({name: made[name].requires_grad_(), "grad": True})


def replan(new: dict | None = None, mask: Any = None, **how: Any) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        made["plan"] = cpflex.make_decode_plan(
            made["mask"] if mask is None else mask, made["pages"], new or made["new"], **how
        )

    return change


def other_pages(made: Made) -> None:
    made["pool"] = cpflex.Pages(32, 4, made["group"]).pool(2, 8, 12)


def cropped(made: Made) -> None:
    made["pages"].crop("b", 7)


def erased(made: Made) -> None:
    made["pages"].erase("a")
    made["pages"].reserve("a", 40)


def filled(made: Made) -> None:
    made["pages"].fill("a", 1)


def taken_over(made: Made) -> None:
    cpflex.make_decode_plan(made["mask"], made["pages"], made["new"], into=made["plan"])


def one_of_two(made: Made) -> None:
    pages = cpflex.Pages(32, 4, rank=0, world_size=2)
    for seq in made["new"]:
        pages.reserve(seq, 9)
    cpflex.make_decode_plan(made["mask"], pages, made["new"], rows=cpflex.by_token, travel=lambda costs: [True])


def over(made: Made) -> None:
    replan(horizon=2)(made)
    while made["plan"].fits(made["new"]):
        made["plan"].advance()


WITHOUT_GRADIENT = "there is no gradient through pages"

LOCAL: dict[str, tuple[Callable[[Made], None], type[Exception], str]] = {
    "queries that want gradients": (wants_gradients("q"), NotImplementedError, WITHOUT_GRADIENT),
    "keys that want gradients": (wants_gradients("k"), NotImplementedError, WITHOUT_GRADIENT),
    "another dtype than the pool's": (each(torch.Tensor.bfloat16), ValueError, "k is torch.bfloat16 on cpu, the pool torch.float32"),
    "a query of another dtype": (one("q", torch.Tensor.half), ValueError, "query is torch.float16 on cpu"),
    "a query on another device": (one("q", lambda x: x.to("meta")), ValueError, "query is torch.float32 on meta, the pool torch.float32 on cpu"),
    "keys on another device": (one("k", lambda x: x.to("meta")), ValueError, "k is torch.float32 on meta, the pool torch.float32 on cpu"),
    "too few new tokens": (one("q", lambda x: x[:, :, :2]), ValueError, r"query must be \[1, Hq, 3, 8\].*got \(1, 4, 2, 8\)"),
    "keys of another step": (one("k", lambda x: x[:, :, :1]), ValueError, r"k must be \[1, 2, 3, 8\].*got \(1, 2, 1, 8\)"),
    "keys of other heads": (one("k", lambda x: x[:, :1]), ValueError, "keys must have the 2 heads of the pool; got 1 and 2"),
    "another head dim": (one("v", lambda x: x[..., :8]), ValueError, r"v must be \[1, 2, 3, 12\]"),
    "a batch of two": (one("q", lambda x: x.expand(2, -1, -1, -1)), ValueError, "query must be"),
    "heads that do not divide": (one("q", lambda x: x[:, :3]), ValueError, "must be a multiple of the pool's 2; got 3"),
    "grouped heads that are not expected": (options(enable_gqa=False), ValueError, "pass enable_gqa=True"),
    "keys that are not a pool's": (put(key=torch.zeros(1, 2, 128, 8)), ValueError, "key and value must be pool.k and pool.v"),
    "a copy of the pool": (lambda made: made.update(value=made["pool"].v.clone()), ValueError, "the tensors themselves"),
    "no keys of this step": (put(assigns=False), ValueError, "call pool.assign"),
    "a pool of other pages": (other_pages, ValueError, "the plan and the pool are of different pages"),
    "a plan from before a crop": (cropped, RuntimeError, "sequence 'b' was cropped or erased since it was made"),
    "a plan from before an erase": (erased, RuntimeError, "sequence 'a' was cropped or erased since it was made"),
    "tokens that came from elsewhere": (filled, RuntimeError, "sequence 'a' keeps 6 tokens, and this step begins at 5"),
    "a plan whose memory was taken": (taken_over, RuntimeError, "its memory was given to another plan"),
    "a step after the horizon": (over, RuntimeError, "this decode plan is over: its 1 steps are done"),
    "no plan": (put(plan=None), TypeError, "plan must be one of cpflex.make_decode_plan; got NoneType"),
    "several kinds and none named": (replan(mask={"x": cpflex.causal(), "y": cpflex.full()}), ValueError, r"pass one of them, plan\[kind\]"),
    "a score table shorter than the plan": (options(score_mod=biased), ValueError, "captured tensor of 20 elements with kv_idx; the plan has 40"),
    "the largest score": (options(return_aux=AuxRequest(max_scores=True)), NotImplementedError, "ask for lse alone"),
    "a scale that is no number": (options(scale=float("nan")), ValueError, "scale must be a finite number"),
    "an unknown backend": (options(kernel_options={"backend": "cuda"}), ValueError, "backend must be"),
    "a backend without kernels for pages": (
        options(kernel_options={"BACKEND": "FLASH"}),
        NotImplementedError,
        "backend 'flash' has no kernel for pages",
    ),
}  # fmt: skip

WITHOUT_A_STEP: dict[str, tuple[Callable[[Made], Any], type[Exception], str]] = {
    "more than is reserved": (replan({"a": 41}), ValueError, r"keeps 5 tokens and has pages for 40; 41 new ones need pages.reserve\('a', 41\)"),
    "a sequence that holds nothing": (replan({"z": 1}), ValueError, "sequence 'z' holds no pages"),
    "no new tokens": (replan({"a": 0}), ValueError, "sequence 'a' must have at least 1 new token; got 0"),
    "no sequence": (lambda made: cpflex.make_decode_plan(made["mask"], made["pages"], {}), ValueError, "at least one sequence"),
    "no horizon": (replan(horizon=0), ValueError, "horizon must be an integer of at least 1; got 0"),
    "no strategy": (replan(rows="everyone"), TypeError, "rows must be a function such as cpflex.everyone; got 'everyone'"),
    "nothing that travels": (replan(rows=cpflex.by_token, travel="keys"), TypeError, "travel must be cpflex.queries, cpflex.keys, a function like them or None; got 'keys'"),
    "keys that travel to everyone": (replan(travel=cpflex.keys), ValueError, "rows=cpflex.by_token or cpflex.by_sequence; got rows=everyone"),
    "queries that travel, by head": (replan(rows=cpflex.by_head, travel=cpflex.queries), ValueError, "rows=cpflex.by_token or cpflex.by_sequence; got rows=by_head"),
    "a choice for fewer sequences": (one_of_two, ValueError, r"travel must give a bool for each of 2 sequences; got \[True\]"),
    "heads that are numbers": (replan(rows=cpflex.by_token, heads=32), TypeError, "heads must be a cpflex.Heads; got int"),
    "a topology by its name": (replan(rows=cpflex.by_token, topology="h100-ib"), TypeError, "topology must be a cpflex.Topology; got str"),
    "a mask table shorter than the plan": (replan(mask=lambda b, h, q, k: SHORT[k] == SHORT[q]), ValueError, "captured tensor of 20 elements with a position, and the plan reaches 40"),
    "a mask table of fewer sequences": (replan(mask=lambda b, h, q, k: k > torch.tensor([3])[b]), ValueError, "1 elements with b; the number of sequences is 2"),
    "a mask by head and no number": (replan(mask=lambda b, h, q, k: k > q - h), ValueError, "depends on h; pass num_heads="),
    "documents of another length": (replan(mask=cpflex.document(torch.zeros(30, dtype=torch.int64))), ValueError, "captured tensor of 30 elements"),
    "another kind than planned": (lambda made: made["plan"]["full"], KeyError, "the plan has mask kinds"),
    "a sequence of another rank": (lambda made: made["plan"].last_row("z"), ValueError, "rank 0 has new tokens of"),
    "an advance after the last step": (lambda made: (over(made), made["plan"].advance()), RuntimeError, "this decode plan is over"),
    "memory of other pages": (lambda made: cpflex.make_decode_plan(made["mask"], arguments()["pages"], made["new"], into=made["plan"]), ValueError, "into must be a decode plan of the same pages"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_a_step_that_cannot_be_right_is_refused_by_name(name: str):
    change, kind, message = LOCAL[name]
    made = arguments()
    change(made)
    with pytest.raises(kind, match=message):
        step(made)


@pytest.mark.parametrize("name", WITHOUT_A_STEP)
def test_a_plan_that_cannot_be_made_is_refused_by_name(name: str):
    change, kind, message = WITHOUT_A_STEP[name]
    with pytest.raises(kind, match=message):
        change(arguments())


def test_pages_to_look_at_compute_nothing():
    pages = cpflex.Pages(8, 4, rank=0, world_size=2)
    pages.reserve("a", 8)
    plan = cpflex.make_decode_plan(cpflex.causal(), pages, {"a": 1})
    with pytest.raises(RuntimeError, match="make them with the group of the ranks"):
        pages.pool(1, 8).assign(*[torch.zeros(1, 1, 1, 8)] * 2, plan)


# -- a rank that is unlike the others


def skips(made: Made) -> None:
    made["plan"].advance()


def skips_a_layer(made: Made) -> None:
    made["plan"].steps.num_calls += 1


def other_tokens(made: Made) -> None:
    made["plan"].require_same([7, 1, 3])


def reserves(made: Made) -> None:
    made["pages"].reserve("a", 60)
    replan()(made)


MISMATCHES: dict[str, tuple[Callable[[Made], None], str]] = {
    "a rank that skipped a step": (skips, "steps before this one"),
    "a rank that skipped a layer": (skips_a_layer, "attentions before this one"),
    "another sampled token": (other_tokens, "new tokens of this step"),
    "another table": (reserves, "what was done to the pages"),
    "fewer sequences": (replan({"a": 1}), "what was done to the pages"),
    "another score mod": (options(score_mod=None), "score_mod"),
    "another scale": (options(scale=0.5), "scale"),
    "other heads": (lambda made: made.update(q=made["q"][:, :2]), "query"),
}


def step_with_a_mistake(group: Any, name: str, culprit: int) -> None:
    """A step without a fault, then one with it."""
    made = arguments(group)
    step(made)
    made["plan"].require_same([7, 1, 2])
    rank = group.rank if isinstance(group.rank, int) else group.rank()
    if rank == culprit:
        (LOCAL[name][0] if name in LOCAL else MISMATCHES[name][0])(made)
        if name == "fewer sequences":
            made.update({x: made[x][:, :, :1] for x in "qkv"})
    step(made)


def caught(group: Any, name: str, culprit: int) -> Exception | None:
    try:
        step_with_a_mistake(group, name, culprit)
    except Exception as error:  # noqa: BLE001 - it is what is looked for
        return error
    return None


ON_RANKS = [name for name in LOCAL if name != "no plan"]  # without it there is no group to tell


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", ON_RANKS)
def test_a_mistake_of_one_rank_is_raised_on_every_thread(name: str):
    culprit = ON_RANKS.index(name) % 3
    found = run_ranks(lambda group: caught(group, name, culprit), 3, timeout=30.0)
    assert isinstance(found[culprit], LOCAL[name][1])
    for error in found[:culprit] + found[culprit + 1 :]:
        assert isinstance(error, cpflex.RankMismatch)
        assert f"group rank {culprit} raised {type(found[culprit]).__name__}: {found[culprit]}" in str(error)


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_step_unlike_the_others_is_raised_on_every_thread(name: str):
    for error in run_ranks(lambda group: caught(group, name, 1), 3, timeout=30.0):
        assert isinstance(error, cpflex.RankMismatch), error
        assert f"the ranks disagree about {MISMATCHES[name][1]}: group ranks 0, 2: " in str(error)


def after_a_mistake(group: Any, name: str) -> bool:
    """Whether the group goes on after a step that was refused."""
    first = caught(group, name, 1)
    made = arguments(group)
    for _ in range(2):
        step(made)
    return first is not None


@pytest.mark.parametrize("name", ["another sampled token", "fewer sequences", "heads that do not divide"])
def test_nothing_is_left_in_flight_after_a_mistake(name: str, two_processes: RankProcesses):
    assert run_ranks(lambda group: after_a_mistake(group, name), 2) == [True, True]
    assert two_processes.run(after_a_mistake, name) == [True, True]


def assert_all_raise(outcomes: list[Outcome], culprit: int, name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is not None and not isinstance(outcome.error, TimeoutError), f"rank {rank} did not raise"
        assert outcome.seconds < patience(10)
        if rank == culprit and name in LOCAL:
            assert isinstance(outcome.error, LOCAL[name][1])
            continue
        assert isinstance(outcome.error, cpflex.RankMismatch)
        what = MISMATCHES[name][1] if name in MISMATCHES else f"group rank {culprit} raised"
        assert what in str(outcome.error)


@pytest.mark.by_day(4)
@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.parametrize(
    "name", [*MISMATCHES, "queries that want gradients", "keys of another step", "a step after the horizon"]
)
def test_a_mistake_of_one_process_is_raised_on_all(name: str, processes: RankProcesses):
    culprit = processes.world_size - 1
    assert_all_raise(processes.outcomes(step_with_a_mistake, name, culprit, timeout=20), culprit, name)


# -- queries and results that travel


def served(group: dist.ProcessGroup, rows: Any, travel: Any = None) -> list[torch.Tensor]:
    """Three steps, of which this rank brings its rows and gets their results."""
    import serving

    service, mask, options = serving.Service(group, seed=1), serving.MASKS["window"], {"rows": rows, "travel": travel}
    for seq in "abc":
        service.reserve(seq, 30)
    service.step(cpflex.make_decode_plan(mask, service.pages, {"a": 9, "c": 5}, **options), mask)
    plan = cpflex.make_decode_plan(mask, service.pages, {"c": 1, "b": 2, "a": 1}, **options)
    return [service.step(plan, serving.MASKS["window"], softcap)[0] for _ in range(2)]


@pytest.mark.by_day(2)
@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.parametrize("rows", [cpflex.everyone, cpflex.by_sequence, cpflex.by_token, cpflex.by_head])
def test_processes_compute_what_threads_do(rows: Any, processes: RankProcesses):
    found = processes.run(served, rows)
    for ours, theirs in zip(found, run_ranks(lambda group: served(group, rows), processes.world_size), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_tokens_of_each_rank_alone_are_not_compared():
    made = arguments(rows=cpflex.by_sequence)
    with pytest.raises(ValueError, match="tokens of by_sequence are not the same on every rank"):
        made["plan"].require_same([1, 2, 3])


def test_heads_that_ranks_cannot_share_are_refused():
    def refused(group: Any) -> str:
        made = arguments(group, rows=cpflex.by_head)
        made["q"] = made["q"][:, :1]
        try:
            step(made)
        except ValueError as error:
            return str(error)
        return ""

    for said in run_ranks(refused, 3):
        assert "must be a multiple of the pool's 2; got 3, 1 on each of 3" in said


# -- headers inside messages, as on devices


FORMS = [
    (cpflex.everyone, None),
    (cpflex.by_head, None),
    *((rows, travel) for rows in (cpflex.by_sequence, cpflex.by_token) for travel in (cpflex.queries, cpflex.keys)),
]


@pytest.mark.parametrize(("rows", "travel"), FORMS)
def test_headers_inside_of_messages_change_no_result(rows: Any, travel: Any, monkeypatch: pytest.MonkeyPatch):
    ahead = run_ranks(lambda group: served(group, rows, travel), 2)
    monkeypatch.setattr("cpflex.paging.together.compares_on", lambda device: True)
    inside = run_ranks(lambda group: served(group, rows, travel), 2)
    assert all(torch.equal(x, y) for a, b in zip(ahead, inside, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["another sampled token", "a rank that skipped a step", "heads that do not divide"])
def test_headers_inside_of_messages_stop_every_rank(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cpflex.paging.together.compares_on", lambda device: True)
    for rank, error in enumerate(run_ranks(lambda group: caught(group, name, 1), 3, timeout=30.0)):
        if name in MISMATCHES or rank != 1:
            assert "the ranks of a decode step do different things" in str(error)
        else:
            assert isinstance(error, LOCAL[name][1])
