"""The kernels that torch.compile makes of FlexAttention for a GPU that is not here: Inductor renders its own template,
with its own configurations, mods and integers, and Triton compiles them.

The graphs are traced on CPU tensors that hold nothing, as a training step's; then they are lowered as if those were on
a GPU. What Inductor asks about the GPU is answered by what is patched in `a_gpu`: names of torch 2.13.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from ahead_of_time import AbsentGpu
from torch import Tensor
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCK = 128


class Compiled(NamedTuple):
    """One kernel."""

    cubin: bytes
    shared_bytes: int
    num_warps: int
    options: dict[str, Any]  # BLOCK_M, BLOCK_N and the like


def kernels(capability: int, head_dim: int, mods: str, seq_len: int) -> dict[str, Compiled]:
    """ "forward" and "backward" with four query heads and two key heads. In a process of its own for each capability:
    Inductor remembers the GPU that it has seen.
    """
    graphs = _traced(head_dim, mods, seq_len)
    with a_gpu(capability):
        sources = [_lowered(graph, inputs) for graph, inputs in graphs]
        found = zip(("forward", "backward"), sources, strict=True)
        return {name: _compiled(source, capability) for name, source in found}


# -- mods, as users of FlexAttention write them


def mods_of(name: str, seq_len: int) -> tuple[Callable | None, Callable | None]:
    """(mask_mod, score_mod). Tensors hold nothing."""
    slopes = torch.empty(4)
    documents = torch.empty(seq_len, dtype=torch.int64)

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def window_of_documents(b, h, q_idx, kv_idx):
        return (documents[q_idx] == documents[kv_idx]) & (q_idx - kv_idx < 256) & (q_idx >= kv_idx)

    def alibi(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    def softcap(score, b, h, q_idx, kv_idx):
        return 30.0 * torch.tanh(score / 30.0)

    return {
        "full": (None, None),
        "causal": (causal, None),
        "causal+alibi": (causal, alibi),
        "causal+softcap": (causal, softcap),
        "documents+window": (window_of_documents, None),
    }[name]


# -- graphs


def _traced(head_dim: int, mods: str, seq_len: int) -> list[tuple[torch.fx.GraphModule, list[Any]]]:
    """Of forward and backward, with their inputs."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import flex_attention as flex

    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        from functorch.compile import make_boxed_func

        graphs.append((graph, inputs))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table)
    torch._dynamo.reset()
    anywhere = mock.patch.object(flex, "_validate_device", lambda *_: None)  # noqa: PT008, as it is traced through
    with FakeTensorMode(allow_non_fake_inputs=True), anywhere:
        mask_mod, score_mod = mods_of(mods, seq_len)
        block_mask = None if mask_mod is None else _block_mask(flex, mask_mod, seq_len // BLOCK)
        sizes = [(1, heads, seq_len, head_dim) for heads in (4, 2, 2)]
        q, k, v = (torch.empty(*size, dtype=torch.bfloat16, requires_grad=True) for size in sizes)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex.flex_attention(q, k, v, score_mod, block_mask, enable_gqa=True)

        torch.compile(attend, backend=backend, fullgraph=True)(q, k, v).sum().backward()
    return graphs


def _block_mask(flex: Any, mask_mod: Callable, num_blocks: int) -> Any:
    """With room for every block; nothing is in it."""
    names = [
        f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
    ]
    shapes = {"num_blocks": (1, 1, num_blocks), "indices": (1, 1, num_blocks, num_blocks)}
    tensors = {x: torch.empty(shapes[re.sub("(full_)?(kv|q)_", "", x)], dtype=torch.int32) for x in names}
    seq_len = num_blocks * BLOCK
    return flex.BlockMask(seq_lengths=(seq_len, seq_len), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod, **tensors)


# -- lowered as if on a GPU


class Nowhere(contextlib.nullcontext):
    """torch.cuda.device: which one is current is nobody's concern."""


@contextlib.contextmanager
def a_gpu(capability: int) -> Iterator[None]:
    import torch._inductor.scheduler as scheduler

    version = divmod(capability, 10)
    properties = SimpleNamespace(
        major=version[0], minor=version[1], multi_processor_count=132, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, warp_size=32, total_memory=80 << 30, name="absent", gcnArchName="",
        shared_memory_per_block_optin=166912 if capability < 90 else 232448, L2_cache_size=50 << 20,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: version,
        "get_device_properties": lambda device=None: properties,
        "_get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
        "device": Nowhere,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", return_value=True))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", AbsentGpu(capability)))
        yield


def _lowered(graph: torch.fx.GraphModule, inputs: list[Any]) -> str:
    """The program that Inductor writes."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if "val" in node.meta:
                node.meta["val"] = tree_map(moved, node.meta["val"])
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            node.args = tuple(_with_lse(x) for x in node.args)
    on_gpu = [moved(x) for x in inputs]
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowering = GraphLowering(graph, example_inputs=on_gpu, is_inference=False)
        with V.set_graph_handler(lowering):
            lowering.run(*on_gpu)
            code, _ = lowering.codegen()
    return code if isinstance(code, str) else code.value


def _with_lse(argument: Any) -> Any:
    """On a GPU a training step keeps the log-sum-exp; the options of CPU tensors say that it does not."""
    is_options = isinstance(argument, dict) and "OUTPUT_LOGSUMEXP" in argument
    return {**argument, "OUTPUT_LOGSUMEXP": True} if is_options else argument


# -- compiled


def _compiled(program: str, capability: int) -> Compiled:
    """The one kernel of the template in it."""
    (source,) = (
        x for x in re.findall(r"async_compile\.triton\('.*?', '''(.*?)''',", program, re.DOTALL) if "_tem_" in x
    )
    source = source.replace("@triton_heuristics.template(", "@kept(")
    kept: dict[str, Any] = {}

    def keep(**options: Any) -> Callable:
        return lambda function: kept.update(options, function=function)

    with tempfile.TemporaryDirectory() as folder:  # Triton reads functions from their file
        path = Path(folder) / "of_inductor.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("of_inductor", path)
        module = importlib.util.module_from_spec(spec)
        vars(module)["kept"] = keep
        sys.modules["of_inductor"] = module
        spec.loader.exec_module(module)
        meta, function = kept["triton_meta"], kept["function"]
        ast = ASTSource(function, meta["signature"], meta["constants"], meta["configs"][0])
        made = triton.compile(
            ast,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": kept["num_warps"], "num_stages": kept["num_stages"]},
        )
    options = kept["inductor_meta"]["config_args"]
    return Compiled(made.asm["cubin"], made.metadata.shared, made.metadata.num_warps, options)
