"""launch/train.py: what it reads, what it proves, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import checkpoint
from data import IGNORE, Corpus, pack, read, text_files
from model import Shape, Transformer
from patience import patience
from proof import compare, describe
from report import StepRecord, read_log, write_log
from step import loss_and_gradients
from train import learning_rate, parse_options
from trainee import BuiltIn, results_of

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TINY = ["--seq-len", "512", "--steps", "6", "--layers", "2", "--dim", "32", "--window", "64", "--save-every", "2"]

DOCUMENTS = [b"abc", b"d", b"\x00\xff", b"efgh"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of 1 to 400 bytes, each byte of a file telling its place."""
    for index, num_bytes in enumerate((1, 7, 64, 65, 200, 400)):
        (tmp_path / f"{index}.txt").write_bytes(bytes(1 + (index + place) % 255 for place in range(num_bytes)))
    return tmp_path


# packing


def test_packing_keeps_every_byte_in_order():
    assert bytes(pack(DOCUMENTS).tokens.tolist()) == b"".join(DOCUMENTS)


def test_a_label_is_the_next_byte_of_the_same_document():
    sample = pack(DOCUMENTS)
    starts = sample.cu_seqlens.tolist()
    for document, start, stop in zip(DOCUMENTS, starts[:-1], starts[1:], strict=True):
        assert sample.labels[start:stop].tolist() == [*document[1:], IGNORE]
        assert sample.position_ids[start:stop].tolist() == list(range(len(document)))
    assert starts[-1] == len(sample.tokens)


@pytest.mark.parametrize("longest", [1, 50, None], ids=lambda longest: f"longest={longest}")
def test_the_sequences_of_an_epoch_are_one_document_of_every_file_end_to_end(folder: Path, longest: int | None):
    corpus = Corpus(text_files(folder), seq_len=6, seed=3, longest=longest)
    pieces = [piece for place in range(corpus.sequences_per_epoch) for piece in corpus.documents(0, place)]
    by_file: dict[Path, list[tuple[int, int]]] = {}
    for file, start, num_bytes in pieces:
        by_file.setdefault(file, []).append((start, num_bytes))
    assert sum(num_bytes for _, _, num_bytes in pieces) == corpus.sequences_per_epoch * 6
    unread = corpus.document_lens.sum() - corpus.sequences_per_epoch * 6
    assert 0 <= unread < 6
    for file, parts in by_file.items():
        for (start, num_bytes), (following, _) in pairwise(parts):
            assert start + num_bytes == following, "a document that is cut goes on where it was cut"
        whole = min(file.stat().st_size, longest or 6)
        assert whole - unread <= sum(num_bytes for _, num_bytes in parts) <= whole


def test_a_sequence_depends_on_its_number_and_not_on_what_was_read_before(folder: Path):
    files = text_files(folder)
    read_in_order = [sample.tokens for sample in (Corpus(files, 100, seed=1)[i] for i in range(20))]
    corpus = Corpus(files, 100, seed=1)
    for index in (19, 0, 7):
        torch.testing.assert_close(corpus[index].tokens, read_in_order[index], rtol=0, atol=0)
    assert corpus.sequences_per_epoch < 10
    other = Corpus(files, 100, seed=2)
    assert any(not torch.equal(other[i].tokens, tokens) for i, tokens in enumerate(read_in_order))
    assert other.fingerprint != corpus.fingerprint


def test_every_part_of_a_long_file_is_read_sooner_or_later(folder: Path):
    corpus = Corpus([folder / "5.txt"], seq_len=100, seed=0)
    seen = {start + i for epoch in range(60) for _, start, size in corpus.documents(epoch, 0) for i in range(size)}
    assert seen == set(range(400))


def test_a_corpus_smaller_than_a_sequence_is_refused(folder: Path):
    with pytest.raises(ValueError, match=r"one sequence needs 1000 tokens; 6 text files give 737 - pass a larger"):
        Corpus(text_files(folder), seq_len=1000, seed=0)


def test_only_text_is_read(folder: Path):
    for path, content in {"a.bin": b"\x7fELF\0", "empty": b"", ".hidden": b"x", "site-packages/b.py": b"x"}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    assert [file.name for file in text_files(folder)] == [f"{index}.txt" for index in range(6)]
    assert read(folder / "2.txt", 3, 4) == bytes([6, 7, 8, 9])


# proof


@pytest.fixture
def model() -> Transformer:
    return Transformer(Shape(256, num_layers=2, dim=32, num_heads=4, num_kv_heads=2))


def results_of_one_rank(model: Transformer, sample, window: int) -> dict[str, torch.Tensor]:
    trainee = BuiltIn(model, window)
    plan = trainee.planner(sample.cu_seqlens)
    return dict(results_of(model, loss_and_gradients(trainee, sample, plan, None, torch.device("cpu"))))


def test_the_proof_accepts_the_right_attention_and_refuses_another_window(folder: Path, model: Transformer):
    sample = Corpus(text_files(folder), 250, seed=0, longest=80)[0]
    exact, dense = (BuiltIn(model, 9).dense_results(sample, in_fp64=in_fp64) for in_fp64 in (True, False))
    right, wrong = (results_of_one_rank(model, sample, window) for window in (9, 10))
    comparisons = compare(right, right, dense, exact, torch.float32)
    assert all(comparison.passed for comparison in comparisons)
    assert "FAILED" not in describe(comparisons, 2)
    for found, one_rank in ((wrong, right), (right, wrong)):
        comparisons = compare(found, one_rank, dense, exact, torch.float32)
        assert not all(comparison.passed for comparison in comparisons)
        assert "FAILED" in describe(comparisons, 2)


@pytest.mark.parametrize(
    ("perturb", "passes"),
    [
        (lambda grad: grad, True),
        (lambda grad: grad + 1e-9, True),
        (lambda grad: grad * 1.00001, False),
        (lambda grad: grad.index_fill(0, torch.tensor([0]), 0.0), False),
        (lambda grad: grad.flip(0), False),
        (lambda grad: grad * float("nan"), False),
        (lambda grad: grad * float("inf"), False),
    ],
    ids=["equal", "rounding", "scaled", "a row missing", "permuted", "nan", "inf"],
)
def test_the_proof_refuses_a_gradient_that_one_rank_would_not_have(perturb, passes: bool):
    exact = {"loss": torch.tensor(5.5, dtype=torch.float64), "weight": torch.randn(8, 16, dtype=torch.float64)}
    reference = {name: truth.float() for name, truth in exact.items()}
    found = {"loss": reference["loss"], "weight": perturb(reference["weight"])}
    loss, weight = compare(found, reference, reference, exact, torch.float32)
    assert loss.passed
    assert weight.passed == passes


def test_the_proof_refuses_when_the_reference_overflows():
    infinite = {"loss": torch.tensor(float("inf"))}
    (loss,) = compare(infinite, infinite, infinite, {"loss": torch.tensor(1.0, dtype=torch.float64)}, torch.float32)
    assert not loss.passed


# options, log, checkpoints


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--heads 4 --kv-heads 3", "--heads must be a multiple of --kv-heads; got 4 and 3"),
        ("--dim 100 --heads 8", "--dim must be a multiple of 2 * --heads"),
        ("--layers 0", "invalid positive integer value: '0'"),
        ("--data /nowhere", "--data must be a directory of text files; got /nowhere"),
        ("--layout diagonal", "invalid choice: 'diagonal'"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(arguments.split())
    assert message in capsys.readouterr().err


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, peak=1.0) for step in range(1, 101)]
    assert rates.index(max(rates)) == 9
    assert rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(1, 1, peak=1.0) == 1.0


def test_a_log_survives_being_cut_off(tmp_path: Path):
    records = [
        StepRecord(step, 1 / 3, 1.0, 0.1, 1.0, 1.0, 1, "zigzag", {"full": 1.0}, {"full": 1.0}) for step in (1, 2)
    ]
    path = tmp_path / "log.jsonl"
    write_log(path, records)
    with path.open("a") as log:
        log.write('{"step": 3, "lo')
    assert read_log(path) == records


def test_only_finished_checkpoints_of_the_same_run_count(tmp_path: Path, model: Transformer):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for name in ("step-000002", "step-000010", checkpoint.UNFINISHED):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) == (10, tmp_path / "step-000010")
    (tmp_path / "step-000010" / checkpoint.RUN_FILE).write_text(json.dumps({"seed": 0}))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="is of another run: seed was 0, is 1 - pass the same options"):
        checkpoint.load(tmp_path / "step-000010", model, optimizer, {"seed": 1}, group=None)


def test_what_an_earlier_run_left_is_kept_under_another_name(tmp_path: Path):
    assert checkpoint.set_aside(tmp_path / "checkpoints") is None
    for number in (1, 2):
        (tmp_path / "checkpoints").mkdir()
        assert checkpoint.set_aside(tmp_path / "checkpoints") == tmp_path / f"checkpoints.{number}"


# the whole job, in its own processes


def train(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=patience(120), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_after_step(num_steps: int, log: Path, *arguments: str) -> None:
    """Start a run, and kill its launcher as soon as ``num_steps`` are logged; its ranks have to follow."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + patience(120)
    while len(read_log(log)) < num_steps:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.by_day(6)
def test_a_killed_run_resumes_with_the_same_losses_bit_by_bit(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = train(*TORCHRUN, TRAIN, *TINY, "--run-dir", str(whole))
    assert "20 of 20 within budget: the loss and 19 gradients" in said
    assert "K/V moved" in said
    assert (whole / "loss.png").stat().st_size > 0
    expected = read_log(whole / "log.jsonl")
    assert [record.step for record in expected] == [1, 2, 3, 4, 5, 6]

    kill_after_step(3, killed / "log.jsonl", TRAIN, *TINY, "--run-dir", str(killed))
    said = train(TRAIN, *TINY, "--run-dir", str(killed), "--resume")
    assert "resuming after step" in said
    found = read_log(killed / "log.jsonl")
    assert [(r.step, r.loss, r.grad_norm) for r in found] == [(r.step, r.loss, r.grad_norm) for r in expected]
    assert [path.name for path in sorted((killed / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
