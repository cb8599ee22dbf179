"""Stand-ins for Triton's kernels on the pretended device: launches are counted, and the compiled engine answers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from batchjob.clustering import triton_gram, triton_search
from batchjob.clustering.compiled import CompiledEngine
from tests.pretended import Meter, OnDevice


class Launch:
    """Stands for `kernel[grid](**arguments)`: counts a kernel, each operand once, Gram matrices separately."""

    def __init__(self, name: str, meter: Meter) -> None:
        self._name, self._meter = name, meter

    def __getitem__(self, grid: Any) -> Any:
        return self._run

    def _run(self, **given: Any) -> None:
        tensors = {id(v): v for v in given.values() if isinstance(v, Tensor)}
        assert all(isinstance(v, OnDevice) for v in tensors.values()), "a kernel was given the host's memory"
        is_search = self._name == "search_kernel"
        size = sum(v.numel() * v.element_size() for v in tensors.values() if v is not given.get("gram_ptr"))
        gram = given.get("gram_ptr")
        gram_bytes = 0 if gram is None else gram.numel() * gram.element_size()
        if is_search and given["EXACT"]:  # this kernel reads only problems that are flagged, and here no problem is
            self._meter.kernel(self._name, given["doubtful_ptr"].numel())
        elif is_search:
            scratch = sum(given[n].numel() * given[n].element_size() for n in ("numbers_ptr", "x_ptr", "mean_ptr"))
            self._meter.kernel(self._name, size - scratch, gram_bytes=gram_bytes)
            _solve(given)
        else:
            self._meter.kernel(self._name, size + gram_bytes)


def _solve(given: dict[str, Any]) -> None:
    inner = {name: value.inner for name, value in given.items() if isinstance(value, OnDevice)}
    mask = inner["mask_ptr"].bool() if given["HAS_MASK"] else None
    n_init = 0 if given["rounds"] else given["n_init"]
    k, seeds = inner["k_ptr"].long(), inner["seeds_ptr"]
    found = CompiledEngine().kmeans(inner["x_ptr"], k, seeds, n_init=n_init, mask=mask)
    for name, values in (("labels", found.labels), ("inertia", found.inertia), ("found", found.k)):
        inner[f"{name}_ptr"].copy_(values)
    inner["settled_ptr"].copy_(found.settled)
    inner["doubtful_ptr"].zero_()


@contextmanager
def counted_kernels(meter: Meter) -> Iterator[None]:
    """Counts and answers the launches of the triton engine inside the block."""
    with ExitStack() as stack:
        for name, module in (("measure", triton_gram), ("gram", triton_gram), ("search", triton_search)):
            stack.enter_context(mock.patch.object(module, f"{name}_kernel", Launch(f"{name}_kernel", meter)))
        stack.enter_context(mock.patch.object(torch.cuda, "device", return_value=ExitStack()))
        with torch.no_grad():
            yield
