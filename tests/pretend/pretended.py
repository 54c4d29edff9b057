"""A CUDA device on a machine without one: tensors that say "cuda" and lie on the CPU, and what would have happened, as a list.

    with pretending(90) as events:
        x = torch.zeros(5).to("cuda")
        kernel[(1,)](x)
    events.count("h2d"), events.launches

Operations of torch compute, on the CPU. Triton's own binder, compiler and launcher run up to the driver (`libcuda.c`),
which tells of every launch; a kernel computes nothing, and what it would have written is what `torch.empty` left.
A process that pretends does nothing else: see `checks.process`.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import backward
import stand_ins
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KINDS = ("operation", "h2d", "d2h", "h2d_async", "d2h_async", "sync", "allocation", "launch")
"""h2d, d2h: copies for which the host waits, because of the caller or because the host's memory is pageable; sync: what
else it waits for."""

DEVICE = torch.device("cuda", 0)
NO_WORK = (
    *("view", "slice", "select", "transpose", "permute", "expand", "unsqueeze", "squeeze", "detach", "alias", "narrow"),
    *("as_strided", "split", "split_with_sizes", "t", "_unsafe_view", "unbind", "lift_fresh", "_reshape_alias"),
    *("diagonal", "unfold", "view_as_real", "real", "broadcast_to", "chunk"),
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"),
)
"""Operations that run nothing on the device."""
WAITED_FOR = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive"),
    *("_unique2", "unique_dim", "bincount"),
)
"""Operations whose result, or its shape, the host needs before it can go on."""


class Launch(NamedTuple):
    """What the driver was told; in a session that compiles nothing, what Triton's binder saw."""

    name: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    arguments: dict[str, Any]
    """Pointers by their address, numbers; those of a tuple as ``name[0]``, ``name[1]``, ..."""


class Event(NamedTuple):
    """One of KINDS; what: an operation's name, a kernel's."""

    kind: str
    what: str
    detail: Any = None


class Events(list[Event]):
    """In the order in which the host caused them."""

    variants: dict[str, int]
    """Variants of each kernel that were compiled, or would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.variants = {}

    def tell(self, kind: str, what: str, detail: Any = None) -> None:
        assert kind in KINDS, kind
        self.append(Event(kind, what, detail))

    def count(self, kind: str) -> int:  # type: ignore[override]
        return sum(event.kind == kind for event in self)

    def counts(self) -> dict[str, int]:
        """How many of each kind, without those that did not happen."""
        return {kind: found for kind in KINDS if (found := self.count(kind))}

    @property
    def launches(self) -> list[Launch]:
        return [event.detail for event in self if event.kind == "launch"]


class Cuda(Tensor):
    """A tensor on the pretended device; ``data`` of it lies on the CPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> Cuda:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.host = host
        return made

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Cuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert _session is not None, "a tensor of the pretended device outlived it"
        return _session.run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Tensors are made on the device, too."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self.session = session

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.session.run(func, args, kwargs or {})


_session: _Session | None = None


class _Session:
    def __init__(self, events: Events, computes_up_to: int) -> None:
        self.events = events
        self.computes_up_to = computes_up_to
        self.pinned: dict[int, Any] = {}  # storages by their address; kept, so that no other gets it

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One operation of torch, on the CPU, told as what it would be."""
        name = func._schema.name.split("::")[-1]
        if func.namespace == "cpflex":  # its own Python, on these tensors
            from cpflex.ring.operator import IMPLEMENTATIONS

            with _Mode(self):
                return IMPLEMENTATIONS[name](*args, **kwargs)
        if name in ("is_pinned", "pin_memory", "_pin_memory"):
            return self._about_pinning(name, args[0])
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with _Mode(self):  # below autograd torch leaves these whole
                if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return parts

        seen: list[Cuda] = []

        def on_host(x: Any) -> Any:
            if isinstance(x, Cuda):
                seen.append(x)
                return x.host
            return x

        host_args, host_kwargs = tree_map(on_host, args), tree_map(on_host, kwargs)
        is_pinned = bool(host_kwargs.pop("pin_memory", False))
        is_cuda = self._tell_copies(name, args, host_kwargs, bool(seen))
        if not seen and not is_cuda:
            made = func(*host_args, **host_kwargs)
            if is_pinned:
                self._pin(made)
            return made
        _refuse_mixed(name, args)
        if seen and (name in WAITED_FOR or _waits(name, args, kwargs)):
            self.events.tell("sync", name)
        elif is_cuda and name not in NO_WORK and not name.startswith("_to_copy"):
            self.events.tell("operation", name)
        found = self._computed(func, name, host_args, host_kwargs)
        if not is_cuda:
            return found
        by_host = {id(x.host): x for x in seen}
        return tree_map(lambda x: self._on_device(x, name, by_host), found)

    def _on_device(self, x: Any, name: str, by_host: dict[int, Cuda]) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, Cuda):
            return x
        if id(x) in by_host:
            return by_host[id(x)]
        if name not in NO_WORK or "empty" in name:
            self.events.tell("allocation", name, x.numel() * x.element_size())
        return Cuda(x)

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Beyond a size, what nobody reads is not computed: memory of the shape that it would have."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        shape = args[0] if args and name in ("empty", "zeros", "ones", "randn", "rand", "randint", "full") else ()
        most = max([x.numel() for x in tensors] + [int(torch.Size(shape).numel()) if _is_shape(shape) else 0])
        if most <= self.computes_up_to or name in NO_WORK:
            return func(*args, **kwargs)
        if name == "equal":
            return True
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        meta_args, meta_kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
        meta = func(*meta_args, **meta_kwargs | ({} if tensors and "device" not in kwargs else {"device": "meta"}))
        return tree_map(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x, meta)  # fmt: skip

    def _tell_copies(self, name: str, args: Any, kwargs: dict[str, Any], has_cuda: bool) -> bool:
        """Whether results lie on the device; a copy over the bus is told, a wish for the device becomes one for the CPU."""
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type in ("cuda", "cpu"):
            to_cuda = torch.device(wanted).type == "cuda"
            kwargs["device"] = torch.device("cpu")
            if name == "_to_copy" and to_cuda != has_cuda:
                # torch takes pinned memory itself for what it brings to the host without waiting
                can = self._is_pinned(args[0]) if to_cuda else True
                self._tell_copy("h2d" if to_cuda else "d2h", can and kwargs.get("non_blocking", False), args[0])
            elif name == "_to_copy" and to_cuda:
                self.events.tell("operation", name)
            return to_cuda
        if name == "copy_" and isinstance(args[1], Tensor) and isinstance(args[0], Cuda) != isinstance(args[1], Cuda):
            to_cuda = isinstance(args[0], Cuda)
            in_background = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            can = self._is_pinned(args[1] if to_cuda else args[0])
            self._tell_copy("h2d" if to_cuda else "d2h", in_background and can, args[1])
            return has_cuda
        if name in ("index", "index_put", "index_put_") and has_cuda:
            for index in args[1]:
                if isinstance(index, Tensor) and not isinstance(index, Cuda):
                    self._tell_copy("h2d", False, index)
        return has_cuda

    def _tell_copy(self, direction: str, in_background: bool, x: Tensor) -> None:
        self.events.tell(direction + ("_async" if in_background else ""), "copy", x.numel() * x.element_size())

    def _about_pinning(self, name: str, x: Tensor) -> Any:
        if name == "is_pinned":
            return self._is_pinned(x)
        return x if self._is_pinned(x) else self._pin(x.clone())

    def _pin(self, x: Tensor) -> Tensor:
        self.pinned[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return not isinstance(x, Cuda) and x.untyped_storage().data_ptr() in self.pinned


def _is_shape(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and all(isinstance(n, int) for n in x)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Of operations that wait for some arguments only."""
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _refuse_mixed(name: str, args: Any) -> None:
    """As torch does: a number on the CPU may be an operand, a tensor may not."""
    mixed = [x for x in tree_leaves(args) if isinstance(x, Tensor) and not isinstance(x, Cuda) and x.ndim > 0]
    if mixed and any(isinstance(x, Cuda) for x in tree_leaves(args)) and name not in ("_to_copy", "copy_", "index", "index_put", "index_put_"):  # fmt: skip
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")


# -- the session


@contextlib.contextmanager
def pretending(capability: int = 90, *, compiles: bool = True, computes_up_to: int = 1 << 62) -> Iterator[Events]:
    """Inside there is one CUDA device, a chip of ``capability`` (90: sm_90) with its shared memory.

    Args:
        compiles: False: Triton's binder runs and tells the launch; nothing is compiled, the driver hears nothing.
        computes_up_to: operations with more elements than this give memory that nobody wrote.
    """
    global _session
    assert _session is None, "one device is pretended at a time"
    events = Events()
    session = _Session(events, computes_up_to)
    with contextlib.ExitStack() as stack:
        for owner, name, value in _in_place_of_torch(capability, session):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        for owner, name, value in _in_place_of_triton(capability, events, compiles):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(_forget)
        _forget()
        _session = session
        try:
            with _Mode(session):
                yield events
        finally:
            _session = None
            _listener[:] = []


def _forget() -> None:
    """What the library remembers of a device belongs to the chip that was pretended before."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cpflex.kernels"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
                if hasattr(value, "device_caches"):
                    value.device_caches.clear()
        if name == "cpflex.kernels.fitting":
            module._fitted.clear()
            module._rows.clear()


def _in_place_of_torch(capability: int, session: _Session) -> Iterator[tuple[Any, str, Any]]:
    stand_ins.load()
    waits = session.events.tell
    make_tensor, run_thread = torch.tensor, threading.Thread.run

    def tensor(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        made = make_tensor(data, *args, **options)
        device = torch.get_default_device() if device is None else torch.device(device)
        return made.to(device) if device.type == "cuda" else made

    def run_in_mode(thread: threading.Thread) -> None:
        with _Mode(session):
            run_thread(thread)

    class Stream:
        cuda_stream, device = 0, DEVICE

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream)  # there is one

        def __hash__(self) -> int:
            return 0

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def wait_stream(self, other: Stream) -> None: ...
        def wait_event(self, event: Any) -> None: ...
        def record_event(self, event: Any = None) -> Any:
            return event or CudaEvent()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            waits("sync", "Stream.synchronize")

    class CudaEvent:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, stream: Any = None) -> None: ...
        def wait(self, stream: Any = None) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            waits("sync", "Event.synchronize")

        def elapsed_time(self, end: Any) -> float:
            return float("inf")  # milliseconds that nothing may be divided into

    class device(contextlib.nullcontext):
        def __init__(self, *_: Any) -> None:
            super().__init__()

    chip = SimpleNamespace(
        name=f"pretended sm_{capability}", major=capability // 10, minor=capability % 10, multi_processor_count=132,
        total_memory=80 << 30, L2_cache_size=50 << 20, is_integrated=0,
    )  # fmt: skip
    yield torch, "tensor", tensor
    yield threading.Thread, "run", run_in_mode
    yield torch.autograd, "_engine_run_backward", backward.run
    yield torch.version, "cuda", "13.0"
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda _=None: chip.name,
        "get_device_capability": lambda _=None: (chip.major, chip.minor),
        "get_device_properties": lambda _=None: chip,
        "can_device_access_peer": lambda *_: False,
        "mem_get_info": lambda _=None: (chip.total_memory, chip.total_memory),
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda _=None: 0,
        "memory_allocated": lambda _=None: 0,
        "reset_peak_memory_stats": lambda _=None: None,
        "synchronize": lambda _=None: waits("sync", "synchronize"),
        "current_stream": lambda _=None: Stream(),
        "default_stream": lambda _=None: Stream(),
        "stream": lambda stream: Stream(),
        "Stream": Stream,
        "Event": CudaEvent,
        "device": device,
    }.items():
        yield torch.cuda, name, value
    from cpflex.mods import trace

    # a mod may capture plain tensors only, which these would be
    yield trace, "type", lambda x: Tensor if builtins.type(x) is Cuda else builtins.type(x)


# -- what Triton is told, and what it tells the driver

_listener: list[Any] = []
"""The driver's, kept alive for as long as it may call."""

HEARD = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)


def _in_place_of_triton(capability: int, events: Events, compiles: bool) -> Iterator[tuple[Any, str, Any]]:
    import triton
    from triton.runtime.jit import JITFunction

    yield triton.runtime.driver, "_active", _driver(capability)
    if compiles:
        yield from _launches_of_the_driver(events)
    else:
        yield JITFunction, "_do_compile", _compiles_nothing(events)


def _driver(capability: int) -> Any:
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        """Triton's own, but for what it would ask torch."""

        def __init__(self) -> None:
            self.get_device_capability = lambda _=None: (capability // 10, capability % 10)
            with mock.patch.object(torch.cuda, "current_stream", None):
                super().__init__()
            self.get_device_capability = lambda _=None: (capability // 10, capability % 10)
            self.get_current_stream = lambda _=None: 0
            self.get_current_device = lambda: capability  # libcuda.c: each chip is a device, with kernels of its own

    return Driver()


def _launches_of_the_driver(events: Events) -> Iterator[tuple[Any, str, Any]]:
    from triton.compiler import CompiledKernel

    kernels: dict[int, Any] = {}
    init_handles = CompiledKernel._init_handles

    def loaded(self: Any) -> None:
        is_new = self.module is None
        init_handles(self)
        kernels[self.function] = self
        if is_new:
            events.variants[self.name] = events.variants.get(self.name, 0) + 1

    def heard(function: int, grid: Any, threads: int, shared_bytes: int, arguments: Any) -> None:
        kernel = kernels[function]
        told = _arguments(kernel.src.signature, arguments)
        launch = Launch(kernel.name, tuple(grid[i] for i in range(3)), threads, shared_bytes, told)
        events.tell("launch", kernel.name, launch)

    _listener.append(HEARD(heard))
    stand_ins.load().pretend_listen(_listener[-1])
    yield CompiledKernel, "_init_handles", loaded


SIZES = {"i1": "b", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}
SIZES |= {"fp32": "f", "fp64": "d"}


def _arguments(signature: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """By name, as they lie in memory; descriptors and what follows them are not read."""
    told: dict[str, Any] = {}
    for place, (name, kind) in enumerate(_flat(signature)):
        if kind.startswith("tensordesc"):
            break
        code = "Q" if kind.startswith("*") else SIZES[kind]
        (told[name],) = struct.unpack(code, ctypes.string_at(arguments[place], struct.calcsize(code)))
    return told


def _flat(signature: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, type) of what a launch passes."""
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            yield from _flat({f"{name}[{i}]": inner for i, inner in enumerate(kind)})
        elif kind != "constexpr":
            yield name, kind


def _compiles_nothing(events: Events) -> Callable:
    class Bound:
        """Stands for a compiled kernel."""

        function, packed_metadata, module = 0, (), 0
        metadata = SimpleNamespace(shared=0)

        def __init__(self, fn: Any, num_warps: int) -> None:
            self.fn, self.name, self.threads = fn, fn.fn.__name__, 32 * num_warps

        def launch_metadata(self, *_: Any) -> None: ...
        def run(self, x: int, y: int, z: int, *rest: Any) -> None:
            names = [p.name for p in self.fn.params]
            told = {n: a.data_ptr() if isinstance(a, Tensor) else a for n, a in zip(names, rest[6:], strict=False)}
            events.tell("launch", self.name, Launch(self.name, (x, y, z), self.threads, 0, told))

    def do_compile(self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, *_: Any) -> Any:
        events.variants[self.fn.__name__] = events.variants.get(self.fn.__name__, 0) + 1
        bound = Bound(self, options.num_warps)
        self.device_caches[device][0][key] = bound
        return bound

    return do_compile
