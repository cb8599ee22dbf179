"""Decisions about GPUs before any work, tested without GPUs: which process gets which GPU, and what stops a job."""

import pytest
import torch

from batchjob import install
from batchjob.codebook import kmeans
from batchjob.codebook.kmeans import Problem, TorchRefiner, open_refiner
from batchjob.codebook.processes import ALONE, _told_of_losses
from batchjob.config import Options, Runtime
from batchjob.errors import UserError, WorkLeft
from batchjob.job import dispatch
from batchjob.job.memory import choose_batch_size
from batchjob.launch import shares
from batchjob.machine import choose_device, missing_kernels
from tests.pretended import pretended
from tests.runs import made_up_plan

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
GPU = torch.device("cuda", 0)
SHELL = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}


def test_a_job_that_was_given_gpus_and_sees_none_stops_and_says_how_to_go_on_without() -> None:
    given = {"SLURMD_NODENAME": "node7", "SLURM_JOB_GPUS": "0,1"}
    with pytest.raises(WorkLeft, match=r"given GPUs .SLURM_JOB_GPUS=0,1. and torch sees none on node7.*--device cpu"):
        choose_device("auto", given)
    assert choose_device("cpu", given).type == "cpu"
    assert choose_device("auto", {"SLURMD_NODENAME": "node7"}).type == "cpu"
    with pytest.raises(UserError, match="torch sees no GPU"):
        choose_device("cuda", {})


@pytest.mark.parametrize(
    ("capability", "fits"),
    [
        ((7, 0), False),
        ((6, 1), False),
        ((7, 5), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), False),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_known_beforehand(capability: tuple[int, int], fits: bool) -> None:
    assert (missing_kernels(capability, WHEEL) == "") == fits
    assert missing_kernels(capability, [*WHEEL, "compute_60"]) == ""


def test_a_gpu_without_kernels_stops_the_job_in_a_line() -> None:
    said = "pretended has compute capability 7.0, and the installed torch has kernels from 7.5 on"
    with pretended(capability=(7, 0)):
        with pytest.raises(UserError, match=said):
            choose_device("auto", {})
        with pytest.raises(WorkLeft, match="pretended of node7 has compute"):
            choose_device("cuda", {"SLURMD_NODENAME": "node7"})


def test_each_process_of_a_node_first_takes_its_gpu_and_switches_tf32_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[torch.device] = []
    for library in (torch.backends.cuda.matmul, torch.backends.cudnn):
        library.allow_tf32 = True  # as in some containers
    with pretended(gpus=4):
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        assert choose_device("auto", {"LOCAL_RANK": "2"}) == torch.device("cuda", 2)
        assert choose_device("cuda", {"SLURM_LOCALID": "5"}) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 2), torch.device("cuda", 1)]
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_a_shell_of_srun_with_one_task_is_not_a_launcher_and_a_step_of_two_tasks_is() -> None:
    assert not shares.is_launched(SHELL)
    assert shares.is_launched(SHELL | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"})
    assert shares.is_launched(SHELL | {"RANK": "0"})


@pytest.mark.parametrize(("gpus", "numbers"), [("2,", [2]), ("all", [0, 1, 2, 3]), ("1", None)])
def test_one_gpu_that_is_not_the_first_gets_a_process_of_its_own(
    gpus: str, numbers: list[int] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    started: list[list[int]] = []
    monkeypatch.setattr(dispatch, "visible_gpus", lambda device: 4)
    monkeypatch.setattr(dispatch.processes, "run_on", lambda which, *_, **__: started.append(list(which)))
    monkeypatch.setattr(dispatch.shares, "agreed_partitions", lambda *_: [])
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    dispatch.label(tmp_path, made_up_plan(), Runtime(gpus=gpus), None, say=lambda line: None)  # type: ignore[arg-type]
    assert started == ([] if numbers is None else [numbers])


def test_the_cuda_version_is_read_in_newer_drivers_wording_too(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "| NVIDIA-SMI 610.1   Driver Version: 610.1   CUDA UMD Version: 13.3 |"
    monkeypatch.setattr(install.shutil, "which", lambda name: name)
    done = install.subprocess.CompletedProcess([], 0, stdout=line)
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: done)
    assert install.driver_cuda_version() == "13.3"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[Rank 1] NCCL error: remote process exited or there was a network error", WorkLeft),
        ("Connection closed by peer [10.0.0.7]:4711", WorkLeft),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1\nncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1",
            UserError,
        ),
        ("CUDA error: an illegal memory access was encountered", RuntimeError),
    ],
)
def test_a_lost_process_is_distinguished_from_wrong_use_and_from_a_bug(text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, _told_of_losses():
        raise RuntimeError(text)
    assert type(caught.value) is kind


class Refines:
    """Stands for cuml's refiner: torch's steps with a wrong shift."""

    name = "cuml"

    def __init__(self, wrong: float) -> None:
        self._wrong = wrong

    def advance(self, problem: Problem, centroids: torch.Tensor) -> tuple[torch.Tensor, int]:
        found, steps = TorchRefiner().advance(problem, centroids)
        return found + self._wrong, steps


@pytest.mark.parametrize(
    ("refiner", "name", "said"),
    [
        (lambda device, group: Refines(0.0), "cuml", "agreed with torch's on 4,096 rows"),
        (lambda device, group: Refines(0.5), "batched", "in torch, since cuml ends 0.5 from torch's centroids"),
        (lambda device, group: 1 / 0, "batched", r"in torch, since cuml does not work here \(ZeroDivisionError"),
    ],
)
def test_dataset_scope_takes_cuml_on_a_gpu_where_it_does_what_torch_does(
    refiner: object, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "CumlRefiner", refiner)
    monkeypatch.setattr(kmeans.importlib.util, "find_spec", lambda module: object())
    with pretended():
        found, why = open_refiner("auto", GPU, ALONE)
    assert found.name == name
    assert said.replace("\\", "") in why


def test_dataset_scope_on_a_gpu_without_cuml_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans.importlib.util, "find_spec", lambda module: None)
    found, why = open_refiner("auto", GPU, ALONE)
    assert (found.name, why) == ("batched", "in torch, since cuml is not installed (make env GPU=1)")


def test_the_sample_of_a_fit_and_its_batches_share_one_budget() -> None:
    plan = made_up_plan(options=Options(scope="dataset"))
    with pretended():
        whole, _ = choose_batch_size("auto", plan, GPU)
        left, why = choose_batch_size("auto", plan, GPU, taken_bytes=int(0.8 * (80 << 30)) - (1 << 20))
    assert left < whole
    assert "1 MiB of cuda:0 to be used" in why
