"""Every example runs and says that N ranks are one; on the ranks of the suite, and as a reader would start it."""

from __future__ import annotations

import ast
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

from patience import patience
from processes import RankProcesses

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
ALONE = ["inspect_plan"]
"""Those that need no ranks."""
STARTED = ["huggingface_trainer", "inspect_plan", "lightning_module", "trl_dpo", "trl_sft"]
"""Those that are always started as their docstrings say: what they load wants a process of its own."""

HF = ["transformers", "accelerate"]
NEEDS = {"accelerate": HF, "huggingface": HF, "lightning": [*HF, "lightning"], "trl": [*HF, "trl", "peft"]}
"""Packages, by how names of examples begin."""

SAYS = {
    "accelerate_plain": r"(?s)(2|4) rows: loss.*rows: loss",
    "chunked_prefill": r"tokens 1047 to 1110: 2 earlier chunks",
    "custom_mods": r"all-gather would bring",
    "draft_model": r"(?s)causal: gradients.*bidirectional: gradients",
    "encoder_decoder": r"(?s)step 0: .* keys.*step 5: .*gradients",
    "fsdp2": r"step 4: loss",
    "grpo_tree": r"(?s)tokens: loss.*tokens: loss.*weights after 3 updates",
    "huggingface_trainer": r"first step: loss",
    "image_keys": r"(?s)images on every rank: gradients.*images shared: gradients",
    "inspect_plan": r"layout +work.*\ncontiguous.*\nzigzag.*\nstriped.*\nbalanced",
    "lightning_module": r"(?s)loss .*\nloss .*\nloss ",
    "packed_documents": r"share of the loss",
    "serve": r"(?s)12 tokens for ann, as alone: True.*30 .* bob.*: True.*9 .* cyd.*: True.*15 .* dee.*: True",
    "sinks": r"gradient of the sinks",
    "trl_dpo": r"first step: loss",
    "trl_sft": r"first step: loss",
    "two_microbatches": r"(?s)microbatch 0.*: True\n.*microbatch 1.*: True\n",
    "wrap_attention": r"gradient of qkv.weight",
}


def assert_says(name: str, text: str) -> None:
    assert re.search(SAYS[name], text), text
    differences = [float(number) for number in re.findall(r"difference to one rank (\S+)", text)]
    assert differences or name in (*ALONE, "two_microbatches"), text
    assert all(abs(difference) < 1e-5 for difference in differences), text


@contextmanager
def launched(group: dist.ProcessGroup) -> Iterator[None]:
    """The environment that torchrun makes, and none of accelerate's state left behind."""
    before, (rank, world_size) = dict(os.environ), (str(group.rank()), str(group.size()))
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if state := sys.modules.get("accelerate.state"):
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()


def said_by(group: dist.ProcessGroup, name: str) -> str:
    with launched(group), redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](group)
    return said.getvalue()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in STARTED])
def test_ranks_compute_what_one_would(name: str, processes: RankProcesses):
    skip_without_packages(name)
    texts = processes.run(said_by, name)
    assert_says(name, texts[0])


def test_the_commands_are_those_that_the_examples_state():
    for name in NAMES:
        docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
        assert docstring is not None
        assert command_of(name) in docstring


def skip_without_packages(name: str) -> None:
    if missing := [package for package in NEEDS.get(name.split("_")[0], ()) if find_spec(package) is None]:
        pytest.skip(f"{missing} are not installed")


def command_of(name: str) -> str:
    return f"python examples/{name}.py" if name in ALONE else f"torchrun --nproc-per-node 2 examples/{name}.py"


MARKS = {name: () if name in STARTED else pytest.mark.slow for name in NAMES}
LONG = [name for name in STARTED if name not in ALONE]
MARKS |= dict.fromkeys(LONG, pytest.mark.by_day(len(LONG)))  # they load for ten seconds


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in NAMES])
def test_it_runs_as_its_docstring_says(name: str):
    skip_without_packages(name)
    program, *arguments = command_of(name).split()
    if program == "torchrun":
        # a free port: others may be running on this machine
        arguments = ["-m", "torch.distributed.run", "--standalone", *arguments]
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
        timeout=patience(200),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_says(name, done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_listed(name: str):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100
    assert f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text()
