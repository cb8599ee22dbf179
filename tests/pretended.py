"""Pretends a GPU: tensors that say `cuda:0` but are on the CPU, and a meter of what a real GPU would do.

Inside `pretended()` the package's own code runs unchanged. An operation that mixes the host's tensors with the device's
raises, as CUDA would. The meter counts, by stage:

- kernels: operations on the device that are neither views nor allocations; a product or a sort counts once, though a
  library may use several, and fused attention counts as the products and the softmax that it is made of;
- syncs: where the host would wait for the device: `.item()`, sizes that depend on data (`nonzero`, indexing by a bool
  mask, `unique`, `bincount`, `equal`), copies between host and device unless they are asynchronous out of or into
  page-locked memory, and waiting for an event or a stream;
- bytes: what each kernel's operands hold, each read or written once.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
WAITS |= {"unique_consecutive", "is_nonzero", "linalg_eigh", "_linalg_eigh", "_linalg_svd"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "set_"}
READS_PARTS = {"index_select", "gather", "index", "embedding", "searchsorted"}  # not all of the first operand
HOST_INDICES = {"index", "index_put_", "index_put"}  # torch copies host indices to the device by itself


@dataclass(slots=True)
class Count:
    """The counts of one stage."""

    kernels: int = 0
    syncs: int = 0
    bytes: int = 0
    gram_bytes: int = 0  # reads of Gram matrices by our own kernel, counted separately
    waits: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    names: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Meter:
    """Counts by stage; `stage` is the current one."""

    def __init__(self) -> None:
        self.stages: dict[str, Count] = defaultdict(Count)
        self.stage = "other"
        self.is_on = True

    @property
    def total(self) -> Count:
        """Returns the sum over all stages."""
        parts = self.stages.values()
        return Count(*(sum(getattr(p, name) for p in parts) for name in ("kernels", "syncs", "bytes", "gram_bytes")))

    def reset(self) -> None:
        """Sets all counts to zero."""
        self.stages.clear()

    def kernel(self, name: str, size: int, *, gram_bytes: int = 0) -> None:
        """Counts one kernel with operands of `size` bytes."""
        if self.is_on:
            count = self.stages[self.stage]
            count.kernels, count.bytes = count.kernels + 1, count.bytes + size
            count.gram_bytes += gram_bytes
            count.names[name] += 1

    def wait(self, why: str) -> None:
        """Counts one wait of the host for the device."""
        if self.is_on:
            self.stages[self.stage].syncs += 1
            self.stages[self.stage].waits[why] += 1

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Counts as `stage` inside the block."""
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before


class OnDevice(Tensor):
    """A tensor that says it is on `cuda:0`; `inner` holds its numbers on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner!r})"

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor.__getitem__(self, _as_tensors(index))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, _as_tensors(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a pretended device's tensor outside `pretended()`")


class Dispatch(TorchDispatchMode):
    """Runs every operation on the CPU, marks the results as on the device, and counts."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self._pinned: dict[int, Any] = {}  # address -> storage, which is kept so that no other storage gets its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        wants = kwargs.get("device")
        target = None if wants is None else torch.device(wants).type
        pins = bool(kwargs.pop("pin_memory", None))
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs, target)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = [t for t in tensors if isinstance(t, OnDevice)]
        if target == "cuda" or (on_device and target is None):
            self._check(name, tensors)
            return self._run(func, name, args, kwargs, on_device)
        if on_device:
            raise RuntimeError(f"{name}: tensors of cuda:0 with device={wants}")
        made = func(*args, **kwargs)
        return self._pin(made) if pins else made

    def is_pinned(self, tensor: Tensor) -> bool:
        """Says whether the host's tensor is in memory that counts as page-locked."""
        return not isinstance(tensor, OnDevice) and tensor.untyped_storage().data_ptr() in self._pinned

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
        if not strangers:
            return
        if name in HOST_INDICES and all(t.dtype in (torch.int64, torch.bool) for t in strangers):
            for _ in strangers:
                self.meter.wait(f"{name} by the host's indices")
            return
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found cuda:0 and cpu")

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, on_device: list[OnDevice]) -> Any:
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        wrappers = {id(t.inner): t for t in on_device}
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if name in WAITS or (name in HOST_INDICES and _has_mask(args)):
            self.meter.wait(name)
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not is_view and name not in FREE and name != "_local_scalar_dense":
            outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            reads = [t.inner for t in on_device]
            if name in READS_PARTS:
                reads = [outs[0], *reads[1:]]
            written = [t for t in outs if id(t) not in wrappers]
            self.meter.kernel(name, sum(map(_size, [*reads, *written])))

        def label(value: Any) -> Any:
            known = wrappers.get(id(value))
            return known if known is not None else OnDevice(value) if isinstance(value, Tensor) else value

        return tree_map(label, out)

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any, target: str | None) -> Any:
        source = args[1] if name == "copy_" else args[0]
        from_device = isinstance(source, OnDevice)
        to_device = isinstance(args[0], OnDevice) if name == "copy_" else (from_device, True, False)[
            0 if target is None else 1 if target == "cuda" else 2
        ]  # fmt: skip
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        made = func(*inner_args, **inner_kwargs)
        if name == "_to_copy" and made is inner_args[0]:
            made = made.clone()
        if from_device and to_device:
            self.meter.kernel(name, _size(_inner(source)) + _size(made))
        elif (from_device or to_device) and not self._is_asynchronous(name, source, args, kwargs):
            self.meter.wait("copy to the host" if from_device else "copy to the device")
        if name == "copy_":
            return args[0]
        return OnDevice(made) if to_device else made

    def _is_asynchronous(self, name: str, source: Any, args: Any, kwargs: Any) -> bool:
        if name == "copy_" and source.dim() == 0 and not isinstance(source, OnDevice):
            return True  # a number is passed with the launch of the kernel
        host = args[0] if name == "copy_" and isinstance(source, OnDevice) else source
        wants = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return bool(wants) and self.is_pinned(host)


def _as_tensors(index: Any) -> Any:
    """Returns an index with lists and arrays turned into host tensors, which torch copies to the device."""
    if isinstance(index, tuple):
        return tuple(_as_tensors(part) for part in index)
    return torch.from_numpy(np.asarray(index)) if isinstance(index, list | np.ndarray) else index


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _size(tensor: Tensor) -> int:
    """Returns the bytes of a tensor, without the repetitions of expanded dimensions."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return tensor.element_size() * functools.reduce(lambda a, b: a * b, sizes, 1)


def _has_mask(args: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1]))


def _nothing(self: Tensor, stream: Any) -> None: ...


def _made(make: Any, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if isinstance(data, OnDevice):
        return data.to(device or data.device, dtype or data.dtype)
    made: Tensor = make(data, dtype=dtype)
    return made if device is None else made.to(device)


class _Event:
    def __init__(self, meter: Meter, **_: Any) -> None:
        self._meter = meter

    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._meter.wait("event")


class _Stream:
    def __init__(self, meter: Meter, *_: Any, **__: Any) -> None:
        self._meter = meter

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event(self._meter)

    def synchronize(self) -> None:
        self._meter.wait("stream")


@contextmanager
def pretended(*, gpus: int = 1, capability: tuple[int, int] = (9, 0)) -> Iterator[Meter]:
    """Makes torch see `gpus` NVIDIA GPUs of 80 GiB; the meter counts work on `cuda:0`."""
    meter = Meter()
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # one that does nothing, where there is no driver
    properties = SimpleNamespace(
        name="pretended",
        total_memory=80 << 30,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        L2_cache_size=50 << 20,
    )
    present = {
        "is_available": lambda: gpus > 0,
        "device_count": lambda: gpus,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "pretended",
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "synchronize": lambda device=None: meter.wait("synchronize"),
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: _Stream(meter),
        "stream": lambda stream: ExitStack(),
        "Event": functools.partial(_Event, meter),
        "Stream": functools.partial(_Stream, meter),
        "_lazy_init": lambda: None,
    }
    dispatch = Dispatch(meter)
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's `to` makes new parameters
        stack.enter_context(mock.patch.multiple(torch.cuda, **present))
        for name in ("tensor", "as_tensor"):  # these two functions look for a driver themselves
            stack.enter_context(mock.patch.object(torch, name, functools.partial(_made, getattr(torch, name))))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", _nothing))
        pin = lambda self, device=None: dispatch._pin(self.clone())  # noqa: E731
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", pin))
        stack.enter_context(mock.patch.object(Tensor, "is_pinned", lambda self, device=None: dispatch.is_pinned(self)))
        stack.enter_context(dispatch)
        yield meter


def by_stage(meter: Meter, *, scale: float = 1.0) -> Iterator[str]:
    """Returns a line for each stage, with its bytes times `scale`, and one for all stages."""
    for name, count in itertools.chain(meter.stages.items(), [("all", meter.total)]):
        yield f"{name}: {count.kernels} kernels, {count.syncs} syncs, {count.bytes * scale / 2**30:.2f} GiB"
