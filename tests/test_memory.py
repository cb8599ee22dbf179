"""The memory forecast against the memory in use, the batch size it leads to, and the halving if it was wrong."""

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from batchjob.errors import UserError
from batchjob.job import memory
from batchjob.job.memory import HalvingGuard, choose_batch_size, forecast, halves
from batchjob.loader.loader import Batch
from batchjob.model.attention import Extractor
from batchjob.model.describe import Model
from tests.networks import make_model, make_pixels

CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Returns the peak of the bytes of tensors made inside the `with` block, without those of `model`."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of(model: Model, pixels: Tensor, layers: tuple[int, ...], heads: tuple[int, ...]) -> int:
    with LiveBytes(model) as live:
        for maps in Extractor(model, layers, heads)(pixels):
            del maps
    return live.peak


@pytest.mark.parametrize(
    ("name", "size", "layers", "heads"),
    [
        ("vit_tiny_patch16_224", "224", (11,), (0, 1, 2)),
        ("vit_tiny_patch16_224", "64", (11,), (0,)),
        ("vit_tiny_patch16_224", "224", (0, 5, 11), (0, 1, 2)),
        ("vit_small_patch14_reg4_dinov2", "112", (11,), (0, 1, 2, 3, 4, 5)),
        ("resnet18", "224", (0,), (0,)),
        ("convnext_atto", "224", (0,), (0,)),
    ],
)
def test_the_forecast_is_between_one_and_three_times_the_memory_in_use(
    name: str, size: str, layers: tuple[int, ...], heads: tuple[int, ...]
) -> None:
    model = make_model(name, size)
    peak = peak_of(model, make_pixels(model, count=4), layers, heads)
    known = forecast(model.spec, precision="fp32", layers=len(layers), heads=len(heads), images=4, device_type="cpu")
    alive = max(known.activations, known.maps)
    assert peak <= alive * 1.05
    assert alive <= peak * 3


def test_weights_are_counted_to_the_byte() -> None:
    model = make_model("vit_tiny_patch16_224", "64", precision="fp16")
    actual = sum(p.numel() * p.element_size() for p in model.net.parameters())
    assert forecast(model.spec, precision="fp16", layers=1, heads=3, images=1).weights == actual


def make_plan() -> Any:
    """The part of a plan that the choice of a batch size reads."""
    spec = make_model("vit_tiny_patch16_224").spec
    return SimpleNamespace(model=spec, precision="fp32", layers=(11,), heads=(0, 1, 2))


def test_auto_takes_the_largest_power_of_two_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan()
    need = forecast(plan.model, precision="fp32", layers=1, heads=3, images=8, device_type="cpu").total
    monkeypatch.setattr(memory, "memory_budget", lambda device: need - 1)
    images, why = choose_batch_size("auto", plan, CPU)
    assert images == 4
    assert "4 images a batch" in why
    assert choose_batch_size("7", plan, CPU)[0] == 7
    assert "more than" in choose_batch_size("64", plan, CPU)[1]


def test_a_model_that_does_not_fit_at_all_is_refused_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_budget", lambda device: 2**20)
    with pytest.raises(UserError, match=r"224x224 does not fit: .* forecast for 1 image a batch .* 1 MiB of cpu"):
        choose_batch_size("auto", make_plan(), CPU)


def make_batch(count: int) -> Batch:
    rows = np.arange(10, 10 + count)
    return Batch(
        rows=rows,
        pixels=torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 3, 2, 2),
        status=np.zeros(count, np.uint8),
        heights=rows.astype(np.int32),
        widths=rows.astype(np.int32),
        failures=[(11, "truncated", "cut"), (10 + count - 1, "missing", "gone")],
    )


def test_halves_keep_the_rows_in_order_and_each_failure_with_its_row() -> None:
    first, second = halves(make_batch(5))
    assert first.rows.tolist() == [10, 11, 12]
    assert second.rows.tolist() == [13, 14]
    assert second.pixels[:, 0, 0, 0].tolist() == [3, 4]
    assert (first.failures[0][0], second.failures[0][0]) == (11, 14)
    assert second.heights.tolist() == second.widths.tolist() == [13, 14]
    assert len(halves(make_batch(1))) == 1


def test_after_running_out_of_memory_this_batch_and_all_later_ones_are_halved() -> None:
    said: list[str] = []
    guard = HalvingGuard(said.append)

    def attempt(*sizes: int) -> list[int]:
        done = []
        for size in sizes:
            for part in guard.parts(make_batch(size)):
                if len(part.rows) > 3:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                done.append(len(part.rows))
        return done

    assert guard.run(lambda: attempt(2, 3)) == [2, 3]
    assert said == []
    assert guard.run(lambda: attempt(2, 6)) == [1, 1, 3, 3]
    assert guard.run(lambda: attempt(6)) == [3, 3]
    assert said == ["out of memory with 6 images a batch; going on with half as many"]


def test_half_a_batch_that_does_not_fit_either_is_a_clear_error() -> None:
    guard = HalvingGuard(lambda line: None)

    def attempt() -> None:
        guard.parts(make_batch(8))
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(UserError, match="out of memory with 8 images a batch, in halves too; give --batch-size 2"):
        guard.run(attempt)


def test_errors_other_than_memory_are_raised_unchanged() -> None:
    def attempt() -> None:
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        HalvingGuard(lambda line: None).run(attempt)


def test_half_precision_needs_less_and_more_heads_need_more() -> None:
    spec = make_model("vit_tiny_patch16_224").spec
    whole = forecast(spec, precision="fp32", layers=1, heads=3, images=8)
    assert forecast(spec, precision="fp16", layers=1, heads=3, images=8).total < whole.total
    assert forecast(spec, precision="fp32", layers=1, heads=1, images=8).maps < whole.maps
    assert forecast(replace(spec, grid=(28, 28)), precision="fp32", layers=1, heads=3, images=8).maps > whole.maps
    assert "8 images a batch" in whole.sentence
