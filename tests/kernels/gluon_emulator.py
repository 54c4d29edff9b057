"""Runs Gluon's kernels for sm_90 on the CPU: partitions take turns at random, copies and products land at random moments.

    kernel = Emulated(hopper_forward.attend_kernel, seed=7)
    kernel[(num_programs,)](*arguments, **options)      # as it is launched: tensors, tensor descriptors, numbers

The kernel's own source is run, with another language under it. A `Fault` is raised for

    a deadlock                  nobody can go on, and nothing is under way
    a race in shared memory     two accesses, one of which writes, that no barrier and no wait has ordered
    a missing fence             what was stored is read by a product or by a copy without `fence_async_shared`
    a result not waited for     of a product that may still be under way
    an arrival too many         at an mbarrier, or none was initialised
    memory out of bounds        of a tensor, or shared memory that nobody wrote
    what is left behind         copies, stores or products that nobody has waited for when a program ends

Races do not depend on luck: partitions, barriers and what is under way carry vector clocks, so that two accesses that are
not ordered are found in whatever order they came. Deadlocks, phases and wrong results need interleavings: a seed is one.
A `Fault` names the seed and the program, and shows the last turns; the same seed plays the same turns again.

Not modelled: layouts, registers, int32 that overflows, and what ptxas makes of it.
"""

from __future__ import annotations

import ast
import inspect
import math
import random
import textwrap
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language
from torch import Tensor
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import JITFunction

Clock = dict[str, int]
"""By whom, up to which of its moments, is known to be over."""


class Fault(AssertionError):
    """What a kernel does wrong."""


class _Stopped(BaseException):
    """Another partition has failed."""


# -- who runs


@dataclass(eq=False)
class _Partition:
    name: str
    clock: Clock
    ready: Callable[[], bool] = lambda: True
    waits_for: str = "nothing"
    done: bool = False
    products: list[_Product] = field(default_factory=list)
    stores: list[_Access] = field(default_factory=list)
    """Since the last fence."""
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def tick(self) -> None:
        """What comes now is not what was made known before."""
        self.clock[self.name] += 1


class _Program:
    """One program: its partitions, one of which runs at a time, and what is under way."""

    def __init__(self, index: int, seed: int, haste: float) -> None:
        self.index, self.seed, self.haste = index, seed, haste
        self.random = random.Random(f"{seed} {index}")
        self.main = _Partition("main", {"main": 1})
        self.partitions = [self.main]
        self.under_way: list[_Copy | _Store] = []
        self.begun: list[str] = []
        self.turns: list[str] = []
        self.fault: BaseException | None = None
        self.ended = threading.Semaphore(0)

    def wait(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "its turn") -> None:
        """Let others run, at least until ``ready``."""
        me = _me()
        me.ready, me.waits_for = ready, waits_for
        chosen = self.choose()
        if chosen is not me:
            if chosen is not None:
                chosen.baton.release()
            me.baton.acquire()
        if self.fault is not None:
            raise _Stopped
        me.ready = lambda: True

    def choose(self) -> _Partition | None:
        """Who runs next; before that, what is under way may land."""
        while True:
            if self.fault is not None:
                return None
            alive = [p for p in self.partitions if not p.done]
            ready = [p for p in alive if p.ready()]
            landing = [*self.under_way, *(p.products[0] for p in alive if any(not x.landed for x in p.products[:1]))]
            if landing and (not ready or self.random.random() < self.haste):
                self.land(self.random.choice(landing))
            elif ready:
                chosen = self.random.choice(ready)
                self.turns.append(f"{chosen.name} goes on ({chosen.waits_for})")
                return chosen
            elif not alive:
                return None
            else:
                self.stop(Fault("deadlock: " + "; ".join(f"{p.name} waits for {p.waits_for}" for p in alive)))

    def land(self, what: _Copy | _Store | _Product) -> None:
        self.turns.append(f"{what} lands")
        if not isinstance(what, _Product):
            self.under_way.remove(what)
        try:
            what.land()
        except Fault as fault:
            self.stop(fault)

    def stop(self, fault: BaseException) -> None:
        """Nobody runs any more."""
        if self.fault is None:
            self.fault = fault
        for partition in self.partitions:
            partition.baton.release()

    def specialize(self, jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Each job as a partition of its own; back when all are over."""
        before = self.main
        self.partitions = []
        for i, (function, _) in enumerate(jobs):
            name = f"{function.__name__} {i}"
            self.partitions.append(_Partition(name, before.clock | {name: 1}))
        threads = [
            threading.Thread(target=self._run, args=(partition, *job), daemon=True)
            for partition, job in zip(self.partitions, jobs, strict=True)
        ]
        for thread in threads:
            thread.start()
        if (first := self.choose()) is not None:
            first.baton.release()
        for thread in threads:
            thread.join()
        if self.fault is not None:
            raise self.fault
        for partition in self.partitions:
            _know(before.clock, partition.clock)
        self.partitions = [before]

    def _run(self, me: _Partition, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _local.program, _local.me = self, me
        me.baton.acquire()
        try:
            if self.fault is None:
                function(*arguments)
                if me.products:
                    raise Fault(f"{me.name} ends while products are under way")
        except _Stopped:
            pass
        except BaseException as fault:  # noqa: BLE001 - raised again in the thread of the launch
            self.stop(fault)
        me.done = True
        if (chosen := self.choose()) is not None:
            chosen.baton.release()

    def run(self, kernel: Callable[..., None], arguments: Mapping[str, Any]) -> None:
        _local.program, _local.me = self, self.main
        try:
            kernel(**arguments)
            if left := [name for name in self.begun if name not in self.main.clock]:
                raise Fault(f"the program ends, and nobody has waited for {left[0]}")
        except (Fault, _Stopped) as stopped:
            fault, turns = self.fault or stopped, "\n    ".join(self.turns[-12:])
            raise Fault(f"seed {self.seed}, program {self.index}: {fault}\n    {turns}") from fault


_local = threading.local()


def _me() -> _Partition:
    return _local.me


def _program() -> _Program:
    return _local.program


def _know(clock: Clock, other: Clock) -> None:
    for name, moment in other.items():
        clock[name] = max(clock.get(name, 0), moment)


# -- shared memory


@dataclass(eq=False)
class _Access:
    """Of elements ``low : high`` of an allocation, by ``who``, over at ``moment``; None while it is under way."""

    what: str
    low: int
    high: int
    writes: bool
    who: str
    moment: int | None
    by_threads: bool = False
    fenced: bool = False

    def is_before(self, clock: Clock) -> bool:
        return self.moment is not None and clock.get(self.who, 0) >= self.moment


class Shared:
    """A view of an allocation, from the first to the last of its elements as far as races go."""

    def __init__(self, data: Tensor, accesses: list[_Access]) -> None:
        self.data, self.accesses = data, accesses

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, i: int) -> Shared:
        if not 0 <= i < len(self.data):
            raise Fault(f"buffer {i} of {len(self.data)}")
        return Shared(self.data[i], self.accesses)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape), self.accesses)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order), self.accesses)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length), self.accesses)

    def access(self, what: str, *, writes: bool, who: str, moment: int | None, by_threads: bool = False) -> _Access:
        """Note an access that the running partition begins; everything it collides with must be known to be over."""
        low = self.data.storage_offset()
        high = low + sum((n - 1) * stride for n, stride in zip(self.data.shape, self.data.stride(), strict=True)) + 1
        clock, touched = _me().clock, [a for a in self.accesses if a.low < high and low < a.high]
        for other in touched:
            if (writes or other.writes) and not other.is_before(clock):
                state = "is under way" if other.moment is None else "is not known to be over"
                raise Fault(f"race: {what} of {_me().name} and {other.what}, which {state}")
            if other.writes and other.by_threads and not other.fenced and not by_threads and not writes:
                raise Fault(f"no fence between {other.what} and {what} of {_me().name}")
        if not writes and not any(a.writes for a in touched):
            raise Fault(f"{what} of {_me().name} reads shared memory that nobody wrote")
        if writes:
            self.accesses[:] = [a for a in self.accesses if not (low <= a.low and a.high <= high)]
        made = _Access(f"{what} of {_me().name}", low, high, writes, who, moment, by_threads)
        self.accesses.append(made)
        return made

    def store(self, value: Tensor) -> None:
        me = _me()
        me.stores.append(self.access("a store", writes=True, who=me.name, moment=me.clock[me.name], by_threads=True))
        self.data.copy_(value)
        _program().wait()

    def load(self, layout: Any = None) -> Tensor:
        me = _me()
        self.access("a load", writes=False, who=me.name, moment=me.clock[me.name], by_threads=True)
        value = self.data.clone()
        _program().wait()
        return value


class _Barrier:
    """An mbarrier. Who has waited for a phase knows what those knew who arrived in it."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.arriving: Clock = {}
        self.completed: Clock = {}

    def arrive(self, clock: Clock, count: int) -> None:
        if self.count == 0:
            raise Fault(f"{_me().name} arrives at an mbarrier that nobody initialised")
        self.pending -= count
        if self.pending < 0:
            raise Fault(f"{_me().name} arrives at an mbarrier where all have arrived")
        _know(self.arriving, clock)
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.completed, self.arriving = self.arriving, {}


class _Barriers:
    def __init__(self, num: int) -> None:
        self.barriers = [_Barrier() for _ in range(num)]

    def index(self, i: int) -> _Barrier:
        return self.barriers[i]


# -- what is under way


@dataclass(eq=False)
class _Copy:
    """From a tensor to shared memory, by TMA."""

    name: str
    source: Descriptor
    at: Sequence[int]
    barrier: _Barrier
    into: Shared
    access: _Access

    def land(self) -> None:
        self.into.data.copy_(self.source.read(self.at))
        self.access.moment = 1
        _know(self.barrier.arriving, {self.name: 1})
        self.barrier.bytes -= self.source.block_type.nbytes
        self.barrier.complete()

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class _Store:
    """From shared memory to a tensor, by TMA; ``adds`` to what is there."""

    name: str
    target: Descriptor
    at: Sequence[int]
    source: Shared
    access: _Access
    by: _Partition
    adds: bool

    def land(self) -> None:
        self.target.write(self.at, self.source.data, self.adds)
        self.access.moment = 1

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class _Product:
    """A wgmma. It reads shared memory until it is waited for, and its registers are nobody's until then."""

    by: _Partition
    a: Any
    b: Any
    acc: Any
    reads: list[_Access]
    value: Tensor | None = None
    landed: bool = False
    awaited: bool = False

    def land(self) -> None:
        """Products land in their order."""
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        self.value = a.float() @ b.float()
        if self.acc is not None:
            self.value = self.value + (self.acc.value if isinstance(self.acc, _Product) else self.acc)
        self.landed = True

    def __str__(self) -> str:
        return f"a product of {self.by.name}"

    def __getattr__(self, name: str) -> Any:
        raise Fault(f"{self}: its result is read, and was not waited for")


def _not_yet(self: _Product, *_: Any) -> Any:
    raise Fault(f"{self}: its result is read, and was not waited for")


for _operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "gt", "lt"):
    setattr(_Product, f"__{_operator}__", _not_yet)


# -- global memory


class Pointer:
    """Into a contiguous tensor, checked against its bounds."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def elements(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(all elements of the tensor, which of them, whether they are wanted)."""
        if not self.tensor.is_contiguous():
            raise Fault("a pointer into a tensor that is not contiguous")
        flat, at = self.tensor.view(-1), torch.as_tensor(self.offset)
        wanted = torch.as_tensor(True if mask is None else mask)
        at, wanted = torch.broadcast_tensors(at, wanted)
        if (outside := wanted & ((at < 0) | (at >= flat.numel()))).any():
            raise Fault(f"element {int(at[outside][0])} of a tensor of {flat.numel()}")
        return flat, at, wanted


class Descriptor:
    """A tensor descriptor: blocks of a tensor, zeros beyond its ends."""

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> None:
        self.tensor, self.block, self.dtype, self.layout = (
            base.as_strided(shape, strides),
            list(block),
            base.dtype,
            None,
        )
        nbytes = math.prod(block) * base.element_size()
        self.block_type = types.SimpleNamespace(shape=self.block, nbytes=nbytes)

    def _slices(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, block = [], []
        for first, length, size in zip(at, self.block, self.tensor.shape, strict=True):
            low, high = min(max(first, 0), size), min(max(first + length, 0), size)
            inside.append(slice(low, high))
            block.append(slice(low - first, high - first) if high > low else slice(0, 0))
        return tuple(inside), tuple(block)

    def read(self, at: Sequence[int]) -> Tensor:
        inside, block = self._slices(at)
        found = torch.zeros(self.block, dtype=self.dtype)
        found[block] = self.tensor[inside]
        return found

    def write(self, at: Sequence[int], value: Tensor, adds: bool) -> None:
        inside, block = self._slices(at)
        value = value.view(self.block)[block]
        self.tensor[inside] = self.tensor[inside] + value if adds else value


# -- the language: what a kernel finds under the names of Gluon. Scalars are Python's, blocks are tensors.


def _is_block(*values: Any) -> bool:
    return any(isinstance(x, Tensor) for x in values)


def _like(value: Any, other: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=other.dtype if _is_block(other) else None)


class Language:
    """Of `triton.experimental.gluon.language`, and of `triton.language` in what is called from there."""

    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    exp2, log2, abs = staticmethod(torch.exp2), staticmethod(torch.log2), staticmethod(torch.abs)
    NVMMADistributedLayout = SliceLayout = DotOperandLayout = BlockedLayout = staticmethod(lambda *a, **k: None)
    SwizzledSharedLayout = NVMMASharedLayout = staticmethod(lambda *a, **k: None)
    static_range = range

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value

    @staticmethod
    def arange(first: int, end: int, layout: Any = None) -> Tensor:
        return torch.arange(first, end, dtype=torch.int32)

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: torch.dtype, layout: Any = None) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype)

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, layout: Any = None) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    @staticmethod
    def expand_dims(x: Tensor, axis: int) -> Tensor:
        return x.unsqueeze(axis)

    @staticmethod
    def convert_layout(x: Tensor, layout: Any) -> Tensor:
        return x

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if not _is_block(condition, x, y):
            return x if condition else y
        return torch.where(torch.as_tensor(condition), _like(x, y), _like(y, x))

    @staticmethod
    def maximum(x: Any, y: Any) -> Any:
        return torch.maximum(_like(x, y), _like(y, x)) if _is_block(x, y) else max(x, y)

    @staticmethod
    def minimum(x: Any, y: Any) -> Any:
        return torch.minimum(_like(x, y), _like(y, x)) if _is_block(x, y) else min(x, y)

    @staticmethod
    def max(x: Tensor, axis: int) -> Tensor:
        return x.amax(axis)

    @staticmethod
    def sum(x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    @staticmethod
    def cast(x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype) if _is_block(x) else x

    @staticmethod
    def program_id(axis: int) -> int:
        return _program().index

    @staticmethod
    def barrier() -> None:
        """A partition is one here."""

    thread_barrier = barrier

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
        if mask is None and isinstance(pointer.offset, int) and 0 <= pointer.offset < pointer.tensor.numel():
            return pointer.tensor.view(-1)[pointer.offset].item()  # as below, and sooner
        flat, at, wanted = pointer.elements(mask)
        if at.ndim == 0:
            return flat[at].item() if wanted else other
        return torch.where(wanted, flat[torch.where(wanted, at, 0)], torch.tensor(other, dtype=flat.dtype))

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        flat, at, wanted = pointer.elements(mask)
        value = torch.as_tensor(value).to(flat.dtype).expand(at.shape)
        flat[at[wanted]] = value[wanted]

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout == "mbarrier":
            return _Barriers(shape[0])
        return Shared(torch.full(tuple(shape), math.nan, dtype=dtype), [])

    @staticmethod
    def warp_specialize(jobs: Sequence[Any], num_warps: Any, registers: Any = None) -> None:
        _program().specialize(jobs)


class Mbarrier:
    """Of `hopper.mbarrier`."""

    @staticmethod
    def MBarrierLayout() -> str:
        return "mbarrier"

    @staticmethod
    def init(barrier: _Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier: _Barrier, num_bytes: int, pred: bool = True) -> None:
        if pred:
            barrier.bytes += num_bytes
            Mbarrier.arrive(barrier)

    @staticmethod
    def arrive(barrier: _Barrier, *, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.arrive(_me().clock, count)
            _me().tick()
        _program().wait()

    @staticmethod
    def wait(barrier: _Barrier, phase: int, pred: bool = True) -> None:
        if pred:
            where = f"phase {phase} of an mbarrier"
            _program().wait(lambda: barrier.phase != phase, where)
            _know(_me().clock, barrier.completed)


class Tma:
    """Of `hopper.tma`, in the names of all releases."""

    @staticmethod
    def async_copy_global_to_shared(
        source: Descriptor, at: Sequence[int], barrier: _Barrier, into: Shared, pred: bool = True
    ) -> None:
        if pred:
            program = _program()
            name = f"copy {len(program.begun) + 1} of {_me().name}"
            program.begun.append(name)
            access = into.access("a copy", writes=True, who=name, moment=None)
            into.data.fill_(math.nan)
            program.under_way.append(_Copy(name, source, list(at), barrier, into, access))
            program.wait()

    async_load = async_copy_global_to_shared

    @staticmethod
    def async_copy_shared_to_global(target: Descriptor, at: Sequence[int], source: Shared, adds: bool = False) -> None:
        program = _program()
        name = f"store {len(program.begun) + 1} of {_me().name}"
        program.begun.append(name)
        access = source.access("a store by TMA", writes=False, who=name, moment=None)
        program.under_way.append(_Store(name, target, list(at), source, access, _me(), adds))
        program.wait()

    async_store = async_copy_shared_to_global

    @staticmethod
    def async_atomic_add(target: Descriptor, at: Sequence[int], source: Shared) -> None:
        Tma.async_copy_shared_to_global(target, at, source, adds=True)

    @staticmethod
    def store_wait(pendings: int) -> None:
        program, me = _program(), _me()
        mine = [x for x in program.under_way if isinstance(x, _Store) and x.by is me]
        older = mine[: max(len(mine) - pendings, 0)]
        program.wait(lambda: not any(x in program.under_way for x in older), "its stores")
        left = {str(x) for x in program.under_way}
        mine = [name for name in program.begun if name.startswith("store") and name.endswith(f" of {me.name}")]
        _know(me.clock, {name: 1 for name in mine[: len(mine) - pendings] if name not in left})


class Hopper:
    """Of `hopper`."""

    mbarrier, tma = Mbarrier, Tma

    @staticmethod
    def fence_async_shared(cluster: bool = False) -> None:
        for access in _me().stores:
            access.fenced = True
        _me().stores.clear()

    @staticmethod
    def warpgroup_mma(
        a: Any, b: Shared, acc: Any, *, use_acc: bool = True, precision: Any = None, is_async: bool = False
    ) -> Any:
        me = _me()
        operands = [x for x in (a, b) if isinstance(x, Shared)]
        reads = [x.access("a product", writes=False, who=me.name, moment=None) for x in operands]
        product = _Product(me, a, b, acc if use_acc else None, reads)
        me.products.append(product)
        _program().wait()
        return product if is_async else Hopper.warpgroup_mma_wait(0, deps=(product,))

    @staticmethod
    def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
        me = _me()
        while len(me.products) > num_outstanding:
            product = me.products.pop(0)
            if not product.landed:
                product.land()
            product.awaited = True
            for access in product.reads:
                access.moment = me.clock[me.name]
        _program().wait()
        for product in deps:
            if isinstance(product, _Product) and not product.awaited:
                raise Fault(f"{product}: its result is read, and was not waited for")
        values = [x.value if isinstance(x, _Product) else x for x in deps]
        return values[0] if len(values) == 1 else tuple(values)


# -- launches


class Emulated:
    """A kernel that is launched as the real one is.

    Args:
        stand_ins: by the name of a function that the kernel calls: what is run in its place. For inline assembly.
        mods: by the function that is an argument of the kernel: what is called in its place.
        edits: of its source: what is written in place of what, once. For faults that are planted.
        haste: how likely it is that something lands before somebody goes on.
    """

    programs_run = 0
    """Of all kernels."""

    def __init__(
        self,
        kernel: JITFunction,
        seed: int,
        stand_ins: Mapping[str, Callable[..., Any]] | None = None,
        mods: Mapping[Any, Callable[..., Any]] | None = None,
        edits: Mapping[str, str] | None = None,
        haste: float = 0.3,
    ) -> None:
        self.names = kernel.arg_names
        self.seed, self.haste, self.mods = seed, haste, mods or {}
        self.translate = _Translator(stand_ins or {}, edits or {})
        self.kernel = self.translate(kernel)
        assert not self.translate.edits, f"not in the source: {list(self.translate.edits)}"

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            named = dict(zip(self.names, arguments, strict=False))
            named |= {name: value for name, value in options.items() if name in self.names}
            passed = {name: self._argument(value) for name, value in named.items()}
            Emulated.programs_run += grid[0]
            for program in range(grid[0]):
                _Program(program, self.seed, self.haste).run(self.kernel, passed)

        return launch

    def _argument(self, value: Any) -> Any:
        if isinstance(value, JITFunction):
            return self.mods[value] if value in self.mods else self.translate(value)
        if isinstance(value, Tensor):
            return Pointer(value)
        if hasattr(value, "block_shape"):
            return Descriptor(value.base, value.shape, value.strides, value.block_shape)
        return tuple(map(self._argument, value)) if isinstance(value, tuple) else value


class _Translator:
    """Device functions as Python runs them, with the emulated language under their names."""

    def __init__(self, stand_ins: Mapping[str, Callable[..., Any]], edits: Mapping[str, str]) -> None:
        self.done: dict[Any, Callable[..., Any]] = {}
        self.stand_ins, self.edits = stand_ins, dict(edits)
        self.known: dict[int, Any] = {id(triton.language): Language}
        rooms = (hopper, Hopper), (hopper.tma, Tma), (hopper.mbarrier, Mbarrier), (gluon_language, Language)
        for real, emulated in rooms:
            self.known[id(real)] = emulated
            for name in vars(emulated):
                if hasattr(real, name):
                    self.known[id(getattr(real, name))] = getattr(emulated, name)

    def __call__(self, function: JITFunction) -> Callable[..., Any]:
        if function not in self.done:
            python = function.fn
            stand_in = self.stand_ins.get(python.__name__)
            self.done[function] = self._translated(python) if stand_in is None else stand_in
        return self.done[function]

    def _translated(self, python: Callable[..., Any]) -> Callable[..., Any]:
        """Errors are shown where they are in the file."""
        lines, first = inspect.getsourcelines(python)
        text = textwrap.dedent("".join(lines))
        for old in [old for old in self.edits if old in text]:
            text = text.replace(old, self.edits.pop(old), 1)
        tree = ast.increment_lineno(_Plain().visit(ast.parse(text)), first - 1)
        code = compile(ast.fix_missing_locations(tree), inspect.getfile(python), "exec")
        names: dict[str, Any] = {"__builtins__": __builtins__}
        exec(code, names)
        used = _used(code) - {python.__name__}
        names.update({name: self.of(value) for name, value in python.__globals__.items() if name in used})
        return names[python.__name__]

    def of(self, value: Any) -> Any:
        if isinstance(value, JITFunction):
            return self(value)
        if isinstance(value, types.FunctionType) and value.__name__ in self.stand_ins:
            return self.stand_ins[value.__name__]
        if isinstance(value, gluon_language.constexpr | triton.language.constexpr):
            return value.value
        return self.known.get(id(value), value)


def _used(code: Any) -> set[str]:
    """Names that code, and what is defined in it, looks up."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _used(constant)
    return found


class _Plain(ast.NodeTransformer):
    """Without decorators and annotations; ``x += y`` as ``x = x + y``: blocks are values, not places."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        for argument in node.args.args:
            argument.annotation = None
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)
