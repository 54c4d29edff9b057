"""Train a small language model on long packed sequences of real text, each sequence shared by all ranks.

    python launch/train.py                                       starts its ranks: one per GPU, or 2 on the CPU
    torchrun --standalone --nproc-per-node 2 launch/train.py     the same, started by torchrun
    python launch/train.py --job grpo                            reinforcement learning instead: see grpo.py

Before the first step it proves itself: loss and gradients on all ranks against one rank. Then every rank reads the same
sequences, keeps the tokens that the plan gives it, and attends to all ranks' tokens through cpflex.flex_attention.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from sysconfig import get_path

import torch
import torch.distributed as dist
from torch.optim import AdamW
from torch.utils.data import DataLoader

import checkpoint
import grpo
import ranks
from data import VOCAB_SIZE, Corpus, text_files
from model import Shape, Transformer
from planning import LAYOUTS, PlannedSamples
from progress import learning_rate, resume, say, update
from proof import describe, prove
from report import Report, step_record
from step import loss_and_gradients
from tasks import TASKS
from trainee import BuiltIn, Trainee

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MODEL_HELP = """a causal language model of transformers: hf:CONFIG.json with random weights, hf:DIRECTORY or the name of
a model on this machine with its own; if None, a small transformer with the sizes below"""

SIZES = ("layers", "dim", "heads", "kv_heads", "window")
"""Options of the built-in model, which the config of another one has instead."""

OF_TEXT = ("model", "seq_len")
"""Options of training on text, which reinforcement learning has not."""

DECIDES_THE_CURVE = ("seq_len", *SIZES, "dtype", "lr", "seed")
"""Options that a resumed run must have in common with the one it continues."""


def main() -> None:
    options = parse_options(sys.argv[1:])
    if ranks.started():
        with ranks.joined() as (group, device):
            if options.job == "grpo":
                grpo.train(options, group, device, DTYPES[options.dtype])
            else:
                train(options, group, device)
    else:
        ranks.start(__file__, sys.argv[1:])


def train(options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> None:
    layout = LAYOUTS[options.layout]
    files = text_files(options.data)
    corpus = Corpus(files, options.seq_len, options.seed)
    torch.manual_seed(options.seed)
    trainee = trainee_of(options, device)
    model = trainee.model
    optimizer = AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"ranks: {group.size()} on {device.type}; {num_parameters:,} parameters; {len(files):,} documents")
    if trainee.remark:
        say(trainee.remark)

    comparisons = prove(trainee, files, options.seq_len, layout, group, device)
    say(describe(comparisons, group.size()))
    if not all(comparison.passed for comparison in comparisons):
        raise SystemExit(f"rank {group.rank()}: the proof failed; not training")

    run = {name: getattr(options, name) for name in DECIDES_THE_CURVE}
    run |= {"model": trainee.identity, "corpus": corpus.fingerprint}
    num_done = resume(options, model, optimizer, run, group)
    samples = PlannedSamples(corpus, trainee.planner, layout, group.rank(), group.size())
    loader = DataLoader(
        samples,
        batch_size=None,
        sampler=range(num_done, options.steps),
        num_workers=1,
        generator=torch.Generator(),  # its own: starting a worker draws a number, and a resumed run starts one more
    )
    with Report(options.run_dir, num_done, options.steps, is_silent=group.rank() > 0) as report:
        began = time.perf_counter()
        for step, (sample, plan) in enumerate(loader, start=num_done + 1):
            loss = loss_and_gradients(trainee, sample, plan.bind(group).to(device), group, device).item()
            lr = learning_rate(step, options.steps, options.lr)
            grad_norm = update(model, optimizer, lr)
            if not math.isfinite(loss + grad_norm):
                raise FloatingPointError(f"step {step}: loss {loss}, gradients of norm {grad_norm}; try a lower --lr")
            report.step(step_record(step, loss, grad_norm, lr, time.perf_counter() - began, sample, plan))
            if step % options.save_every == 0 or step == options.steps:
                checkpoint.save(options.checkpoint_dir, step, model, optimizer, run, group)
            began = time.perf_counter()
    report.finish()


def trainee_of(options: argparse.Namespace, device: torch.device) -> Trainee:
    dtype = DTYPES[options.dtype]
    if options.model:
        import hf  # only here: transformers is not needed otherwise

        return hf.load(options.model, dtype, device)
    shape = Shape(VOCAB_SIZE, options.layers, options.dim, options.heads, options.kv_heads, dtype)
    return BuiltIn(Transformer(shape).to(device), options.window)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Options that fit each other; exits with a message otherwise."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=_HelpFormatter)
    add = parser.add_argument
    add("--job", choices=("text", "grpo"), default="text", help="train on text, or by reinforcement on a toy task")
    add("--model", type=_hf_name, metavar="hf:NAME", help=MODEL_HELP)
    add("--seq-len", type=_count, default=8192, help="tokens of a sequence, over all ranks")
    add("--steps", type=_count, default=60, help="steps of the whole run, one sequence each")
    add("--layers", type=_count, default=4, help="layers, sliding-window and full attention in turn")
    add("--dim", type=_count, default=128, help="width of the model")
    add("--heads", type=_count, default=4, help="query heads")
    add("--kv-heads", type=_count, default=2, help="heads of keys and values, a divisor of --heads")
    add("--window", type=_count, default=1024, help="tokens that sliding-window layers see, the query's own included")
    add("--layout", choices=LAYOUTS, default="balanced", help="which tokens each rank holds")
    add("--dtype", choices=DTYPES, default="fp32", help="of matmuls and attention; parameters are fp32")
    add("--lr", type=float, default=8e-3, help="highest learning rate")
    add("--seed", type=int, default=0, help="of parameters and of the order of documents")
    add("--data", type=Path, default=Path(get_path("stdlib")), help="directory of text files: documents, or words")
    add("--run-dir", type=Path, default=Path("runs/train"), help="for the log and the plot")
    add("--checkpoint-dir", type=Path, help="on a disk that all ranks share; if None, RUN_DIR/checkpoints")
    add("--save-every", type=_count, default=20, help="steps between checkpoints; the last step is always saved")
    add("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    add("--task", choices=TASKS, default=grpo.OPTIONS["task"], help="grpo: what is asked")
    add("--prompts", type=_count, default=grpo.OPTIONS["prompts"], help="grpo: questions of a step")
    add("--completions", type=_count, default=grpo.OPTIONS["completions"], help="grpo: samples of each question")
    add("--supervised", type=int, default=grpo.OPTIONS["supervised"], help="grpo: steps before, on right answers")
    options = parser.parse_args(arguments)
    if options.job == "grpo":
        parser.set_defaults(**grpo.DEFAULTS)
        options = parser.parse_args(arguments)
    _check_job(parser, options)
    if options.model:
        _check_model(parser, options)
    options.checkpoint_dir = options.checkpoint_dir or options.run_dir / "checkpoints"
    if options.heads % options.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads; got {options.heads} and {options.kv_heads}")
    if options.dim % (2 * options.heads):
        parser.error(
            f"--dim must be a multiple of 2 * --heads, as RoPE turns pairs; got {options.dim} and {options.heads} heads"
        )
    if not options.data.is_dir():
        parser.error(f"--data must be a directory of text files; got {options.data}")
    return options


def _check_job(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options of the other job would do nothing."""
    others, other = (OF_TEXT, "text") if options.job == "grpo" else (grpo.OPTIONS, "grpo")
    if given := [name for name in others if getattr(options, name) != parser.get_default(name)]:
        parser.error(f"--{given[0].replace('_', '-')} is of --job {other}; this is --job {options.job}")
    for name, least in (("completions", 2), ("supervised", 0)):  # one completion has nothing to be compared with
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}; got {getattr(options, name)}")


def _check_model(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    import hf

    if given := [name for name in SIZES if getattr(options, name) != parser.get_default(name)]:
        parser.error(f"--{given[0].replace('_', '-')} is of the built-in model; with --model, edit the config")
    try:
        hf.checked_config(options.model)
    except (ValueError, NotImplementedError) as problem:
        parser.error(f"--model: {problem}")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside each option, the commands as they are written above."""


def _hf_name(text: str) -> str:
    prefix, _, name = text.partition(":")
    if prefix != "hf" or not name:
        raise ValueError
    return name


_hf_name.__name__ = "model, hf:CONFIG.json or hf:DIRECTORY"  # as below


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_count.__name__ = "positive integer"  # argparse says "invalid positive integer value: '0'"


if __name__ == "__main__":
    main()
