"""The benchmark of the kernels of pages: its peers compute the same, and it divides by what must be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small, on the CPU, where FlexAttention is not compiled."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import decode_kernel

    small = {"DEVICE": "cpu", "TOKENS": 400, "LONGEST": 150, "HEADS": (6, 2), "HEAD_DIM": 16, "WINDOW": 40}
    for name, value in small.items():
        monkeypatch.setattr(decode_kernel, name, value)
    flex = decode_kernel.flex
    monkeypatch.setitem(decode_kernel.PEERS, "flex", lambda row, problem: flex(row, problem, compiled=False))
    return decode_kernel


def timed(attends: dict[str, Any]) -> dict[str, float]:
    for attend in attends.values():
        attend()
    return dict.fromkeys(attends, 0.5)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*without torch.compile")
@pytest.mark.parametrize("mask", ["causal", "window", "sinks", "alibi", "softcap"])
def test_peers_compute_the_same(bench: Any, mask: str):
    row = bench.Row(mask, 16, 3)
    record = bench.measure(row, timed, copy_gb_per_s=1.0)
    assert record["failed"] == {}
    assert {"kernel", "call", "flex"} <= record["differences"].keys()
    assert max(record["differences"].values()) < 0.03, record["differences"]
    assert record["us"]["kernel"] == 500.0
    assert record["of_a_copy"]["kernel"] == bench.bytes_of(row) / 0.5e6


@pytest.mark.parametrize("mask", ["causal", "window", "sinks"])
def test_it_counts_the_keys_that_the_new_token_sees(bench: Any, mask: str):
    row = bench.Row(mask, 16, 3)
    last, keys = torch.tensor(row.length - 1), torch.arange(row.length)
    assert bench.visible_keys(row) == bench.mask_of(row)(0, 0, last, keys).sum()
    assert bench.bytes_of(row) == 3 * bench.visible_keys(row) * 2 * 2 * 16 * 2  # sequences, K and V, heads, dims, bytes


def test_a_peer_that_fails_is_told_and_the_others_are_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(row: Any, problem: Any) -> None:
        raise RuntimeError("no pages of 16\nmore")

    monkeypatch.setitem(bench.PEERS, "flex", fails)
    record = bench.measure(bench.Row("causal", 16, 2), timed, bench.copy_gb_per_s(timed, 1000))
    assert record["failed"] == {"flex": "RuntimeError: ['no pages of 16']"}
    bench.show(record)
    assert "flex failed: RuntimeError" in capsys.readouterr().out


def test_its_rows_are_those_that_were_promised(bench: Any):
    assert {(row.mask, row.page_size, row.batch) for row in bench.ROWS} >= {
        ("causal", page_size, batch) for page_size in (16, 32, 64, 128) for batch in (1, 4, 16, 64)
    }
    assert {row.mask for row in bench.ROWS} == {"causal", "window", "sinks", "alibi", "softcap"}
    assert len({row.name for row in bench.ROWS}) == len(bench.ROWS)


def test_rows_are_recorded_and_those_without_time_named(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import kernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "copy_gb_per_s", lambda timed: 1.0)
    monkeypatch.setattr(kernels, "interleaved", timed)
    monkeypatch.setattr(kernels, "setting", lambda: {"gpu": "none"})
    monkeypatch.setattr(bench, "PEERS", {"kernel": bench.cpflex_kernel})
    for seconds, count in (("1000", 1), ("-1", 0)):
        bench.main(["--rows", "causal p128 B64", "--seconds", seconds, "--out", str(tmp_path / "x" / "found.json")])
        record = json.loads((tmp_path / "x" / "found.json").read_text())
        assert len(record["rows"]) == count and ("left_out" in record) == (not count)
    assert "left out: causal p128 B64" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no row is named like 'x'"):
        bench.main(["--rows", "x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(bench: Any):
    with pytest.raises(SystemExit, match="CUDA GPU, and there is none here"):
        bench.main([])
