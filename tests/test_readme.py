"""The README: every row of its table of what works is tried and is what it says, and the run it begins with runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cpflex
from cpflex.testing import ThreadLinks, run_ranks
from patience import patience

README = Path(__file__).parent.parent / "README.md"
S, HEADS, DIM = 200, 4, 16


def rows() -> dict[str, str]:
    table = README.read_text().split("<!-- support table")[1].split("<!-- end -->")[0]
    found = re.findall(r"^\| (.+) \| (yes|refused) \|$", table, flags=re.MULTILINE)
    return dict(found)


def tensors(
    plan: cpflex.Plan, kv_heads: int = HEADS, v_dim: int = DIM, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = [(HEADS, DIM), (kv_heads, DIM), (kv_heads, v_dim)]
    return [torch.randn(2, heads, plan.local_len, dim, dtype=dtype, requires_grad=True) for heads, dim in shapes]


def attend(mask: Callable, group: ThreadLinks, seq_len: int = S, **options) -> Tensor:
    plan = cpflex.make_plan(mask, seq_len, group, batch_size=2, num_heads=HEADS)
    q, k, v = tensors(plan, **options.pop("shapes", {}))
    out = cpflex.flex_attention(q, k, v, block_mask=plan, **options)
    assert isinstance(out, Tensor)
    out.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    return out


def named_masks(group: ThreadLinks) -> None:
    document = cpflex.document(cu_seqlens=[0, 70, S])
    attend((cpflex.causal() & document & cpflex.sliding_window(20)) | ~cpflex.full() | cpflex.prefix_lm(5), group)


def any_mask(group: ThreadLinks) -> None:
    reach = torch.arange(2 * HEADS).view(2, HEADS)
    attend(lambda b, h, q, k: (q >= k) & ((q - k) % (reach[b, h] + 1) == 0), group)


def any_score_mod(group: ThreadLinks) -> None:
    slopes = torch.rand(HEADS, requires_grad=True)
    attend(cpflex.causal(), group, score_mod=lambda s, b, h, q, k: torch.tanh(s) - slopes[h] * (q - k))
    assert slopes.grad is not None
    assert slopes.grad.abs().sum() > 0


def several_kinds(group: ThreadLinks) -> None:
    masks = {"full": cpflex.causal(), "sliding": cpflex.causal() & cpflex.sliding_window(16)}
    plan = cpflex.make_plan(masks, S, group, weights={"full": 1, "sliding": 5})
    for kind in masks:
        cpflex.flex_attention(*tensors(plan), block_mask=plan[kind])


def any_length(group: ThreadLinks) -> None:
    attend(cpflex.causal() & cpflex.document(cu_seqlens=[0, 1, 3, 101]), group, seq_len=101)
    attend(cpflex.causal(), group, seq_len=1)


def grouped_queries(group: ThreadLinks) -> None:
    attend(cpflex.causal(), group, shapes={"kv_heads": 2, "v_dim": 24}, enable_gqa=True)


def dtypes(group: ThreadLinks) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert attend(cpflex.causal(), group, shapes={"dtype": dtype}).dtype == dtype


def sinks(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal(), S, group)
    sink = torch.zeros(HEADS, requires_grad=True)
    out, lse = cpflex.flex_attention(*tensors(plan), block_mask=plan, return_lse=True)
    (out * torch.sigmoid(lse - sink[:, None]).unsqueeze(-1)).sum().backward()
    assert sink.grad is not None


def compiled(group: ThreadLinks) -> None:
    # every rank of a real job compiles for itself; threads would share one compiler, so one rank shows it here
    if group.rank == 0:
        plans = [cpflex.make_plan(cpflex.causal() & cpflex.sliding_window(w), S) for w in (3, 50)]
        call = torch.compile(
            lambda q, k, v, plan: cpflex.flex_attention(q, k, v, block_mask=plan), fullgraph=True, backend="eager"
        )
        for plan in plans:
            q, k, v = tensors(plan)
            torch.testing.assert_close(call(q, k, v, plan), cpflex.flex_attention(q, k, v, block_mask=plan))


def checkpointed(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal(), S, group)
    q, k, v = tensors(plan)
    out = checkpoint(lambda *x: cpflex.flex_attention(*x, block_mask=plan), q, k, v, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert q.grad is not None


def strided(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal(), S, group)
    q, k, v = torch.randn(2, plan.local_len, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    expected = cpflex.flex_attention(*(x.contiguous() for x in (q, k, v)), block_mask=plan)
    torch.testing.assert_close(cpflex.flex_attention(q, k, v, block_mask=plan), expected)


def packed_tensors(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal() & cpflex.document(cu_seqlens=[0, 70, S]), S, group)
    q, k, v = plan.shard(torch.randn(S, 3, HEADS, DIM), dim=0, pad_value=0.0).unbind(dim=1)
    expected = cpflex.flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=plan)
    out = cpflex.flex_attention(q, k, v, block_mask=plan)
    assert isinstance(expected, Tensor)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=0, atol=0)


def exchanged_heads(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal() & cpflex.sliding_window(30), S, group, ulysses_size=2)
    q, k, v = tensors(plan)
    assert plan.outer.world_size == 1
    assert cpflex.flex_attention(q, k, v, block_mask=plan).shape == q.shape  # pyright: ignore


def across_nodes(group: ThreadLinks) -> None:
    one_a_node = cpflex.Topology(gpus_per_node=1, intra_gb_per_s=370.0, inter_gb_per_s=47.0)
    plan = cpflex.make_plan(cpflex.causal(), S, group, topology=one_a_node, schedule=cpflex.relay(2))
    q, k, v = tensors(plan)
    assert cpflex.flex_attention(q, k, v, block_mask=plan).shape == q.shape  # pyright: ignore


def dropout(group: ThreadLinks) -> None:
    attend(cpflex.causal(), group, dropout_p=0.1)


def cross_attention(group: ThreadLinks) -> None:
    encoder = cpflex.make_plan(cpflex.full(), 90, group)
    for keys, kv_len in ((encoder, encoder.local_len), (33, 33)):
        plan = cpflex.make_plan({"self": cpflex.causal(), "cross": cpflex.cross(cpflex.full(), keys)}, S, group)
        q = tensors(plan)[0]
        k, v = torch.randn(2, 2, HEADS, kv_len, DIM)
        assert cpflex.flex_attention(q, k, v, block_mask=plan["cross"]).shape == q.shape  # pyright: ignore


def chunks(group: ThreadLinks) -> None:
    plans, keys = [], []
    for _ in range(3):
        plan = cpflex.make_plan(cpflex.cached(cpflex.causal() & cpflex.sliding_window(70), plans), 60, group)
        q, k, _ = tensors(plan)
        plans, keys = [*plans, plan], [*keys, k]
        held = torch.cat(keys, dim=2)
        assert cpflex.flex_attention(q, held, held, block_mask=plan).shape == q.shape  # pyright: ignore


def shared_prefixes(group: ThreadLinks) -> None:
    tree = cpflex.trees.Tree([-1, 0, 0, 2, 2], [S - 60, 20, 10, 20, 10])
    window = cpflex.sliding_window(30, positions=tree.depths)
    attend(cpflex.tree(tree) & window, group, score_mod=lambda s, b, h, q, k: s - (tree.depths[q] - tree.depths[k]))


def paged_decode(group: ThreadLinks) -> None:
    """Token by token, as all tokens at once."""
    mask = cpflex.causal() & cpflex.sliding_window(9)
    q, k, v = torch.randn(3, 1, HEADS, 48, DIM, generator=torch.Generator().manual_seed(0))  # threads share torch's own
    pages = cpflex.Pages(8, page_size=4, group=group)
    pool = pages.pool(HEADS, DIM)
    pages.reserve("a", 48)
    found = []
    for step in range(48):
        plan = cpflex.make_decode_plan(mask, pages, {"a": 1}, horizon=1)
        token = slice(step, step + 1)
        pool.assign(k[:, :, token], v[:, :, token], plan)
        found.append(cpflex.flex_attention(q[:, :, token], pool.k, pool.v, block_mask=plan))
        plan.advance()
    expected = cpflex.flex_attention(q, k, v, block_mask=cpflex.make_plan(mask, 48))
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=1e-5, atol=2e-6)


def dtensor(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal(), S, group)
    q, k, v = tensors(plan)

    class Sharded(torch.distributed.tensor.DTensor):
        __new__ = torch.Tensor.__new__  # pyright: ignore
        __init__ = object.__init__  # pyright: ignore

    cpflex.flex_attention(torch.Tensor._make_subclass(Sharded, q.detach()), k, v, block_mask=plan)


def torch_block_mask(group: ThreadLinks) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(cpflex.causal(), None, None, S, S, device="cpu")
    attend(block_mask, group)  # pyright: ignore


def float64(group: ThreadLinks) -> None:
    attend(cpflex.causal(), group, shapes={"dtype": torch.float64})


def second_derivative(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal(), S, group)
    q, k, v = tensors(plan)
    out = cpflex.flex_attention(q, k, v, block_mask=plan)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    grad.sum().backward()


TRIALS: dict[str, Callable[[ThreadLinks], None]] = {
    r"`causal`, `full`, `sliding_window`, `document`, `prefix_lm`, combined by `&`, `\|`, `~`": named_masks,
    "any pointwise `mask_mod`, also one that depends on batch and head": any_mask,
    "any pointwise `score_mod` at global positions, with gradients of captured tensors": any_score_mod,
    "several mask kinds (full and sliding layers) on one balanced layout": several_kinds,
    "documents of any length, any sequence length, more ranks than tokens": any_length,
    "grouped queries without expanding K/V, `Dv != D`": grouped_queries,
    "float32, bfloat16, float16": dtypes,
    "differentiable lse: attention sinks on top": sinks,
    "`torch.compile(fullgraph=True)`, one graph for all plans": compiled,
    "activation checkpointing; selective, without a second exchange": checkpointed,
    "strided q, k, v": strided,
    "[T, H, D] tensors, without copies": packed_tensors,
    "heads exchanged inside, keys outside (two dimensions), with any of the above": exchanged_heads,
    "across nodes: each row crosses to a node once, gradients added before they cross back": across_nodes,
    "dropout": dropout,
    "cross attention: keys of another sequence, with a layout of their own or on every rank": cross_attention,
    "a sequence in chunks (chunked prefill): keys of earlier chunks stay on their ranks": chunks,
    "shared prefixes stored once, as a tree; windows and biases by depth": shared_prefixes,
    "KV cache, paged decode, over many ranks": paged_decode,
    "DTensor inputs": dtensor,
    "a torch `BlockMask`": torch_block_mask,
    "float64": float64,
    "second derivatives": second_derivative,
}


def test_every_row_of_the_table_is_tried():
    assert set(rows()) == set(TRIALS)


@pytest.mark.parametrize("feature", TRIALS)
def test_the_table_is_true(feature: str):
    if rows()[feature] == "yes":
        run_ranks(TRIALS[feature], world_size=2, timeout=60)
    else:
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            run_ranks(TRIALS[feature], world_size=2, timeout=60)


# -- the text around it


def texts() -> Iterator[Path]:
    """Not those of environments that lie here, which may be coming or going."""
    for folder, folders, files in os.walk(README.parent):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".md"))


TEXTS = list(texts())


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(README.parent)))
def test_links_lead_somewhere_and_python_is_python(path: Path):
    text = path.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), target
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        ast.parse(block)


# -- the Hugging Face model and its GPUs

NAME = '"Qwen/Qwen3-0.6B"'
CU_SEQLENS = (0, 1000, 1001, 4096)


def hugging_face_run() -> str:
    section = README.read_text().split("<!-- hugging face")[1].split("<!-- end -->")[0]
    return section.split("```python\n")[1].split("```")[0]


def small_model(directory: Path) -> str:
    """What the name in the README is replaced by: a model of the same class, of whose attention the loss depends."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "initializer_range": 0.4}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(directory)
    return str(directory)


def losses_and_norms_of_one_process(directory: str) -> list[tuple[float, float]]:
    """Document by document, by transformers' own attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    found = []
    for seed in range(3):
        tokens = torch.randint(1000, (1, 4096), generator=torch.Generator().manual_seed(seed))[0]
        losses = []
        for document in (tokens[begin:end] for begin, end in pairwise(CU_SEQLENS)):
            logits = model(document[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none"))
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.hf
@pytest.mark.by_day(5)
def test_the_hugging_face_run_does_what_one_process_does(tmp_path: Path):
    pytest.importorskip("transformers")
    text = hugging_face_run()
    assert text.count(NAME) == 1
    directory = small_model(tmp_path / "model")
    (tmp_path / "my_run.py").write_text(text.replace(NAME, repr(directory)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "my_run.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=patience(200), check=False)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"loss (\S+), gradient norm (\S+)", done.stdout)
    expected = losses_and_norms_of_one_process(directory)
    assert len(said) == len(expected) == 3, done.stdout
    for numbers, truth in zip(said, expected, strict=True):
        assert [float(number) for number in numbers] == pytest.approx(truth, abs=2e-4)
