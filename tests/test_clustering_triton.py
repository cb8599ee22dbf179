"""The Triton kernels against the torch version that specifies them: interpreted, compiled, and run on a GPU."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

from batchjob.clustering import engines, find_engine, open_engine, triton_engine, triton_gram, triton_search
from batchjob.clustering.search import NotFiniteError
from batchjob.clustering.self_check import _make_problems
from batchjob.errors import UserError
from tests.conftest import ROOT
from tests.pretended import pretended
from tests.stand_ins import Launch, counted_kernels

tl = pytest.importorskip("triton.language")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CAPABILITIES = [75, 80, 86, 89, 90, 100, 120]


def interpret(*arguments, timeout):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py", *arguments]
    settings = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=settings, check=False, capture_output=True, text=True, timeout=timeout)


def test_the_interpreted_kernels_do_what_the_torch_version_does():
    ended = interpret("-m", "not slow", timeout=3000)
    assert ended.returncode == 0, ended.stdout
    assert "2 passed" in ended.stdout


@pytest.mark.slow
def test_the_interpreted_kernels_keep_the_contract_of_the_engines():
    ended = interpret("-m", "slow", timeout=3000)
    assert ended.returncode == 0, ended.stdout
    assert "passed" in ended.stdout
    assert "skipped" not in ended.stdout


def test_without_a_gpu_the_engine_says_what_to_use(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        UserError, match="engine 'triton' needs an NVIDIA GPU, this is device cpu; use --engine batched"
    ):
        engines._check_engine("triton", CPU)


class Fails:
    """A kernel that does not compile."""

    def __getitem__(self, grid):
        def run(**given):
            raise RuntimeError("ptxas fatal: no kernel image\nfor sm_70")

        return run


class Wrong(Launch):
    """A kernel whose inertia is twice too high."""

    def _run(self, **given):
        super()._run(**given)
        given["inertia_ptr"].inner.mul_(2)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda meter: Fails(), r"does not work here \(RuntimeError: ptxas fatal: no kernel image for sm_70\)"),
        (lambda meter: Wrong("search_kernel", meter), "found a higher inertia than torch for 3. of 36 problems"),
    ],
)
def test_auto_goes_to_torch_and_says_why_where_the_kernel_fails_or_is_wrong(kernel, said, monkeypatch):
    with pretended() as meter, counted_kernels(meter):
        monkeypatch.setattr(triton_search, "search_kernel", kernel(meter))
        engine, why = find_engine("auto", GPU, rows=16, n_init=2)
    assert engine.name == "batched"
    assert re.fullmatch(f"in torch, since the triton engine {said}", why)


def test_auto_takes_the_kernel_where_it_agrees_with_torch_and_says_so():
    with pretended() as meter, counted_kernels(meter):
        engine, why = find_engine("auto", GPU, rows=16, n_init=2)
        assert find_engine("auto", GPU, rows=2049)[1] == (
            "in torch, since the triton engine takes up to 2048 rows a problem, found 2049"
        )
    assert engine.name == "triton"
    assert why == "one program a problem; agreed with torch on 36 problems"


def test_a_layer_takes_five_kernels_and_no_wait_whatever_the_numbers_of_problems_and_of_k():
    for n, k in ((24, torch.full((24,), 5)), (48, torch.arange(48) % 10 + 2)):
        x = torch.rand(n, 16, 16).softmax(-1)
        with pretended() as meter, counted_kernels(meter):
            engine = triton_engine.TritonEngine(GPU)
            on_device = x.to(GPU)
            meter.reset()
            engine.kmeans(
                on_device, k.pin_memory().int().pin_memory(), torch.arange(n).pin_memory(), n_init=4, checks=False
            )
            assert (meter.total.kernels, meter.total.syncs) == (5, 0)


def test_rows_that_are_not_finite_raise_where_the_engine_checks_and_are_nan_where_not():
    x = torch.rand(3, 16, 16)
    with pretended() as meter, counted_kernels(meter):
        engine, seeds = triton_engine.TritonEngine(GPU), torch.arange(3)
        found = engine.kmeans(x.to(GPU), torch.full((3,), 2), seeds, n_init=1)
        found.inertia.inner[1] = torch.nan
        with pytest.raises(NotFiniteError, match="1 clustering problem holds NaN or infinity: 1"):
            triton_engine.raise_for_nan(found.inertia)


@pytest.mark.parametrize(
    ("p", "shape"), [(49, (4, 64, 4)), (196, (4, 256, 8)), (1024, (4, 1024, 16)), (1369, (2, 2048, 16))]
)
def test_few_variants_serve_all_sizes(p, shape):
    found = triton_engine._shape_of(p, 4)
    assert (found.starts, found.rows, found.warps) == shape


def compiled(kernel, capability, constants, *, warps, exact=False):
    """Compiles a kernel for a GPU that this machine does not have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = ("p", "d", "problems", "most_k", "n_init", "max_steps", "rounds")
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(numbers, "i32") | {"noise": "fp32"}
    types |= {f"{name}_ptr": "*u8" for name in ("mask", "labels", "found", "settled", "doubtful", "starts")}
    types |= {"k_ptr": "*i32", "seeds_ptr": "*i64"} | dict.fromkeys(constants, "constexpr")
    if exact:
        types |= {f"{name}_ptr": "*fp64" for name in ("gram", "mean", "numbers")}
    types = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's own warning on future options
        options = {"num_warps": warps, "enable_fp_fusion": False}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_for_every_card_and_fit_its_shared_memory(capability):
    room = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[capability] * 1024
    measure = {"BP": 64, "BD": 64, "HAS_MASK": True, "NUMBER": tl.float32}
    made = [
        compiled(triton_gram.measure_kernel, capability, measure, warps=4),
        compiled(triton_gram.gram_kernel, capability, {"BLOCK": 64, "BD": 32, "HAS_MASK": True}, warps=4),
    ]
    # a variant takes a minute, so the largest shape and float64 are compiled for one GPU: they differ in size alone
    shapes = [(256, 8, False)] + ([(1369, 8, False), (196, 4, True)] if capability == 80 else [])
    for p, n_init, exact in shapes:
        shape = triton_engine._shape_of(p, n_init)
        block, columns = (16, 16) if exact else (triton_engine.BLOCK, triton_engine.COLUMNS)
        constants = {"R": shape.starts, "C": columns // shape.starts, "B": block, "PB": shape.rows}
        constants |= {"HAS_MASK": True, "NUMBER": tl.float64 if exact else tl.float32, "EXACT": exact}
        made.append(compiled(triton_search.search_kernel, capability, constants, warps=shape.warps, exact=exact))
    assert all(one.metadata.shared <= room for one in made), [one.metadata.shared for one in made]


@pytest.mark.gpu
@pytest.mark.parametrize("n_init", [4, 0])
def test_on_a_gpu_nearly_all_labels_are_those_of_the_batched_engine(n_init):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    device = torch.device("cuda")
    for p in (100, 196, 1369):
        x, k, mask = _make_problems(p, device)
        ours = open_engine("triton", device).kmeans(x, k, torch.arange(36), n_init=n_init, mask=mask)
        theirs = open_engine("batched", device).kmeans(x, k, torch.arange(36), n_init=n_init, mask=mask)
        if n_init:
            assert float((ours.labels == theirs.labels).float().mean()) >= 0.99
        assert float(ours.inertia.mean() / theirs.inertia.mean()) <= 1.001
