"""Plans as bytes: the same plan comes back, nothing in the bytes is run, and whatever was changed is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import pickletools
import random
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import cpflex
from cases import FACTORS, Problem, pairwise
from cpflex.planning import plan_bytes
from cpflex.planning.plan import VERSION
from cpflex.testing import ThreadLinks, run_ranks

STORED = Path(__file__).parent / "stored"
"""Of `test_a_plan_written_before_is_the_same_or_refused_by_its_version`, one of each format that was released."""

SAMPLE = [
    Problem(**row, seq_len=300, heads="gqa")
    for row in pairwise({name: FACTORS[name] for name in ("mask", "layout", "schedule")} | {"world_size": [1, 2, 4, 7]})
]


def plan_of(problem: Problem, rank: int = 0) -> cpflex.Plan:
    return problem.plan(None, rank=rank, world_size=problem.world_size)


def small_plan() -> cpflex.Plan:
    masks = {
        "full": cpflex.causal() & cpflex.document(torch.arange(1500) // 400),
        "sliding": cpflex.causal() & (lambda b, h, q, k: (q - k) * 1.0 < 40.5),
    }
    return cpflex.make_plan(masks, 1500, rank=1, world_size=3)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_the_same_plan_comes_back_and_is_right(problem: Problem):
    plan = plan_of(problem, problem.world_size - 1)
    for again in (cpflex.Plan.from_bytes(plan.to_bytes()), pickle.loads(pickle.dumps(plan))):
        assert again.to_bytes() == plan.to_bytes()
        assert (again.fingerprint, again.stats, repr(again)) == (plan.fingerprint, plan.stats, repr(plan))
        again.check()


@pytest.mark.parametrize(
    "table",
    [
        torch.arange(64).bfloat16(),
        torch.arange(64) % 3 == 0,
        torch.arange(128, dtype=torch.int16)[::2],
        torch.ones(1).expand(64),
        torch.arange(640).view(10, 64).T,
    ],
    ids=["bfloat16", "bool", "strided", "expanded", "transposed"],
)
def test_tables_of_any_kind_come_back(table: torch.Tensor):
    plan = cpflex.make_plan(lambda b, h, q, k: (table[q] if table.ndim == 1 else table[q, 3]) == 0, 64)
    again = cpflex.Plan.from_bytes(plan.to_bytes())
    assert again.fingerprint == plan.fingerprint
    assert torch.equal(again.kinds["mask"].mask.captured[0], table)


def test_a_pickle_holds_nothing_but_the_bytes():
    operations = pickletools.genops(pickle.dumps(small_plan(), protocol=2))
    names = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    assert names <= {"cpflex.planning.plan _unpickled", "_codecs encode"}


def test_bytes_that_are_no_plan_are_refused():
    for data in (b"", b"cpflex", b"\x80\x04N.", pickle.dumps(small_plan())):
        with pytest.raises(ValueError, match="not a plan; pass what"):
            cpflex.Plan.from_bytes(data)


def test_a_plan_of_another_version_is_refused():
    with mock.patch("cpflex.planning.plan.VERSION", "cpflex 9.0, plan format 3"):
        data = small_plan().to_bytes()
    with pytest.raises(ValueError, match=r"made by cpflex 9\.0, plan format 3; this is cpflex .* make it again"):
        cpflex.Plan.from_bytes(data)
    stored = pickle.dumps(small_plan())
    with (
        mock.patch("cpflex.planning.plan.VERSION", "cpflex 9.0, plan format 3"),
        pytest.raises(ValueError, match="make it again"),
    ):
        pickle.loads(stored)


def stored_before(rank: int) -> cpflex.Plan:
    """Of whose rank 1 ``to_bytes()`` is in `STORED`; those before format 4 have the first two kinds."""

    def odd(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | table[k % 64]

    table, where = torch.arange(64) % 3 > 0, {"rank": rank, "world_size": 2}
    masks: dict[str, Any] = {"full": cpflex.causal() & cpflex.document(cu_seqlens=[0, 100, 300]), "odd": odd}
    encoder = cpflex.make_plan(cpflex.full(), 700, **where, layout=cpflex.striped)
    masks["cross"] = cpflex.cross(cpflex.document(torch.arange(300) // 90, kv_ids=torch.arange(700) // 200), encoder)
    masks["images"] = cpflex.cross(lambda b, h, q, k: table[k % 64] & (k <= q // 4), 64)
    return cpflex.make_plan(masks, 300, **where)


@pytest.mark.parametrize("stored", sorted(STORED.iterdir()), ids=lambda path: path.stem)
def test_a_plan_written_before_is_the_same_or_refused_by_its_version(stored: Path):
    data = stored.read_bytes()
    if f'"{VERSION}"'.encode() not in data:
        with pytest.raises(ValueError, match=r"was made by cpflex .* make it again"):
            cpflex.Plan.from_bytes(data)
        return
    plan, again = stored_before(1), cpflex.Plan.from_bytes(data)
    assert again.stats == plan.stats
    assert again.layout == plan.layout
    assert again.to_bytes() == plan.to_bytes() == data

    def on_rank(group: ThreadLinks, of_rank_1: cpflex.Plan) -> list[Tensor]:
        whole = (of_rank_1 if group.rank else stored_before(0)).bind(group)
        outs = []
        for kind in ("full", "cross", "images"):
            random, bound = torch.Generator().manual_seed(group.rank), whole[kind]
            q, k, v = (
                torch.randn(1, 2, n, 8, generator=random)
                for n in (bound.local_len, bound.kv_local_len, bound.kv_local_len)
            )
            outs.append(cpflex.flex_attention(q, k, v, block_mask=bound))
        return outs

    torch.testing.assert_close(
        *(run_ranks(partial(on_rank, of_rank_1=one), 2) for one in (again, plan)), rtol=0, atol=0
    )


def test_any_byte_that_changed_is_noticed():
    data, rng = small_plan().to_bytes(), random.Random(0)
    for at in [*range(len(plan_bytes.MAGIC), 60), *(rng.randrange(60, len(data)) for _ in range(300))]:
        other = bytearray(data)
        other[at] ^= 1 << rng.randrange(8)
        with pytest.raises(ValueError, match="the plan is damaged"):
            cpflex.Plan.from_bytes(bytes(other))
    for length in (12, 44, 60, len(data) - 1):
        with pytest.raises(ValueError, match="the plan is damaged"):
            cpflex.Plan.from_bytes(data[:length])


# -- plans that someone changed and signed again


def opened(data: bytes) -> tuple[dict[str, Any], list[bytearray]]:
    """Header and arrays."""
    rest = data[plan_bytes.START :]
    size = int.from_bytes(rest[:8], "little")
    header, arrays, at = json.loads(rest[8 : 8 + size]), [], 8 + size
    for length in header["sizes"]:
        arrays.append(bytearray(rest[at : at + length]))
        at += length
    return header, arrays


def signed(header: dict[str, Any], arrays: list[bytearray]) -> bytes:
    text = json.dumps(header).encode()
    rest = b"".join([len(text).to_bytes(8, "little"), text, *arrays])
    return plan_bytes.MAGIC + hashlib.sha256(rest).digest() + rest


def leaves(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all that is neither a list nor a dict; "reason" is what a plan says, not what it does."""
    if isinstance(tree, list | dict):
        items = enumerate(tree) if isinstance(tree, list) else tree.items()
        return [leaf for key, part in items if key != "reason" for leaf in leaves(part, (*path, key))]
    return [path]


def other_value(value: Any, rng: random.Random) -> Any:
    """Another value than this, of the same kind or of another."""
    near = {
        bool: [not value],
        int: [value + 1, value - 1, -value - 1, value + 2**33] if isinstance(value, int) else [],
        float: [value * 2 + 1] if isinstance(value, float) else [],
        str: [f"{value}x", str(value)[:-1] + "?"],
    }.get(type(value), [0])
    return rng.choice([*near, None if value is not None else 1, "", [], {"dict": {}}])


def changed(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A plan in which one number, word or element of a table is another; and which."""
    header, arrays = opened(data)
    paths = leaves(header["value"])
    filled = [i for i, array in enumerate(arrays) if array]
    if rng.random() < 0.4:
        index = rng.choice(filled)
        at = rng.randrange(len(arrays[index]))
        arrays[index][at] ^= 1 << rng.randrange(8)
        return signed(header, arrays), f"array {index} at {at}"
    path = rng.choice(paths)
    *above, last = path
    tree = header["value"]
    for key in above:
        tree = tree[key]
    tree[last] = other_value(tree[last], rng)
    return signed(header, arrays), f"{path} = {tree[last]!r}"


def refuses(data: bytes) -> bool:
    try:
        cpflex.Plan.from_bytes(data)
    except ValueError as error:
        assert "plan" in str(error), error
        return True
    return False


PLANS = {
    "two kinds": small_plan,
    "ring": lambda: cpflex.make_plan(
        cpflex.causal(), 700, rank=2, world_size=4, layout=cpflex.zigzag, schedule=cpflex.ring
    ),
    "heads": lambda: Problem("window_per_head", seq_len=300, heads="gqa").plan(None, rank=0, world_size=2),
    "alone": lambda: cpflex.make_plan(cpflex.prefix_lm(100), 500),
}


@pytest.mark.by_day(4)
@pytest.mark.parametrize("name", PLANS)
def test_every_change_of_a_plan_is_refused(name: str):
    data, rng = PLANS[name]().to_bytes(), random.Random(0)
    assert not refuses(data)
    for case in range(250):
        tampered, what = changed(data, rng)
        assert refuses(tampered), f"case {case}: {what} was not noticed"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("name", PLANS)
def test_a_thousand_changes_of_a_plan_are_refused(name: str, seed: int):
    data, rng = PLANS[name]().to_bytes(), random.Random(seed)
    for case in range(250):
        tampered, what = changed(data, rng)
        assert refuses(tampered), f"seed {seed}, case {case}: {what} was not noticed"


def test_a_name_of_something_else_is_not_looked_up():
    header, arrays = opened(small_plan().to_bytes())
    for name in ("eval", "os.system", "Plan", "__import__"):
        header["value"][0] = {name: ["print('run')"]}
        assert refuses(signed(header, arrays))


def test_a_plan_whose_mask_captures_nan_is_checked():
    bias = torch.tensor([0.0, float("nan"), 1.0]).repeat(8)
    plan = cpflex.make_plan(lambda b, h, q, k: (k <= q) & ~(bias[k] > 0.5), 24, rank=1, world_size=2)
    plan.check()
    cpflex.Plan.from_bytes(plan.to_bytes()).check()


def test_a_plan_with_a_schedule_of_ones_own_is_checked_with_it():
    def mine(layout, rank, needs):
        made = cpflex.direct(layout, rank, needs)
        return type(made)("mine", made.reason, made.exchanges, made.recv_tokens)

    plan = cpflex.make_plan(cpflex.causal(), 700, rank=2, world_size=4, schedule=mine)
    with pytest.raises(ValueError, match=r"plan\.check\(schedule=mine\)"):
        plan.check()
    plan.check(schedule=mine)
    with pytest.raises(ValueError, match="the plan is wrong"):
        plan.check(schedule=cpflex.ring)
