"""benchmarks/decode.py: the ways agree, and what travels and is held is counted; the record is what it would write."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from patience import patience

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WAYS = ["pages", "gathered", "whole"]
PARTIALS = 4 * 16 * (128 + 1) + 32
"""Bytes that arrive from the other rank in a step: the partial of each head, and a header."""


@pytest.mark.by_day(4)
def test_the_ways_agree_and_what_travels_is_counted(tmp_path: Path):
    out = tmp_path / "decode.json"
    command = [sys.executable, str(BENCHMARKS / "decode.py"), "--steps", "--lengths", "2000", "--repeats", "1"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=patience(100))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == 3 * WAYS
    by_way = {(row["mask"], row["way"]): row for row in rows}
    for (_, way), row in by_way.items():
        assert row["ms"] > 0
        if way == "pages":
            assert 1 <= row["exchanges"] < 1.5  # the header goes ahead of the first step's alone
            assert row["received_bytes"] == PARTIALS
    assert by_way["window 1024", "pages"]["kv_bytes"] < 0.7 * by_way["causal", "pages"]["kv_bytes"]
    assert by_way["causal", "whole"]["kv_bytes"] > 1.8 * by_way["causal", "gathered"]["kv_bytes"]


def test_the_record_holds_every_length_mask_and_way():
    record = json.loads((BENCHMARKS / "results" / "decode.json").read_text())
    assert record["command"] == "python benchmarks/decode.py --steps"
    assert len(record["rows"]) == 27
    assert {row["tokens"] for row in record["rows"]} == {4096, 16384, 65536}
    assert {row["received_bytes"] for row in record["rows"] if row["way"] == "pages"} == {PARTIALS}


def test_the_record_of_what_travels_is_counted_anew(capsys: pytest.CaptureFixture[str]):
    record = json.loads((BENCHMARKS / "results" / "decode_travel.json").read_text())
    assert record["command"] == "python benchmarks/decode.py --travel"
    benchmark = runpy.run_path(str(BENCHMARKS / "decode.py"))
    benchmark["travel"].__globals__.update(TRAVEL_CHUNKS=(256, 2048), TRAVEL_KEPT=(0, 8192))
    rows = benchmark["travel"]()
    assert len(rows) == 8 and all(row in record["rows"] for row in rows)
    assert "window 4096" in capsys.readouterr().out


def test_the_documented_table_is_of_the_record():
    rows = json.loads((BENCHMARKS / "results" / "decode_travel.json").read_text())["rows"]
    said = (BENCHMARKS.parent / "docs" / "serving.md").read_text()
    by_mask = {(row["mask"], row["chunk"], row["kept"]): row for row in rows if row["kept"] or row["chunk"] > 1}
    for (mask, chunk, kept), row in by_mask.items():
        if mask == "causal":
            other = by_mask["window 4096", chunk, kept]
            cells = [
                f"{one[way] / 2**20:.1f}"
                for one, way in ((row, "queries_bytes"), (row, "keys_bytes"), (other, "keys_bytes"))
            ]
            names = row["travel"], other["travel"]
            line = f"| {chunk:,} | {kept:,} | {cells[0]} | {cells[1]} | {names[0]} | {cells[2]} | {names[1]} |"
            assert line in said, line
