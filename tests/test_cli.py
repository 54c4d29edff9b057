"""python -m cpflex explain: what it prints, the masks it understands, the errors it gives."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import cpflex
from cpflex.__main__ import _masks, main
from cpflex.masks import MaskFn
from cpflex.seeing import doctor
from patience import patience

WINDOW = cpflex.causal() & cpflex.sliding_window(4096)
MILLION = ["--mask", "causal,window:4096,doc:lengths.txt", "--seq-len", "1m", "--ranks", "64", "--rank", "9"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpflex", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=patience(120))


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_million_tokens_on_64_ranks_take_less_than_ten_seconds(tmp_path: Path):
    lengths = [1000] * 1048 + [576]
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, lengths)))
    before = cpu_seconds_of_children()
    result = run("explain", *MILLION, cwd=tmp_path)
    assert cpu_seconds_of_children() - before < patience(10)
    assert result.returncode == 0, result.stderr
    cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    mask = WINDOW & cpflex.document(cu_seqlens=cu_seqlens)
    assert result.stdout == cpflex.make_plan(mask, 1 << 20, rank=9, world_size=64).explain() + "\n"


def test_an_error_exits_with_status_2_and_imports_no_matplotlib(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import sys\ndef mask(b, h, q, k):\n    raise ValueError('matplotlib' in sys.modules)\n"
    )
    result = run("explain", "--mask", "mine:mask", "--seq-len", "64", "--ranks", "2", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.endswith("python -m cpflex explain: error: False\n")


def test_help_shows_the_terms_and_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["explain", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for words in ("causal", "window:L:R", "doc:FILE", "prefix:N", "module:function", "examples:", "--plot FILE"):
        assert words in text


def test_plot_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "plan.png"
    main(["explain", "--mask", "causal", "--seq-len", "2k", "--ranks", "2", "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"\nwrote {path}\n")


def test_layout_schedule_and_kinds_reach_the_plan(capsys: pytest.CaptureFixture[str]):
    kinds = ["--mask", "full=causal", "--mask", "sliding=causal,window:100"]
    where = ["--seq-len", "2000", "--ranks", "4"]
    main(["explain", *kinds, *where, "--layout", "striped", "--schedule", "direct"])
    masks: dict[str, MaskFn] = {"full": cpflex.causal(), "sliding": cpflex.causal() & cpflex.sliding_window(100)}
    plan = cpflex.make_plan(masks, 2000, rank=0, world_size=4, layout=cpflex.striped, schedule=cpflex.direct)
    assert capsys.readouterr().out == plan.explain() + "\n"
    main(["explain", *kinds, *where, "--weights", "full=1, sliding=2.5"])
    weighed = cpflex.make_plan(masks, 2000, rank=0, world_size=4, weights={"full": 1, "sliding": 2.5})
    assert capsys.readouterr().out == weighed.explain() + "\n"


def test_doctor_says_what_there_is_and_tests_it(tmp_path: Path):
    result = run("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("cpflex       0.1.0", f"torch        {version('torch')}", "kernels      ", "dv   is off by"):
        assert words in result.stdout
    assert "passed in" in result.stdout


def test_doctor_fails_where_attention_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_test", lambda device, num_ranks: {"out": 1e-7, "dk": 0.3})
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1
    assert "dk   is off by 3.0e-01 of its largest number; 1e-05 is allowed" in capsys.readouterr().out

    def broken(device: str, num_ranks: int) -> dict[str, float]:
        raise ConnectionError("no way to rank 1")

    monkeypatch.setattr(doctor, "_test", broken)
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "FAILED after 0.0 s\n\nno way to rank 1" in capsys.readouterr().out


# -- masks


def every_third(b, h, q, k):
    return (q - k) % 3 == 0


MASKS: dict[str, MaskFn] = {
    "causal": cpflex.causal(),
    "full": cpflex.full(),
    "window:10": cpflex.sliding_window(10),
    "window:1k": cpflex.sliding_window(1024),
    "window:9:21": cpflex.sliding_window(9, 21),
    "prefix:30": cpflex.prefix_lm(30),
    "doc:lengths.txt": cpflex.document(cu_seqlens=[0, 10, 11, 64]),
    "causal,window:10,doc:lengths.txt": cpflex.sliding_window(9, 0) & cpflex.document(cu_seqlens=[0, 10, 11, 64]),
    "causal, prefix:30": cpflex.causal(),
    "tree:branches.txt": cpflex.tree([-1, 0, 1, 0], [20, 10, 4, 30]),
    "window:5, tree:branches.txt": (
        cpflex.tree([-1, 0, 1, 0], [20, 10, 4, 30])
        & cpflex.sliding_window(5, positions=torch.tensor([*range(34), *range(20, 50)]))
    ),
    "masks_of_mine:every_third": every_third,
    "masks_of_mine:every_third,causal": cpflex.causal() & every_third,
    "masks_of_mine:windowed": cpflex.sliding_window(5, 5),
}


@pytest.mark.parametrize("spec", MASKS)
def test_a_mask_means_what_its_terms_say(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lengths.txt").write_text("10 1\n53\n")
    (tmp_path / "branches.txt").write_text("-1 20\n0 10\n 1\t4\n0 30\n")
    (tmp_path / "masks_of_mine.py").write_text(
        "import cpflex\nwindowed = cpflex.sliding_window(5, 5)\ndef every_third(b, h, q, k): return (q - k) % 3 == 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    zero, q, k = torch.tensor(0), torch.arange(64)[:, None], torch.arange(64)
    (mask,) = _masks([spec], 64).values()
    assert torch.equal(mask(zero, zero, q, k), MASKS[spec](zero, zero, q, k))


def test_kinds_are_named_and_one_needs_no_name():
    assert list(_masks(["causal"], 64)) == ["mask"]
    assert list(_masks(["all=causal"], 64)) == ["all"]
    assert list(_masks(["full=causal", "sliding=causal,window:5"], 64)) == ["full", "sliding"]


# -- errors

SIZES = ["--seq-len", "64", "--ranks", "2"]
ERRORS = {
    "unknown_term": (["--mask", "causal,windw:3", *SIZES], "unknown mask term 'windw:3'; the terms are\n\n  causal "),
    "unknown_module": (["--mask", "windw:x", *SIZES], "and there is no module 'windw'; the terms are"),
    "empty_term": (["--mask", "causal,,full", *SIZES], "unknown mask term ''"),
    "wrong_count": (["--mask", "window", *SIZES], "unknown mask term 'window'"),
    "no_size": (["--mask", "window:3x", *SIZES], "a size must be a number, or one such as 64k or 1m; got '3x'"),
    "wrong_weights": (
        ["--mask", "causal", "--weights", "causal:3", *SIZES],
        "--weights must look like full=8,sliding=40",
    ),
    "unknown_weight": (
        ["--mask", "causal", "--weights", "full=3", *SIZES],
        "weights must give each mask kind of ['mask']",
    ),
    "no_seq_len": (["--mask", "causal", "--seq-len", "1mb", "--ranks", "2"], "argument --seq-len: a size must be"),
    "window_of_none": (["--mask", "window:0", *SIZES], "window must be an integer of at least 1; got 0"),
    "no_mask_mod": (["--mask", "sys:path", *SIZES], "mask term 'sys:path' must name a mask_mod"),
    "not_pointwise": (["--mask", "test_cli:reducing", *SIZES], "mask_mod 'reducing'"),
    "needs_heads": (["--mask", "test_cli:per_head", *SIZES], "pass num_heads="),
    "no_file": (["--mask", "doc:nowhere.txt", *SIZES], "No such file or directory: 'nowhere.txt'"),
    "no_lengths": (
        ["--mask", "doc:words.txt", *SIZES],
        "words.txt must hold the documents' lengths, each at least 1; got 'a'",
    ),
    "cu_seqlens": (
        ["--mask", "doc:cu.txt", *SIZES],
        "cu.txt must hold the documents' lengths, each at least 1; got '0'",
    ),
    "wrong_sum": (["--mask", "doc:short.txt", *SIZES], "short.txt must sum to the sequence's 64 tokens; got 40"),
    "no_tree": (["--mask", "tree:words.txt", *SIZES], "words.txt must hold a parent and a length of each segment"),
    "short_tree": (["--mask", "causal,tree:cu.txt", *SIZES], "cu.txt must hold a parent and a length"),
    "tree_of_less": (["--mask", "tree:branches.txt", *SIZES], "sum to seq_len=64; they sum to 30: row 1 is the last"),
    "unnamed": (["--mask", "causal", "--mask", "b=full", *SIZES], "for instance --mask sliding=causal; got 'causal'"),
    "named_twice": (["--mask", "a=causal", "--mask", "a=full", *SIZES], "must have different names; got 'a' twice"),
    "no_such_rank": (["--mask", "causal", "--rank", "2", *SIZES], "rank must be from 0 to world_size - 1"),
    "no_such_layout": (["--mask", "causal", "--layout", "ring", *SIZES], "argument --layout: invalid choice: 'ring'"),
    "no_mask": (SIZES, "the following arguments are required: --mask"),
}


def reducing(b, h, q, k):
    return (q - k).sum() > 0


def per_head(b, h, q, k):
    return k <= q + h


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_must_hold(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, text in {"words": "a few words", "cu": "0 24 64", "short": "24 16", "branches": "-1 10\n0 20"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["explain", *arguments])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "usage: python -m cpflex explain" in printed.err
    assert not printed.out
