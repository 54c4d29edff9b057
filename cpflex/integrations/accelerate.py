"""accelerate: its mesh and its FSDP2, with attention and sharding by cpflex.

accelerate takes ``cp_size`` as a dim of its device mesh, shards parameters over it, and gives the ranks of a sequence
the same batch: all of that stays. Its own context parallelism (``cp_backend="torch"``, the only one it knows) does not:
it removes the attention mask of every layer, packed documents, padding and sliding windows with it, and attends
causally to everything before. `attach` takes it out, and refuses what would fall back to it.

>>> accelerator = Accelerator(parallelism_config=ParallelismConfig(cp_size=4, dp_shard_size=2), fsdp_plugin=plugin)
>>> shares = attach(accelerator)                                                  # before prepare; with DDP see there
>>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
>>> for batch in loader:
...     plan = plan_for(model.config, shares.cp, position_ids=batch["position_ids"])
...     local = shard_batch(batch, plan)                                          # of cpflex.integrations.transformers
...     local["num_items_in_batch"] = num_labels(local["shift_labels"], shares.mean)
...     accelerator.backward(model(**local).loss * shares.averaged_over)

A streamed set needs ``Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))``: otherwise
accelerate reads it on rank 0 and deals its rows out to all ranks, those of one sequence too.

`gather_samples` is for evaluation, what ``accelerator.gather_for_metrics`` is without context parallelism.

The Trainer of transformers is in `cpflex.integrations.trainer`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, NoReturn

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, IterableDataset

SEAMS = ("_prepare_cp", "maybe_context_parallel")
"""Methods of the accelerator that are replaced: of accelerate 1.15, where they are tested."""


class Shares(NamedTuple):
    """Who shares what in this job."""

    cp: DeviceMesh | None
    """The ranks of one sequence, for `cpflex.make_plan`; None without context parallelism."""
    mean: DeviceMesh | dist.ProcessGroup | None
    """The ranks whose labels are in one mean, data and context parallelism together; None in a job of one process."""
    averaged_over: int
    """The ranks over which gradients are averaged: what a rank's share of the mean loss is to be multiplied by.

    `Accelerator.backward` also divides by ``gradient_accumulation_steps``: multiply by these as well, if the labels of
    all microbatches of a step are counted together.
    """
    dp: DeviceMesh | dist.ProcessGroup | None
    """The ranks that hold the other sequences of a batch, at this rank's place in them; None if there are none."""


def attach(accelerator: Accelerator, cp_size: int = 1) -> Shares:
    """Make an accelerator leave attention masks and sharding to cpflex. Call it before `Accelerator.prepare`.

    Args:
        cp_size: ranks that share a sequence, of an accelerator without ``parallelism_config``: all ranks hold all
            parameters, as with DDP, and with PEFT where only those of adapters are trained. accelerate allows
            ``cp_size`` in its own ``parallelism_config`` with FSDP2 only.

    Raises:
        ValueError: a model is prepared already, or, when it is prepared, attends by another implementation; a loader
            that gives ranks of one sequence unlike rows.
        NotImplementedError: DeepSpeed, Megatron-LM, or sequence parallelism beside context parallelism.
        ImportError: an accelerate that works in another way.
    """
    if missing := [name for name in SEAMS if not hasattr(accelerator, name)]:
        raise ImportError(
            f"accelerate {accelerate.__version__} has no {missing}; cpflex is tested with accelerate 1.15"
        )
    if accelerator._models:
        raise ValueError("attach(accelerator) must come before accelerator.prepare(model, ...)")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise NotImplementedError(f"{accelerator.distributed_type} is not supported; use FSDP2 or DDP")
    if cp_size > 1:
        _tell_of_sequences(accelerator, cp_size)
    sizes = accelerator.parallelism_config
    if sizes is not None and sizes.sp_enabled:
        raise NotImplementedError(f"sp_size must be 1; got {sizes.sp_size} - cpflex shards the sequence over cp_size")
    for name, replacement in zip(SEAMS, (partial(_check, accelerator), _refuse), strict=True):
        setattr(accelerator, name, replacement)
    averaged_over = accelerator.num_processes // (sizes.tp_size if sizes is not None else 1)
    mesh = accelerator.torch_device_mesh
    if sizes is None or mesh is None:
        world = dist.group.WORLD if accelerator.use_distributed else None
        return Shares(None, world, averaged_over, world)

    def together(dims: list[str], name: str) -> DeviceMesh | None:
        return (mesh[dims[0]] if len(dims) == 1 else mesh[tuple(dims)]._flatten(name)) if dims else None

    mean, dp = together(sizes.dp_cp_dim_names, "dp_cp"), together(sizes.dp_dim_names, "dp")
    return Shares(mesh["cp"] if sizes.cp_enabled else None, mean, averaged_over, dp)


class _Replicated(ParallelismConfig):
    """Of ranks that hold all parameters, which accelerate refuses for ``cp_size``."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        pass


def told_before() -> ParallelismConfig | None:
    """What `attach` told an earlier accelerator without FSDP2: all of a process share it, and must be made with it."""
    found = AcceleratorState._shared_state.get("parallelism_config")
    return found if isinstance(found, _Replicated) else None


def _tell_of_sequences(accelerator: Accelerator, cp_size: int) -> None:
    """Give an accelerator that shards no parameters the mesh by which its loaders deal out batches."""
    found = accelerator.parallelism_config
    if isinstance(found, _Replicated) and found.cp_size == cp_size:
        return
    if not isinstance(found, (_Replicated, type(None))) or accelerator.is_fsdp2:
        raise ValueError("with FSDP2 pass cp_size to accelerate, ParallelismConfig(cp_size=...), and not to attach")
    if accelerator.num_processes % cp_size:
        raise ValueError(f"cp_size must divide the {accelerator.num_processes} processes; got {cp_size}")
    sizes = _Replicated(cp_size=cp_size, dp_shard_size=accelerator.num_processes // cp_size)
    state: Any = accelerator.state
    state.parallelism_config = sizes
    state.device_mesh = sizes.build_device_mesh(accelerator.device.type)


def gather_samples(accelerator: Accelerator, shares: Shares, values: Any) -> Any:
    """What the ranks hold for the samples of a batch, those that fill up the last batch dropped, on every rank.

    ``accelerator.gather_for_metrics`` knows nothing of ranks that share a sequence: it would gather their samples
    several times, and drop others in the place of the surplus.

    Args:
        values: tensors [B, ...] in tuples, lists and dicts, B alike on all ranks; those of a sequence hold the same,
            for instance ``plan.plan.unshard(logits, dim=1)``.
    """
    if (group := shares.dp) is None:
        whole = values
    else:
        group = group.get_group() if isinstance(group, DeviceMesh) else group

        def gathered(x: Tensor) -> Tensor:
            x = x[None] if x.ndim == 0 else x.contiguous()
            dist.all_gather(parts := [torch.empty_like(x) for _ in range(group.size())], x, group=group)
            return torch.cat(parts)

        whole = recursively_apply(gathered, values)
    state = accelerator.gradient_state
    left = state.remainder if state.end_of_dataloader else 0  # samples of the last batch; 0 is all, -1 is not known
    return recursively_apply(lambda x: x[:left], whole) if left > 0 else whole


def _check(accelerator: Accelerator, *prepared: Any) -> tuple[Any, ...]:
    """In the place of the hooks that remove attention masks."""
    for one in prepared:
        if isinstance(one, nn.Module):
            _check_model(one)
        elif isinstance(one, DataLoader):
            _check_loader(one, accelerator.dispatch_batches)
    return prepared


def _check_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)  # with images, the text's counts
    text_config = getattr(config, "get_text_config", lambda: config)()
    found = getattr(text_config, "_attn_implementation", None)
    if found is not None and not found.startswith("cpflex"):
        raise ValueError(
            f"{type(model).__name__} attends by {found!r}, to this rank's tokens only; "
            'load it with attn_implementation="cpflex"'
        )


def _check_loader(loader: DataLoader[Any], dispatch_batches: bool | None) -> None:
    is_streamed = isinstance(loader.dataset, IterableDataset)
    if dispatch_batches or (dispatch_batches is None and is_streamed):
        raise ValueError(
            "the ranks of a sequence must read the same rows; got dispatch_batches="
            f"{dispatch_batches}{' and an IterableDataset' if is_streamed else ''}, which deals other rows out to each "
            "rank - pass dataloader_config=DataLoaderConfiguration(dispatch_batches=False) to the Accelerator, or "
            'accelerator_config={"dispatch_batches": False} to TrainingArguments'
        )


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(
        "accelerate's context parallelism, which drops attention masks, is replaced by cpflex: shard batches with "
        "shard_batch or plan.shard, or train with cpflex.integrations.trainer.Trainer"
    )
