"""Makes the environment that `make` uses, with nothing but Python's own library: `python -m batchjob.install ENV`."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_OLDEST_PYTHON = (3, 11)
_COMPILE = (
    "import numpy; from batchjob.clustering.search import best_partition; x = numpy.eye(16); "
    "best_partition(x, 3); best_partition(x.astype('float32'), 3)"
)
_CHECK_GPU = (
    "import torch; from batchjob.machine import missing_kernels\n"
    "if not torch.cuda.is_available(): raise SystemExit(3)\n"
    "for i in range(torch.cuda.device_count()):\n"
    "    lack = missing_kernels(torch.cuda.get_device_capability(i), torch.cuda.get_arch_list())\n"
    "    if lack: print(torch.cuda.get_device_name(i), lack); raise SystemExit(4)"
)


def main() -> int:
    """Installs this checkout and what it needs into ENV; makes ENV where it is not there. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m batchjob.install")
    parser.add_argument("env", type=Path, help="folder of the virtual or conda environment")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    parser.add_argument("--gpu", default="auto", help="auto: cupy and cuml where there is an NVIDIA driver; 1; 0")
    args = parser.parse_args()
    if sys.version_info < _OLDEST_PYTHON and not (args.env / "bin" / "python").exists():
        return _fail(
            f"{sys.executable} is Python {sys.version.split()[0]}, 3.11 or newer is needed; try PYTHON=python3.12"
        )
    driver_cuda = driver_cuda_version()
    extras = choose_extras(args.gpu, driver_cuda, dev=args.dev)
    python = args.env / "bin" / "python"
    if not python.exists():
        print(f"making {args.env} with {sys.executable} ({sys.version.split()[0]})", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(args.env)], check=False).returncode != 0:
            shutil.rmtree(args.env, ignore_errors=True)
            return _fail("no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv")
    target = f".[{','.join(extras)}]" if extras else "."
    print(f"installing {target} (torch with CUDA's libraries: about 6 GB, some minutes the first time)", flush=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-e", target]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # told if it fails
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        free = shutil.disk_usage(args.env).free / 2**30
        return _fail(
            f"pip could not install {target} (its reason is above; {free:.0f} GB are free, 8 are needed, "
            "11 with a GPU); mend that and run the same command again"
        )
    if driver_cuda:
        done = subprocess.run([str(python), "-c", _CHECK_GPU], stdout=subprocess.PIPE, check=False)
        if done.returncode == 4:
            return _fail(done.stdout.decode(errors="replace").strip())
        if done.returncode != 0:
            return _fail(_torch_cannot_use_gpu(driver_cuda))
    print("compiling the k-means search (half a minute, once)", flush=True)
    done = subprocess.run([str(python), "-c", _COMPILE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        return _fail("the k-means search does not compile here (numba's reason is above)")
    return 0


def driver_cuda_version() -> str:
    """Returns the newest version of CUDA that the NVIDIA driver can run, such as `13.0`; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ""
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    found = re.search(r"CUDA (?:UMD )?Version:\s*(\d+\.\d+)", done.stdout)
    return found[1] if done.returncode == 0 and found else ""


def choose_extras(asked: str, driver_cuda: str, *, dev: bool) -> list[str]:
    """Chooses which extras of pyproject.toml to install.

    Parameters
    ----------
    asked
        `auto` for the GPU's extra where there is a driver; empty, `0` or `no` for none; anything else for it anyway.
    driver_cuda
        What `driver_cuda_version` found; it decides between the extras for CUDA 12 and 13.
    dev
        Whether to install what the tests need.

    Returns
    -------
    Names of extras.
    """
    with_gpu = asked not in ("0", "no", "") and (asked != "auto" or bool(driver_cuda))
    is_cuda_12 = driver_cuda.startswith("12.")
    return (["gpu-cu12" if is_cuda_12 else "gpu"] if with_gpu else []) + (["dev"] if dev else [])


def _torch_cannot_use_gpu(driver_cuda: str) -> str:
    """Says what to do where the driver is older than the CUDA that the registry's torch is built for."""
    return (
        f"there is a GPU with a driver for CUDA {driver_cuda}, and the torch that pip installed cannot use it "
        f"(it is built for CUDA 13); update the driver to 580 or newer, or make the environment with conda: set "
        f"cuda-version={driver_cuda.split('.')[0]} in environment.yml, conda env create -f environment.yml, activate "
        "it and run make again. GPU=0 does not help here: nothing runs on the CPU by accident"
    )


def _fail(message: str) -> int:
    print(f"batchjob: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    os.environ.setdefault("PIP_NO_INPUT", "1")
    sys.exit(main())
