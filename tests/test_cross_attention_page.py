"""The page about two lengths: its python runs and means what the text around it says."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch

import cpflex
from pages import DOCS, names_of


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return names_of("cross-attention.md")


def test_the_first_example_is_dense_attention(page: dict[str, Any]):
    seen = page["target_ids"][:, None] == page["source_ids"]
    for head in (0, 7):
        q, k, out = page["q"][0, head, :2000], page["k"][0, head // 4, :6000], page["out"][0, head, :2000]
        weights = (q @ k.mT / 8).masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(out, weights @ k)


def test_plans_of_the_page_leave_no_tile_unproven(page: dict[str, Any]):
    for plan in (page["decoder"], page["plan"], page["draft"]):
        for name in plan.kinds:
            assert plan[name].stats["unproven_tiles"] == 0, name


def test_kinds_are_merged_to_one_softmax(page: dict[str, Any]):
    q, memory, own = torch.randn(48, 2, 16), torch.randn(6000, 2, 16), torch.randn(48, 2, 16)
    kinds = [
        cpflex.flex_attention(q, x, x, block_mask=page["draft"][kind], return_lse=True)
        for kind, x in (("memory", memory), ("block", own))
    ]
    found = page["merged"](*kinds[0], *kinds[1])
    place = torch.arange(48)
    seen = torch.cat(
        [torch.arange(6000) < page["limit"][:, None], place[:, None] // page["block"] == place // page["block"]], dim=1
    )
    keys = torch.cat([memory, own])
    scores = (torch.einsum("qhd,khd->hqk", q, keys) / 4).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(found, torch.einsum("hqk,khd->qhd", scores.softmax(-1), keys))


def test_two_kinds_that_see_nothing_are_merged_to_nothing(page: dict[str, Any]):
    lse = torch.full((3, 2), -torch.inf, requires_grad=True)
    out = page["merged"](torch.zeros(3, 2, 4), lse, torch.zeros(3, 2, 4), lse)
    (grad,) = torch.autograd.grad(out.sum(), lse)
    assert out.eq(0).all()
    assert grad.eq(0).all()


def test_the_picture_is_drawn_by_its_file(monkeypatch: pytest.MonkeyPatch, page: dict[str, Any]):
    drawn: list[tuple[cpflex.Plan, str]] = []
    monkeypatch.setattr(cpflex.Plan, "plot", lambda plan, path: drawn.append((plan, path)))
    runpy.run_path(str(DOCS / "images" / "cross.py"))
    ((plan, path),) = drawn
    assert path == str(DOCS / "images" / "cross.png")
    assert (plan.seq_len, plan["cross"].kv_seq_len, plan.world_size) == (2000, 6000, 4)
    assert "6,000 of another sequence, balanced: 6 chunks of 256 tokens per rank" in plan.explain()
