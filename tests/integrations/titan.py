"""A stand-in for torchtitan: the part of its main branch that the plug-in touches, by name and signature, as of September
2026 (`CPInnerAttention`) and as of the newest sources (`CPAttention`).

Written from the interface, not copied: configurations that build their owner, inner attentions and the abstract
context-parallel one, the transform that swaps them, the load balancer, the current mesh, and the order in which a
trainer calls them. `spmd_types` is stood in for as well.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

G, L = TypeVar("G"), TypeVar("L")


class Configurable:
    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type | None] = None

        def build(self, **runtime: Any) -> Any:
            assert self._owner is not None
            return self._owner(config=replace(self), **runtime)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = cls.__dict__.get("Config")
        if config is not None:
            assert "__slots__" in config.__dict__, "a Config is a dataclass(kw_only=True, slots=True)"
            config._owner = cls


class Module(nn.Module, Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        param_init: dict | None = None


class InnerAttention(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.attention_metadata_key = type(self)


class FlexInnerAttention(InnerAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(InnerAttention.Config):
        block_size: int = 128
        kernel_options: dict = field(default_factory=dict)

        def build_attention_metadata(self, positions: Tensor) -> BlockMask:
            return block_mask(document_causal(positions), len(positions))

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kernel_options = config.kernel_options

    def forward(self, q_THK, k_THK, v_THV, *, attention_metadata: BlockMask, **kwargs: Any) -> Tensor:
        raise AssertionError("the local attention was called")


class SlidingWindowFlexInnerAttention(FlexInnerAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(FlexInnerAttention.Config):
        window_size: int

        def build_attention_metadata(self, positions: Tensor) -> BlockMask:
            causal, window = document_causal(positions), self.window_size
            return block_mask(lambda b, h, q, k: causal(b, h, q, k) & (q - k < window), len(positions))


class CPInnerAttention(InnerAttention, ABC, Generic[G, L]):
    """The older seam: an attention itself."""

    @dataclass(kw_only=True, slots=True)
    class Config(InnerAttention.Config):
        pass

    @staticmethod
    @abstractmethod
    def prepare_cp_metadata(attention_metadata: G, *, permutation: Tensor | None) -> L: ...


class CPAttention(ABC, Generic[G, L]):
    """The newer seam: something that an attention can be besides, no module and no `Configurable`."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        pass

    @staticmethod
    @abstractmethod
    def prepare_cp_metadata(attention_metadata: G, *, permutation: Tensor | None) -> L: ...


class CPBatchAttention(CPAttention):
    """A seam that wants more than cpflex knows of."""

    @classmethod
    @abstractmethod
    def prepare_cp_batch_metadata(cls, input_dict: dict[str, Any], *, permutation: Tensor | None) -> dict: ...


SEAMS: dict[str, type] = {"CPAttention": CPAttention, "CPInnerAttention": CPInnerAttention}


class ContextParallelLoadBalancer(Configurable, ABC):
    @abstractmethod
    def generate_permutation(self) -> Tensor: ...


class HeadTailCPLoadBalancer(ContextParallelLoadBalancer):
    """Rank r gets pieces r and 2P - 1 - r."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config, *, seq_len: int, attention_metadata: object) -> None:
        group = spmd_mesh_group("cp")
        assert group is not None
        pieces = torch.arange(seq_len).view(2 * group.size(), -1)
        self.permutation = torch.cat([pieces[[r, -1 - r]].flatten() for r in range(group.size())])

    def generate_permutation(self) -> Tensor:
        return self.permutation[None]


class ScatteredCPLoadBalancer(HeadTailCPLoadBalancer):
    """Runs of 32 tokens in no order, as PTRR deals out blocks."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config, *, seq_len: int, attention_metadata: object) -> None:
        order = torch.randperm(seq_len // 32, generator=torch.Generator().manual_seed(0))
        self.permutation = torch.arange(seq_len).view(-1, 32)[order].flatten()


class ContextParallelTransform:
    """Swaps the types of configurations; fields of the same name stay."""

    def __init__(self, *, inner_attention_map: Mapping[type, type]) -> None:
        for local, over_ranks in inner_attention_map.items():
            assert issubclass(local, InnerAttention)
            assert issubclass(over_ranks, InnerAttention)
            assert issubclass(over_ranks, _installed[-1])
        self.inner_attention_map = inner_attention_map

    def transform(self, config: InnerAttention.Config) -> InnerAttention.Config:
        assert config._owner is not None
        target = self.inner_attention_map[config._owner].Config
        assert issubclass(target, type(config))
        made = target(**{f.name: getattr(config, f.name) for f in fields(config)})
        assert isinstance(made, _installed[-1].Config), "what is not found by this gets no metadata"
        return made


_installed: list[Any] = []
_meshes: list[DeviceMesh] = []


def spmd_mesh_group(axis_name: str) -> torch.distributed.ProcessGroup | None:
    if not _meshes or axis_name not in (_meshes[-1].mesh_dim_names or ()):
        return None
    group = _meshes[-1].get_group(axis_name)
    return group if group.size() > 1 else None


def document_causal(positions: Tensor):
    """torchtitan's mask of packed documents: keys from the start of the query's document to the query."""
    starts = positions == 0
    document_id = starts.int().cumsum(0).int() - 1
    offsets = torch.full((-(-(len(positions) + 1) // 128) * 128,), len(positions), dtype=torch.int32)
    offsets[: int(starts.sum())] = starts.nonzero().flatten().int()
    return lambda b, h, q, k: (q >= k) & (k >= offsets[document_id[q]])


def block_mask(mask_mod: Any, seq_len: int, num_heads: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, 1, num_heads, seq_len, seq_len, device="cpu")


HOME = "torchtitan.models.common.attention.cp_attention"


@contextmanager
def installed(
    seam: str = "CPAttention", cp_home: str = HOME, cp_attention: type | None = None, **beside: type
) -> Iterator[list[tuple[Any, ...]]]:
    """torchtitan and spmd_types as importable modules; yields what was asserted about types."""
    cp_attention = cp_attention or SEAMS[seam]
    asserted: list[tuple[Any, ...]] = []
    contents: dict[str, dict[str, Any]] = {
        "torchtitan.models.common.attention": {
            x.__name__: x for x in (FlexInnerAttention, SlidingWindowFlexInnerAttention)
        },
        cp_home: {seam: cp_attention} | beside,
        "torchtitan.distributed.context_parallel": {"ContextParallelLoadBalancer": ContextParallelLoadBalancer},
        "torchtitan.distributed.spmd_types": {"spmd_mesh_group": spmd_mesh_group},
        "spmd_types": {
            "no_typecheck": nullcontext,
            "is_type_checking": lambda: True,
            "get_local_type": lambda x: "local type",
            "get_partition_spec": lambda x: (("dp", "cp"), "tp", None),
            "PartitionSpec": lambda *dims: dims,
            "assert_type": lambda x, *types: asserted.append((tuple(x.shape), *types)),
        },
    }
    modules = {}
    for path, names in contents.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i]))).__path__ = []
        vars(modules[path]).update(names)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    _installed.append(cp_attention)
    try:
        yield asserted
    finally:
        _installed.pop()
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def current_mesh(mesh: DeviceMesh) -> Iterator[None]:
    _meshes.append(mesh)
    try:
        yield
    finally:
        _meshes.pop()
