"""What the GPU benchmarks do beside timing: what they divide by, their masks, arguments, record and plot."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from patience import patience

ROOT = Path(__file__).parents[2]
MASKS = ("full", "causal", "window", "doc_causal", "doc_window")


def load(path: str) -> ModuleType:
    """Under a name of its own: there are packages called kernels."""
    spec = importlib.util.spec_from_file_location(f"loaded_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # for its documents
    module = load("benchmarks/kernels.py")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


@pytest.fixture
def tune() -> ModuleType:
    return load("launch/tune.py")


def test_the_rows_are_those_that_were_promised(kernels: ModuleType):
    assert len(set(kernels.ROWS)) == len({row.name for row in kernels.ROWS}) == len(kernels.ROWS)
    assert {(row.mask, row.head_dim) for row in kernels.ROWS} == {(mask, dim) for mask in MASKS for dim in (64, 128)}
    assert {(row.score, row.head_dim) for row in kernels.ROWS if row.score != "none"} == {
        (score, dim) for score in ("softcap", "alibi") for dim in (64, 128)
    }
    assert {row.seq_len for row in kernels.ROWS} == {4096, 8192, 16384, 32768}
    assert all(row.batch * row.seq_len == kernels.TOKENS for row in kernels.ROWS)


@pytest.mark.parametrize("mask", MASKS)
def test_both_see_the_pairs_that_are_counted(kernels: ModuleType, mask: str):
    row = kernels.Row(mask, "none", 64, 6000)
    b, place = torch.tensor(0), torch.arange(row.seq_len)
    shape = (row.seq_len, row.seq_len)
    seen = kernels.mask_mod_of(row)(b, b, place[:, None], place).expand(shape)
    assert kernels.visible_pairs(row) == seen.sum()
    flex = kernels.flex_mask_mod_of(row)
    assert torch.equal(seen, torch.ones(shape, dtype=torch.bool) if flex is None else flex(b, b, place[:, None], place))


@pytest.mark.parametrize("score", ["softcap", "alibi"])
def test_score_mods_can_be_traced(kernels: ModuleType, score: str):
    kernels.cpflex.score_mod(kernels.score_mod_of(kernels.Row("causal", score, 128, 4096)))


def a_record(row, compilations) -> dict:
    """As `measure` makes it, of a machine on which one peer failed."""
    peers = {"kernel": 400.0, "call": 390.0, "flex": 300.0}
    stages = {f"{stage}_tflops": peers for stage in ("forward", "backward")}
    stages |= {f"{stage}_vs_flex": {"kernel": 1.33} for stage in ("forward", "backward")}
    times = {f"{stage}_{state}_s": 0.5 for stage in ("forward", "backward") for state in ("cold", "warm")}
    return {"row": row.name, "failed": {"cudnn": "RuntimeError: no"}, "first_call": times, **stages}


def run(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "setting", lambda: {"gpu": "none"})
    monkeypatch.setattr(kernels, "gemm_tflops", lambda: 700.0)
    monkeypatch.setattr(kernels, "measure", a_record)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # and back again afterwards
    kernels.main(list(arguments))


def test_it_writes_a_record_and_a_plot(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "kernels.json"
    run(kernels, monkeypatch, "--rows", "causal D128", "--out", str(out))
    record = json.loads(out.read_text())
    assert [row["row"] for row in record["rows"]] == [row.name for row in kernels.ROWS if "causal D128" in row.name]
    assert record["gemm_tflops"] == 700.0
    said = capsys.readouterr().out
    assert "400 (1.33x)" in said
    assert "cudnn failed: RuntimeError: no" in said
    assert "longest first call, cold: forward 0.50 s" in said
    if importlib.util.find_spec("matplotlib") is None:
        assert "no plot: install matplotlib" in said
    else:
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rows_for_which_no_time_is_left_are_named(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(kernels, monkeypatch, "--seconds", "-1", "--rows", "full D64", "--out", str(tmp_path / "kernels.json"))
    assert "left out: full D64 S16k" in capsys.readouterr().out
    assert json.loads((tmp_path / "kernels.json").read_text())["left_out"] == ["full D64 S16k"]


def test_arguments_are_checked(kernels: ModuleType, tune: ModuleType):
    assert kernels.parse([]).out == ROOT / "benchmarks" / "results" / "kernels.json"
    with pytest.raises(SystemExit, match=r"no row is named like 'diagonal'.*causal D128 S4k"):
        kernels.main(["--rows", "diagonal"])
    options = tune.parse(["--pass", "dq", "--head-dim", "64", "--tma"])
    assert (options.which, options.head_dim, options.dtype, options.tma) == ("dq", 64, "bfloat16", True)
    with pytest.raises(SystemExit):
        tune.parse(["--pass", "sideways"])


def test_a_row_of_the_tuning_table_is_printed_as_the_table_has_it(tune: ModuleType):
    configs = tune.candidates(tma=True)
    assert len(set(configs)) == len(configs) == 54
    assert all(128 % block == 0 for config in configs for block in (config.block_q, config.block_kv))
    assert {config.block_q for config in tune.candidates(tma=False, which="decode")} == {16, 32, 64}
    text = tune.row("dq", 64, configs[0], "why")
    assert text == '("dq", 64): KernelConfig(32, 32, 4, 2, tma=True),  # why'
    assert eval(f"{{{text}\n}}", {"KernelConfig": tune.KernelConfig}) == {("dq", 64): configs[0]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["launch/bench.py", "kernels"], ["launch/tune.py"]], ids=["bench", "tune"])
def test_it_says_that_a_gpu_is_missing(command: list[str]):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=patience(120), cwd=ROOT)
    assert done.returncode == 1
    assert "CUDA GPU" in done.stderr


def test_an_unknown_benchmark_is_refused():
    done = subprocess.run(
        [sys.executable, "launch/bench.py", "x"], capture_output=True, text=True, timeout=patience(60), cwd=ROOT
    )
    assert done.returncode == 1
    assert "usage: bench.py {kernels," in done.stderr
