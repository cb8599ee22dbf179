"""The Triton kernel against the torch version that specifies it: interpreted, compiled, and run on a GPU."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from batchjob import clustering
from batchjob.clustering import open_engine, triton_kernel
from batchjob.errors import UserError
from tests.conftest import ROOT

pytest.importorskip("triton")
CPU = torch.device("cpu")


def test_the_interpreted_kernel_does_what_the_torch_version_does():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py"]
    settings = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=settings, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout
    assert "10 passed" in ended.stdout


def test_without_a_gpu_the_engine_says_what_to_use(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        UserError, match="engine 'triton' needs an NVIDIA GPU, this is device cpu; use --engine batched"
    ):
        clustering.choose_engine("triton", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus_and_its_matrix_fits_their_shared_memory(capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        "uniforms_ptr": "*fp64",
        "k_ptr": "*i32",
        "trials_ptr": "*i32",
        "labels_ptr": "*u8",
        "starved_ptr": "*i32",
    }
    types = dict.fromkeys(triton_kernel.kmeans_kernel.arg_names, "*fp32") | pointers
    types |= {"p": "i32", "draws": "i32", "noise": "fp32", "max_steps": "i32"}
    values = {"R": 4, "RB": 4, "KB": 8, "LB": 4, "PB": 256, "HALF": True}
    types |= dict.fromkeys(values, "constexpr")
    source = ASTSource(fn=triton_kernel.kmeans_kernel, signature=types, constexprs=values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's own, on options of versions to come
        options = {"num_warps": 16, "enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert 128 * 1024 <= made.metadata.shared <= 163 * 1024  # the matrix is there; an A100 has 163 KiB


@pytest.mark.gpu
def test_on_a_gpu_nearly_all_labels_are_those_of_the_batched_engine():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    device = torch.device("cuda")
    for p, least in ((100, 0.999), (196, 0.99)):
        x = (4 * torch.randn(200, p, p, generator=torch.Generator().manual_seed(p))).softmax(-1).to(device)
        k = torch.arange(200) % 7 + 2
        ours = open_engine("triton", device).kmeans(x, k, torch.arange(200), n_init=4)
        theirs = open_engine("batched", device).kmeans(x, k, torch.arange(200), n_init=4)
        assert float((ours.labels == theirs.labels).float().mean()) >= least
        assert float(ours.inertia.mean() / theirs.inertia.mean()) <= 1.005
