"""launch/verify.py: it passes where it should, and it can fail."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cpflex
import dense
import verify
from patience import patience

ROOT = Path(__file__).parents[2]
TINY = ["--seq-len", "45", "--batch-size", "1", "--heads", "2", "--kv-heads", "1", "--head-dim", "16"]
TINY += ["--device", "cpu"]

USER_MODULE = """
import torch
import cpflex

temperature = torch.nn.Parameter(torch.tensor(0.7))
ids = list(range(3))

def strided(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & ((q_idx - kv_idx) % 4 == 0)

def halves(seq_len):
    return cpflex.document(torch.arange(seq_len) * 2 // seq_len)

def sharpened(score, b, h, q_idx, kv_idx):
    return score * temperature

def reduced(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx).all()

def not_a_mask(seq_len):
    return seq_len

is_traced = False

def another_once_traced(score, b, h, q_idx, kv_idx):
    global is_traced
    factor, is_traced = (1.01 if is_traced else 1.0), True
    return score * factor
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's current directory."""
    (tmp_path / "my_mods.py").write_text(USER_MODULE)
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "verify.py"), *TINY, *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=patience(200), env=_without_ranks()
    )


def _without_ranks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


# end to end


@pytest.mark.by_day(4)
def test_two_ranks_pass_with_the_score_mods_of_the_table(folder: Path):
    done = run(folder, "--mask", "cpflex:causal")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks, gloo on the CPU")
    assert "cpflex:causal, relative bias" in done.stdout
    assert f"{4 * len(verify.LAYOUTS) * len(verify.SCHEDULES)} of 80 passed" in done.stdout


@pytest.mark.by_day(4)
@pytest.mark.parametrize("mask", ["my_mods:strided", "my_mods:halves"], ids=["a mask_mod", "of the sequence length"])
def test_a_user_verifies_their_own_mods_from_their_own_directory(folder: Path, mask: str):
    done = run(folder, "--mask", mask, "--score-mod", "my_mods:sharpened", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert f"{mask}, my_mods:sharpened" in done.stdout
    assert "d captured" in done.stdout
    assert "20 of 20 passed" in done.stdout


@pytest.mark.by_day(4)
def test_ranks_that_compute_something_else_fail(folder: Path):
    done = run(folder, "--mask", "cpflex:causal", "--score-mod", "my_mods:another_once_traced")
    assert done.returncode != 0
    assert "0 of 20 passed" in done.stdout
    assert "FAIL cpflex:causal, my_mods:another_once_traced: balanced, auto" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", verify.DTYPES)
def test_the_whole_table_passes(folder: Path, dtype: str):
    done = run(folder, "--dtype", dtype)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bad_mask_is_reported_once_before_ranks_start(folder: Path):
    done = run(folder, "--mask", "my_mods:stridden")
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("verify: --mask my_mods:stridden: module 'my_mods'")
    assert line.endswith("has no 'stridden'")


# what the user names

BAD_MODS = [
    ("--mask", "strided", "say MODULE:NAME"),
    ("--mask", ":strided", "say MODULE:NAME"),
    ("--mask", "no_such_module:strided", "no module 'no_such_module'"),
    ("--mask", "my_mods.masks:strided", "no module 'my_mods.masks'"),
    ("--mask", "my_mods:sharpened", r"needs a function \(b, h, q_idx, kv_idx\)"),
    ("--mask", "my_mods:ids", r"needs a function .*; got \[0, 1, 2\]"),
    ("--mask", "my_mods:not_a_mask", r"needs a function .*; got 45"),
    ("--mask", "my_mods:reduced", "uses a reduction"),
    ("--mask", "cpflex:document", "document"),
    ("--score-mod", "my_mods:strided", r"needs a function \(score, b, h, q_idx, kv_idx\)"),
    ("--score-mod", "my_mods:nothing", "has no 'nothing'"),
]


@pytest.mark.parametrize(("option", "place", "message"), BAD_MODS, ids=[f"{o} {p}" for o, p, _ in BAD_MODS])
def test_a_mistake_in_a_mod_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, option: str, place: str, message: str
):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_mods", raising=False)
    with pytest.raises(SystemExit, match=f"^verify: {option} {place}: .*{message}") as failure:
        verify.chosen_mods(verify.parse_options([*TINY, option, place]), torch.device("cpu"))
    assert failure.value.code != 0


def test_a_module_that_cannot_import_something_else_shows_its_own_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        verify.load("needs_more:mask", "b, h, q_idx, kv_idx", seq_len=8)


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5"])
def test_sizes_are_positive_integers(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        verify.parse_options(["--seq-len", text])
    assert "must be a positive integer" in capsys.readouterr().err


def test_every_layout_and_schedule_of_cpflex_is_verified():
    public = [getattr(cpflex, name) for name in cpflex.__all__]
    parameters = {fn: [*inspect.signature(fn).parameters] for fn in public if inspect.isfunction(fn)}
    assert {fn for fn, names in parameters.items() if names[:2] == ["seq_len", "world_size"]} == set(verify.LAYOUTS)
    assert {fn for fn, names in parameters.items() if names[:2] == ["layout", "rank"]} == set(verify.SCHEDULES)


# the oracle


def plain_attention(inputs: dense.Inputs, bias: Tensor) -> dict[str, Tensor]:
    """Causal attention with a relative bias, straight from its definition, differentiated by autograd."""
    q, k, v, bias = (x.double().detach().requires_grad_() for x in (*inputs[:3], bias))
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    distance = torch.arange(q.shape[2]).view(-1, 1) - torch.arange(q.shape[2])
    scores = q @ wide_k.mT / math.sqrt(q.shape[3]) + bias[:, distance + q.shape[2]]
    scores = scores.masked_fill(distance < 0, -math.inf)
    out, lse = scores.softmax(dim=-1) @ wide_v, scores.logsumexp(dim=-1)
    grads = torch.autograd.grad((out, lse), (q, k, v, bias), (inputs.grad_out.double(), inputs.grad_lse.double()))
    return dict(zip(("out", "lse", "dq", "dk", "dv", "d captured"), (out, lse, *grads), strict=True))


@pytest.fixture
def inputs() -> dense.Inputs:
    options = argparse.Namespace(batch_size=2, heads=4, kv_heads=2, seq_len=150, head_dim=16, dtype="fp32")
    return verify.random_inputs(options, torch.device("cpu"))


@pytest.fixture
def biased() -> tuple[cpflex.attention.ScoreMod, Tensor]:
    bias = torch.randn(4, 300, requires_grad=True)
    return cpflex.score_mod(lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx - kv_idx + 150]), bias


def test_the_oracle_is_attention(inputs: dense.Inputs, biased: tuple[cpflex.attention.ScoreMod, Tensor]):
    score_mod, bias = biased
    oracle = dense.ask(inputs, cpflex.causal(), score_mod)
    for name, plain in plain_attention(inputs, bias).items():
        torch.testing.assert_close(oracle.exact[name], plain, rtol=1e-12, atol=1e-12, msg=name)


def test_the_budget_is_a_few_roundings(inputs: dense.Inputs, biased: tuple[cpflex.attention.ScoreMod, Tensor]):
    limits = dense.ask(inputs, cpflex.causal(), biased[0]).limits
    assert all(1.2e-7 < limit < 3e-6 for limit in limits.values()), limits


def test_a_query_that_sees_no_key_has_minus_infinity_in_the_oracle(inputs: dense.Inputs):
    oracle = dense.ask(inputs, lambda b, h, q_idx, kv_idx: kv_idx < q_idx, None)
    assert (oracle.exact["lse"][:, :, 0] == -math.inf).all()
    assert all(math.isfinite(limit) for limit in oracle.limits.values())
    assert (oracle.exact["out"][:, :, 0] == 0).all()
    assert (oracle.exact["dq"][:, :, 0] == 0).all()


def one_element(x: Tensor) -> None:
    x.view(-1)[x.numel() // 3] += 0.01


def one_row_by_a_thousandth(x: Tensor) -> None:
    x[..., -1, :] *= 1.001


def one_nan(x: Tensor) -> None:
    x.view(-1)[-1] = math.nan


def one_infinity(x: Tensor) -> None:
    x.view(-1)[0] = -math.inf


def two_tokens_swapped(x: Tensor) -> None:
    x[:, :, [3, 4]] = x[:, :, [4, 3]]


DAMAGES = [one_element, one_row_by_a_thousandth, one_nan, one_infinity, two_tokens_swapped]


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "d captured"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_comparison_notices(
    inputs: dense.Inputs,
    biased: tuple[cpflex.attention.ScoreMod, Tensor],
    name: str,
    damage: Callable[[Tensor], None],
):
    if name == "d captured" and damage is two_tokens_swapped:
        damage = one_row_by_a_thousandth
    oracle = dense.ask(inputs, cpflex.causal(), biased[0])
    found = {key: exact.float() for key, exact in oracle.exact.items()}
    assert verdict(oracle, found).passed
    damage(found[name])
    failed = verdict(oracle, found)
    assert not failed.passed
    assert [key for key in found if not failed.errors[key] <= failed.limits[key]] == [name]
    assert "FAIL" in verify.row(failed)
    assert f"FAIL {failed}" in verify.summary([failed], seconds=1.0)


def verdict(oracle: dense.Oracle, found: dict[str, Tensor]) -> verify.Verdict:
    return verify.Verdict("causal", "bias", "zigzag", "ring", oracle.errors(found), oracle.limits)


def test_what_is_found_where_the_truth_is_infinite_is_noticed(inputs: dense.Inputs):
    oracle = dense.ask(inputs, lambda b, h, q_idx, kv_idx: kv_idx < q_idx, None)
    found = {key: exact.float() for key, exact in oracle.exact.items()}
    assert verdict(oracle, found).passed
    found["lse"][:, :, 0] = -1e30
    assert not verdict(oracle, found).passed
