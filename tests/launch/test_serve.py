"""launch/serve.py: two ranks answer as one would, from a file and from stdin; mistakes are told before any rank runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from patience import patience
from serve import Text, parse_options

pytestmark = pytest.mark.hf

SERVE = str(Path(__file__).parents[2] / "launch" / "serve.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SERVE]
PROMPTS = "Whoever asks for what is long, waits for it once.\n\nx\nAnd again, ünd wieder.\n"
SMALL: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "initializer_range": 0.3,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "config.json"


def served(config: Path, *arguments: str, told: str | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *TORCHRUN, "--model", f"hf:{config}", "--device", "cpu", "--check", *arguments]
    given = None if told is None else told.encode()
    return subprocess.run(command, input=given, capture_output=True, timeout=patience(120), check=False)


@pytest.mark.parametrize(
    "way", [pytest.param("file", marks=pytest.mark.by_day(2)), pytest.param("stdin, sampled", marks=pytest.mark.slow)]
)
def test_two_ranks_answer_as_one_would(way: str, config: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    if way == "file":
        done = served(config, "--max-new-tokens", "70", "--prompts", str(tmp_path / "prompts.txt"))
    else:
        done = served(config, "--max-new-tokens", "70", "--temperature", "0.8", told=PROMPTS)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert done.stdout, "the answers"
    assert re.search(
        r"\[1\] prompt of 49 tokens in .* s, 70 of 70 new ones at .* tokens/s; pages used by rank: \d+/\d+ ", said
    )
    assert "[2] left out: a prompt must have at least 2 tokens; got 1" in said
    assert re.search(r"\[3\] prompt of 23 tokens .* 70 of 70", said)
    assert said.count("one rank alone gives the same 70 tokens") == 2


# -- text


class Syllables:
    """A tokenizer of some bytes a token."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        text = b"".join([b"a", "ü".encode()[:1], "ü".encode()[1:], b"b"][token] for token in tokens)
        return text.decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "tokens", "parts"),
    [
        (Text(None), [97, 0xC3, 0xBC, 98], ["a", "", "ü", "b"]),
        (Text(None), [97, 0xC3], ["a", "\N{REPLACEMENT CHARACTER}"]),
        (Text(Syllables()), [0, 1, 2, 3], ["a", "", "ü", "b"]),
        (Text(Syllables()), [0, 1], ["a", "\N{REPLACEMENT CHARACTER}"]),
    ],
    ids=["bytes", "bytes, cut off", "tokenizer", "tokenizer, cut off"],
)
def test_a_character_is_told_when_it_is_whole(text: Text, tokens: list[int], parts: list[str]):
    decoded = text.decoder()
    assert [decoded(token, place == len(tokens) - 1) for place, token in enumerate(tokens)] == parts


# -- options


@pytest.mark.parametrize(
    ("changes", "arguments", "told"),
    [
        ({}, ["--max-new-tokens", "0"], "--max-new-tokens must be at least 1; got 0"),
        ({}, ["--temperature", "-1"], "--temperature must be at least 0; got -1"),
        ({}, ["--prompts", "nowhere.txt"], "there is no file nowhere.txt"),
        ({"vocab_size": 200}, [], "vocab_size must be at least 256; got 200"),
        ({"model_type": "bert"}, [], "bert"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_mistakes_are_told_before_any_rank_runs(
    changes: dict[str, Any], arguments: list[str], told: str, config: Path, capsys: pytest.CaptureFixture[str]
):
    config.write_text(json.dumps(SMALL | changes))
    with pytest.raises(SystemExit):
        parse_options(["--model", f"hf:{config}", *arguments])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama.json", "hf:", "hf:nowhere.json"])
def test_a_model_is_named_with_its_kind(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(["--model", name])
    assert re.search(r"must be hf:CONFIG.json|there is no file", capsys.readouterr().err)
