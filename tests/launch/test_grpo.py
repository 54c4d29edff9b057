"""launch/train.py --job grpo: it is judged right, samples what separate forwards would, proves itself, resumes, learns."""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

import grpo
import sampling
from data import VOCAB_SIZE
from grpo import Policy, prove
from model import Shape, Transformer
from patience import patience
from processes import RankProcesses
from proof import describe
from report import read_log
from tasks import LONGEST, TASKS, reward, words_of
from train import parse_options

TRAIN = str(Path(__file__).parents[2] / "launch" / "train.py")
TINY = ["--job", "grpo", "--steps", "6", "--supervised", "2", "--prompts", "3", "--completions", "4"]
TINY += ["--dim", "16", "--save-every", "2", "--window", "4"]
WORDS = [b"abc", b"tree", b"leaf", b"roots"]


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Shape(VOCAB_SIZE, num_layers=2, dim=16, num_heads=4, num_kv_heads=2))
    torch.nn.init.normal_(model.head.weight, std=0.2)  # predictions that differ
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "words.txt").write_bytes(b"no Camel x_y12 abcdef " + b" ".join(WORDS))
    return tmp_path


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (b"abc\n", b"abc\n", 1.0),
        (b"abd\n", b"abc\n", 0.75),
        (b"abc\nab", b"abc\n", 4 / 6),
        (b"a", b"abc\n", 0.25),
        (b"\n", b"abc\n", 0.0),
        (b"", b"abc\n", 0.0),
    ],
)
def test_the_reward_is_the_part_of_the_bytes_that_are_right(completion: bytes, answer: bytes, expected: float):
    assert reward(completion, answer) == pytest.approx(expected)


def test_questions_are_of_words_and_have_one_right_answer(folder: Path):
    words = words_of([folder / "words" / "words.txt"])
    assert words == sorted(WORDS)
    draw = random.Random(0)
    for name, (begin, answers) in {
        "copy": (b"copy ", {word + b"\n" for word in words}),
        "reverse": (b"reverse ", {b"cba\n", b"eert\n", b"fael\n", b"stoor\n"}),
        "add": (b"add ", {f"{number}\n".encode() for number in range(19)}),
    }.items():
        for _ in range(20):
            question = TASKS[name](draw, words)
            assert question.prompt.startswith(begin)
            assert question.prompt.endswith(b"\n")
            assert question.answer in answers
            assert len(question.answer) <= LONGEST
    with pytest.raises(
        ValueError, match="there must be words of 3 to 5 lowercase letters in --data; 0 files have none"
    ):
        words_of([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--job", "grpo", "--seq-len", "64"], "--seq-len is of --job text; this is --job grpo"),
        (["--task", "copy"], "--task is of --job grpo; this is --job text"),
        (["--job", "grpo", "--completions", "1"], "--completions must be at least 2"),
        (["--job", "grpo", "--supervised", "-1"], "--supervised must be at least 0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_options_of_the_other_job_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["reverse" if x == "copy" and grpo.OPTIONS["task"] == "copy" else x for x in arguments]
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert message in capsys.readouterr().err


def test_samples_have_the_log_probabilities_of_a_forward_of_each_alone(model: Transformer):
    prompts = [b"a\n", b"longer\n", b"abc\n", b"abc\n"]
    noise = sampling.gumbel(0, 1, (4, LONGEST, VOCAB_SIZE), torch.device("cpu"))
    endless = sampling._sample(model, 4, prompts, noise, end=-1)
    assert endless[2] != endless[3]
    end = endless[0].tokens[2]
    samples = sampling._sample(model, 4, prompts, noise, end)
    assert [new[: len(kept.tokens)] for (new, _), kept in zip(endless, samples, strict=True)] == [s[0] for s in samples]
    for prompt, (new, found) in zip(prompts, samples, strict=True):
        assert new.index(end) == len(new) - 1 if end in new else len(new) == LONGEST
        tokens = torch.tensor([*prompt, *new])[None]
        places = torch.arange(tokens.shape[1])[None]
        log_probs = model(tokens, places, sampling.dense(4)).log_softmax(dim=-1)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.tensor(found), log_probs.gather(1, torch.tensor(new)[:, None])[:, 0])


def sampled(group: Any, model: Transformer) -> list[sampling.Sampled]:
    prompts = [b"a\n", b"longer\n", b"abc\n", b"abc\n", b"b\n"]
    noise = sampling.gumbel(0, 1, (5, LONGEST, VOCAB_SIZE), torch.device("cpu"))
    return sampling.sample(model, 4, prompts, noise, 10, group)


def proven(group: Any, model: Transformer, window: int) -> tuple[bool, str]:
    """With another window in the tree than alone, if it is not 4."""
    options = argparse.Namespace(task="reverse")
    alone = grpo.results_one_by_one
    grpo.results_one_by_one = lambda *args, **kwargs: alone(*args, **(kwargs | {"window": 4}))
    try:
        with redirect_stdout(StringIO()):
            found = prove(Policy(model, window, "balanced"), options, WORDS, group, torch.device("cpu"))
    finally:
        grpo.results_one_by_one = alone
    return all(comparison.passed for comparison in found), describe(found, 2)


def test_both_ranks_know_what_one_would_have_sampled(two_processes: RankProcesses, model: Transformer):
    first, second = two_processes.run(sampled, model)
    assert first == second
    prompts = [b"a\n", b"longer\n", b"abc\n", b"abc\n", b"b\n"]
    noise = sampling.gumbel(0, 1, (5, LONGEST, VOCAB_SIZE), torch.device("cpu"))
    assert [new for new, _ in first] == [new for new, _ in sampling._sample(model, 4, prompts, noise, 10)]


def test_the_proof_accepts_a_tree_and_refuses_another_window(two_processes: RankProcesses, model: Transformer):
    for window, passes in ((4, True), (5, False)):
        for passed, said in two_processes.run(proven, model, window):
            assert passed == passes, said
            assert ("FAILED" in said) != passes


def trained(group: Any, arguments: list[str]) -> None:
    grpo.train(parse_options(arguments), group, torch.device("cpu"), torch.float32)


def test_a_run_logs_draws_and_resumes_bit_by_bit(two_processes: RankProcesses, folder: Path):
    run = folder / "run"
    arguments = [*TINY, "--data", str(folder / "words"), "--run-dir", str(run)]
    two_processes.run(trained, arguments)
    log = read_log(run / "log.jsonl", grpo.TOLD)
    assert [(record.step, record.is_supervised) for record in log] == [(n, n <= 2) for n in range(1, 7)]
    assert (run / "reward.png").stat().st_size > 0
    assert all(0 <= record.reward <= 1 and record.tokens < record.separate_tokens for record in log)
    assert all(0 < record.mismatch < 1e-4 for record in log[2:])
    shutil.rmtree(run / "checkpoints" / "step-000006")
    two_processes.run(trained, [*arguments, "--resume"])
    again = read_log(run / "log.jsonl", grpo.TOLD)
    figures = [[(r.step, r.loss, r.grad_norm, r.reward) for r in records] for records in (log, again)]
    assert figures[0] == figures[1]
    with pytest.raises(RuntimeError, match="completions was 4, is 5 - pass the same options"):
        two_processes.run(trained, [*arguments, "--resume", "--completions", "5"])


@pytest.mark.slow
def test_rewards_rise_from_random_weights(tmp_path: Path):
    """Two ranks and the options that the job has by itself."""
    command = [sys.executable, TRAIN, "--job", "grpo", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(500), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 of 20 within budget: the loss and 19 gradients" in done.stdout
    log = read_log(tmp_path / "log.jsonl", grpo.TOLD)
    before = [record for record in log if record.is_supervised][-10:]
    assert mean(r.reward for r in before) <= 0.45
    assert mean(r.reward for r in log[-10:]) >= 0.6
    assert max(r.mismatch for r in log) < 1e-4
