"""launch/train.py with a model of transformers: it proves itself, learns and resumes; other configs are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor

import hf
from cpflex.integrations.transformers.recurrent import hands_out_masks
from data import Corpus, text_files
from patience import patience
from proof import Comparison, compare
from report import StepRecord, read_log
from step import loss_and_gradients
from train import parse_options
from trainee import results_of

pytestmark = pytest.mark.hf

LAUNCH = Path(__file__).parents[2] / "launch"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(LAUNCH / "train.py")]
TINY = ["--seq-len", "512", "--steps", "4", "--save-every", "2", "--lr", "0.02"]
CPU = torch.device("cpu")
SMALL = {
    "model_type": "gemma3_text",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "initializer_range": 0.1,
}

DELTA = {
    "model_type": "qwen3_next",
    "layer_types": ["linear_attention", "full_attention"],
    "sliding_window": None,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 0,
}
CONVOLUTION = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "sliding_window": None}
LIGHTNING = {
    "model_type": "minimax",
    "layer_types": ["linear_attention", "full_attention"],
    "sliding_window": None,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "block_size": 32,
}
needs_masks = pytest.mark.skipif(
    not hands_out_masks(), reason="this transformers gives recurrent layers no mask of theirs"
)


@pytest.fixture
def written(tmp_path: Path):
    def write(**changes: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: x for name, x in (SMALL | changes).items() if x is not None}))
        return str(path)

    return write


# -- the whole job, in its own processes


def trained(config: str, run_dir: Path, *arguments: str) -> tuple[str, list[StepRecord]]:
    command = [sys.executable, *TORCHRUN, *TINY, "--model", f"hf:{config}", "--run-dir", str(run_dir), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(200), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, read_log(run_dir / "log.jsonl")


@pytest.mark.by_day(3)
def test_a_hybrid_model_proves_itself_learns_and_resumes_bit_by_bit(tmp_path: Path, written):
    said, log = trained(written(), tmp_path / "run")
    assert "29 of 29 within budget: the loss and 28 gradients" in said
    assert set(log[0].kv_moved) == {"full_attention", "sliding_attention"}
    assert [record.step for record in log] == [1, 2, 3, 4]
    assert log[-1].loss < log[0].loss - 0.5
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    said, again = trained(written(), tmp_path / "run", "--resume")
    assert "resuming after step 2" in said
    assert [(r.step, r.loss, r.grad_norm) for r in again] == [(r.step, r.loss, r.grad_norm) for r in log]


@needs_masks
@pytest.mark.by_day(6)
def test_a_model_with_recurrent_layers_proves_itself_and_learns(tmp_path: Path, written):
    said, log = trained(written(**DELTA), tmp_path / "run")
    assert "layers that mix tokens outside of attention exchange their states" in said
    assert "27 of 27 within budget: the loss and 26 gradients" in said
    assert log[-1].loss < log[0].loss - 0.5


# -- the proof, on one rank


def results_of_one_rank(trainee: hf.HuggingFace, sample) -> dict[str, Tensor]:
    plan = trainee.planner(sample.cu_seqlens)
    return dict(results_of(trainee.model, loss_and_gradients(trainee, sample, plan, None, CPU)))


def refused_by_the_proof(trainee: hf.HuggingFace) -> list[Comparison]:
    sample = Corpus(text_files(LAUNCH), 250, seed=0, longest=80)[0]
    found = results_of_one_rank(trainee, sample)
    dense, exact = (trainee.dense_results(sample, in_fp64=in_fp64) for in_fp64 in (False, True))
    assert found.keys() == exact.keys()
    return [comparison for comparison in compare(found, found, dense, exact, trainee.dtype) if not comparison.passed]


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"model_type": "llama", "layer_types": None, "sliding_window": None}, torch.float32),
        ({"model_type": "mistral", "layer_types": None}, torch.float32),
    ],
    ids=["gemma3", "gemma3-bf16", "llama", "mistral"],
)
def test_the_proof_accepts_the_model(changes: dict[str, Any], dtype: torch.dtype, written):
    assert not refused_by_the_proof(hf.load(written(**changes), dtype, CPU).for_proof(longest=80))


@needs_masks
@pytest.mark.parametrize(
    ("changes", "remark"),
    [(DELTA, "exchange their states"), (CONVOLUTION, "exchange their states"), (LIGHTNING, "gather them")],
    ids=["qwen3_next", "lfm2", "minimax"],
)
def test_the_proof_accepts_layers_that_mix_tokens_outside_of_attention(changes: dict[str, Any], remark: str, written):
    trainee = hf.load(written(**changes), torch.float32, CPU)
    assert remark in trainee.remark
    assert not refused_by_the_proof(trainee.for_proof(longest=80))


@pytest.mark.parametrize("what", ["another window", "documents run together"])
def test_the_proof_refuses(what: str, written):
    trainee = hf.load(written(), torch.float32, CPU)
    sample = Corpus(text_files(LAUNCH), 250, seed=0, longest=80)[0]
    other, wrong = trainee.for_proof(longest=84), sample
    if what == "documents run together":
        other, starts = trainee.for_proof(longest=80), torch.tensor([0, len(sample.tokens)])
        wrong = sample._replace(cu_seqlens=starts, position_ids=torch.arange(len(sample.tokens)))
    found = results_of_one_rank(other, wrong)
    trainee = trainee.for_proof(longest=80)
    dense, exact = (trainee.dense_results(sample, in_fp64=in_fp64) for in_fp64 in (False, True))
    assert not all(comparison.passed for comparison in compare(found, found, dense, exact, torch.float32))


# -- which model


def test_a_directory_with_weights_is_trained_from_these(tmp_path: Path, written):
    before = hf.load(written(), torch.float32, CPU)
    before.model.save_pretrained(tmp_path / "model")
    after = hf.load(str(tmp_path / "model"), torch.float32, CPU)
    assert after.model.config._attn_implementation == "cpflex"
    for x, y in zip(before.model.parameters(), after.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("path", sorted((LAUNCH / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_accepted(path: Path):
    if path.stem == "qwen3_next" and not hands_out_masks():
        pytest.skip("this transformers gives recurrent layers no mask of theirs")
    assert parse_options(["--model", f"hf:{path}"]).model == str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 255}, "tokens are bytes, vocab_size must be at least 256; got 255"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0; got 0.1"),
        (
            {"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 64},
            "chunked attention counts tokens from the start",
        ),
        ({"model_type": "rwkv"}, "recurrent layers, and no attention that could be replaced"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": None}, "is no config of transformers"),
        ({"model_type": "nonsense"}, "is no config of transformers"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_configs_that_cannot_be_trained_are_refused(changes, message: str, written, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(["--model", f"hf:{written(**changes)}"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model hf:nowhere.json", "there is no file nowhere.json"),
        ("--model llama.json", "invalid model, hf:CONFIG.json or hf:DIRECTORY value: 'llama.json'"),
        ("--model hf:{} --window 64", "--window is of the built-in model; with --model, edit the config"),
    ],
)
def test_options_that_do_not_fit_a_model_are_refused(
    arguments: str, message: str, written, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        parse_options(arguments.format(written()).split())
    assert message in capsys.readouterr().err
