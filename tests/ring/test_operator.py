"""The operator's own part: what it brings to the device of the queries, and which calls share decisions."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import cpflex
from cpflex.ring.handles import resolve
from cpflex.ring.operator import _brought


def test_captured_tensors_elsewhere_are_copied_once_per_call_with_a_warning():
    here = torch.ones(3)
    with pytest.warns(UserWarning, match=r"on \['cpu'\], and query is on meta: they are copied at every call"):
        (moved,) = _brought([here], torch.device("meta"))
    assert moved.device.type == "meta"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _brought([here], torch.device("cpu")) == (here,)


def test_calls_without_captured_tensors_share_what_was_decided():
    plan = cpflex.make_plan(cpflex.causal(), 100)
    slopes = torch.rand(2)
    x = torch.randn(1, 2, plan.local_len, 16)
    calls = resolve(plan.handle).decided
    for score_mod in (None, None, lambda score, b, h, q, k: score - slopes[h] * (q - k)):
        cpflex.flex_attention(x, x, x, score_mod, plan)
        assert len(calls) == 1  # values of captured tensors are those of each call
    cpflex.flex_attention(x, x, x, block_mask=plan, scale=0.5)
    assert [call.scale for call in calls.values()] == [0.25, 0.5]


def test_a_call_that_is_changed_has_decided_nothing():
    plan = cpflex.make_plan(cpflex.causal(), 100)
    x = torch.randn(1, 2, plan.local_len, 16)
    cpflex.flex_attention(x, x, x, block_mask=plan)
    (call,) = resolve(plan.handle).decided.values()
    call.decided["something"] = 1
    assert replace(call, scale=2.0).decided == {}
