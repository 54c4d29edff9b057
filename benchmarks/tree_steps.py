"""A training step on a tree beside the same step on its completions, each with its prompt: on two gloo ranks of a CPU.

    python benchmarks/trees.py                     writes results/trees.json
    python benchmarks/trees.py --only 4            rows with four completions

Separate completions are packed one after another, as documents, in one sequence that the two ranks share: the same
attention, ranks and balance, without the tree. Of both are timed, forward and backward, one attention layer and a whole
small model with its loss. They take turns, and the least of each counts; the losses are compared before times are.
Seconds are CPU time of the slower rank, so that other load on the machine does not count, nor does waiting.

The ideal is what the counts give: attention's time falls as the (query, key) pairs, all other time as the tokens. Other
time is the model's less its layers' attention, both of separate completions. "of the ideal" is the speedup that was
measured over that one.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import cpflex
from cpflex import trees
from cpflex.loss import IGNORE_INDEX, cross_entropy

sys.path.append(str(Path(__file__).parents[1] / "launch"))

from cpu_peers import machine
from model import Shape, Transformer

NUM_RANKS = 2
ROWS = [(length, size, shared) for length, size in ((4096, 4), (2048, 16), (2048, 64)) for shared in (0.3, 0.75, 0.97)]
"""(mean tokens of a prompt and a completion, completions, part of those tokens that is the prompt)"""

HEADS, HEAD_DIM, LAYERS, VOCAB = 2, 32, 2, 256
TOLERANCE = 1e-4
"""Between the losses of the two, of about log(VOCAB)."""


class Batch(NamedTuple):
    """One of the two ways to store the completions, on this rank."""

    tokens: int  # over all ranks
    pairs: int  # (query, key), over all ranks
    plan: cpflex.Plan
    local_tokens: Tensor  # int64 [S_local]
    position_ids: Tensor  # int64 [S_local]
    share_of_loss: Callable[[Tensor], Tensor]  # from logits [1, S_local, VOCAB]


def drawn(length: int, size: int, shared: float) -> tuple[list[int], list[list[int]]]:
    """A prompt, and completions of half to one and a half times their mean length that share nothing else."""
    random = torch.Generator().manual_seed(0)
    prompt_len = round(shared * length)
    lengths = (
        ((0.5 + torch.linspace(0, 1, size)) * (length - prompt_len))
        .round()
        .int()[torch.randperm(size, generator=random)]
    )
    prompt, *completions = (
        torch.randint(VOCAB, (n,), generator=random).tolist() for n in (prompt_len, *lengths.tolist())
    )
    return prompt, [[first, *rest[1:]] for first, rest in enumerate(completions)]


def as_tree(prompt: list[int], completions: list[list[int]], group: dist.ProcessGroup | None) -> Batch:
    packed = trees.pack([(prompt, completions)])
    plan = cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len, group)
    shard = packed.shard(plan)

    def share(logits: Tensor) -> Tensor:
        return trees.cross_entropy(shard.log_probs(logits), shard)

    return Batch(packed.seq_len, trees.pairs_of(packed.tree), plan, shard.tokens, shard.position_ids, share)


def as_documents(prompt: list[int], completions: list[list[int]], group: dist.ProcessGroup | None) -> Batch:
    documents = [torch.tensor(prompt + completion) for completion in completions]
    labels = [document.roll(-1) for document in documents]
    for label in labels:
        label[: len(prompt) - 1] = IGNORE_INDEX
        label[-1] = IGNORE_INDEX
    lengths = torch.tensor([len(document) for document in documents])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    seq_len = int(lengths.sum())
    plan = cpflex.make_plan(cpflex.causal() & cpflex.document(cu_seqlens=cu_seqlens), seq_len, group)
    places = [torch.arange(len(document)) for document in documents]
    tokens, position_ids, local_labels = (
        plan.shard(torch.cat(x), dim=0, pad_value=pad)
        for x, pad in ((documents, 0), (places, 0), (labels, IGNORE_INDEX))
    )

    def share(logits: Tensor) -> Tensor:
        return cross_entropy(logits[0], local_labels, group)

    return Batch(seq_len, int((lengths * (lengths + 1) // 2).sum()), plan, tokens, position_ids, share)


BATCHES = {"tree": as_tree, "separate": as_documents}


def attention_step(batch: Batch) -> None:
    """Forward and backward of one layer's attention, of unit normal q, k and v."""
    random = torch.Generator().manual_seed(0)
    shape = (1, HEADS, len(batch.local_tokens), HEAD_DIM)
    q, k, v, grad_out = (torch.randn(shape, generator=random) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = cpflex.flex_attention(q, k, v, block_mask=batch.plan)
    torch.autograd.grad(out, leaves, grad_out)  # type: ignore[arg-type]


def model_step(batch: Batch, model: Transformer) -> Tensor:
    """This rank's share of the loss; gradients are left unsummed, as their sum costs both the same."""

    def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
        return cpflex.flex_attention(q, k, v, block_mask=batch.plan)  # type: ignore[return-value]

    model.zero_grad()
    share = batch.share_of_loss(model(batch.local_tokens[None], batch.position_ids[None], attend))
    share.backward()
    return share.detach()


def measure(length: int, size: int, shared: float, repeats: int) -> dict[str, Any]:
    """One row, on this rank."""
    group = dist.group.WORLD
    assert group is not None
    prompt, completions = drawn(length, size, shared)
    batches = {name: make(prompt, completions, group) for name, make in BATCHES.items()}
    torch.manual_seed(0)
    model = Transformer(Shape(VOCAB, LAYERS, HEADS * HEAD_DIM, HEADS, HEADS))
    losses = {name: _summed(model_step(batch, model)) for name, batch in batches.items()}
    assert abs(losses["tree"] - losses["separate"]) < TOLERANCE, f"the two do not compute the same: {losses}"
    seconds: dict[str, float] = {}
    for name, step in _turns(batches, model, repeats):
        seconds[name] = min(seconds.get(name, float("inf")), _timed(step))
    counts = {f"{name}_{what}": getattr(b, what) for name, b in batches.items() for what in ("tokens", "pairs")}
    setting = {"length": length, "completions": size, "shared": shared}
    return {**setting, **counts, **{f"{name}_s": value for name, value in seconds.items()}, "losses": losses}


def _turns(batches: dict[str, Batch], model: Transformer, repeats: int) -> Iterator[tuple[str, Callable[[], object]]]:
    for _ in range(repeats):
        for name, batch in batches.items():
            yield f"{name}_attention", lambda batch=batch: attention_step(batch)
            yield f"{name}_model", lambda batch=batch: model_step(batch, model)


def _timed(step: Callable[[], object]) -> float:
    """Seconds of the slower rank."""
    dist.barrier()
    start = time.process_time()
    step()
    seconds = torch.tensor(time.process_time() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _summed(share: Tensor) -> float:
    dist.all_reduce(share)
    return share.item()


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its speedups, and what part of the ideal they are."""
    tokens, pairs = (row[f"separate_{what}"] / row[f"tree_{what}"] for what in ("tokens", "pairs"))
    attention_s, model_s = row["separate_attention_s"], row["separate_model_s"]
    in_layers_s = min(LAYERS * attention_s, model_s)
    ideal_s = in_layers_s / pairs + (model_s - in_layers_s) / tokens
    speedups = {what: row[f"separate_{what}_s"] / row[f"tree_{what}_s"] for what in ("attention", "model")}
    return row | {
        "fewer_tokens": tokens,
        "fewer_pairs": pairs,
        "attention_speedup": speedups["attention"],
        "attention_of_ideal": speedups["attention"] / pairs,
        "model_speedup": speedups["model"],
        "model_of_ideal": speedups["model"] * ideal_s / model_s,
    }


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['completions']:>3} completions of {row['length']:>5}, shared {row['shared']:4.0%}: "
        f"tokens {row['fewer_tokens']:5.2f}x, pairs {row['fewer_pairs']:5.2f}x fewer; "
        f"attention {row['tree_attention_s']:6.3f} s, {row['attention_speedup']:5.2f}x faster, "
        f"{row['attention_of_ideal']:.2f} of the ideal; "
        f"model {row['tree_model_s']:6.3f} s, {row['model_speedup']:5.2f}x, {row['model_of_ideal']:.2f}"
    )


def in_own_processes(row: tuple[int, int, float], repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (row, repeats, folder), NUM_RANKS)
        return json.loads((Path(folder) / "row.json").read_text())


def _rank(rank: int, row: tuple[int, int, float], repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=NUM_RANKS)
    measured = measure(*row, repeats)
    if rank == 0:
        (Path(folder) / "row.json").write_text(json.dumps(judged(measured)))
    dist.destroy_process_group()


def measure_all(only: Sequence[int], repeats: int, out: Path) -> None:
    """Rows with as many completions as ``only`` says, or all; each is printed and written when it is known."""
    record = {
        "command": "python " + " ".join(["benchmarks/trees.py", *sys.argv[1:]]),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cpflex": cpflex.__version__},
        "machine": machine(),
        "setting": f"{NUM_RANKS} gloo ranks of one thread, fp32, {HEADS} heads of {HEAD_DIM}, {LAYERS} layers",
    }
    rows = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if not only or row[1] in only:
            rows.append(in_own_processes(row, repeats))
            print(show(rows[-1]), flush=True)
            out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {out}")
