"""The engines that `--engine` stands for, and the one that `auto` takes on a device."""

import importlib.util
import os

import torch

from batchjob.clustering.base import Engine
from batchjob.errors import UserError, nearest

ENGINES = ("compiled", "batched", "triton", "cuml", "sklearn")


def find_engine(name: str, device: torch.device, *, rows: int = 256, n_init: int = 0) -> tuple[Engine, str]:
    """Opens the engine that `--engine` stands for, and says why it is the one.

    Parameters
    ----------
    name
        One of `ENGINES`, or `auto`. On a GPU `auto` takes `triton` where it agrees with torch on a few dozen problems
        of this kind, else `batched`. On other devices it takes `compiled`.
    device
        Where the problems will be.
    rows
        P of the problems.
    n_init
        Starts of each problem, as in `Engine.kmeans`.

    Returns
    -------
    (engine, reason).

    Raises
    ------
    UserError
        The name is unknown, or this machine can't run it.
    """
    _check_engine(name, device)
    if name != "auto":
        return open_engine(name, device), "asked for"
    if device.type != "cuda":
        return open_engine("compiled", device), "one program a problem in machine code, near-optimal"
    from batchjob.clustering.self_check import PROBLEMS, find_refusal
    from batchjob.clustering.triton_engine import MOST_ROWS

    refusal = f"takes up to {MOST_ROWS} rows a problem, found {rows}" if rows > MOST_ROWS else ""
    refusal = refusal or find_refusal(lambda: open_engine("triton", device), device, rows=rows, n_init=n_init)
    if refusal:
        return open_engine("batched", device), f"in torch, since the triton engine {refusal}"
    aside = "; cuml solves one problem a call" if importlib.util.find_spec("cuml") is not None else ""
    return open_engine("triton", device), f"one program a problem; agreed with torch on {PROBLEMS} problems{aside}"


def _check_engine(name: str, device: torch.device) -> None:
    """Raises UserError where `name` is not an engine, or can't run on this device or with what is installed."""
    if name not in ("auto", *ENGINES):
        raise UserError(f"--engine {name!r} is unknown; {nearest(name, ['auto', *ENGINES])}")
    is_interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if name in ("triton", "cuml") and device.type != "cuda" and not is_interpreted:
        raise UserError(f"engine {name!r} needs an NVIDIA GPU, this is device {device.type}; use --engine batched")
    if name in ("triton", "cuml") and importlib.util.find_spec(name) is None:
        how = ", or: make env GPU=1" if name == "cuml" else ""
        raise UserError(f"engine {name!r} needs {name}, which is not installed; use --engine batched{how}")


def open_engine(name: str, device: torch.device) -> Engine:
    """Opens an engine.

    Parameters
    ----------
    name, device
        As in `find_engine`. `auto` means the engine for problems of 256 rows.

    Returns
    -------
    The engine. Its libraries are imported only now.

    Raises
    ------
    UserError
        The name is unknown, or this machine can't run it.
    """
    _check_engine(name, device)
    if name == "auto":
        return find_engine(name, device)[0]
    if name == "compiled":
        from batchjob.clustering.compiled import CompiledEngine

        return CompiledEngine()
    if name == "batched":
        from batchjob.clustering.batched import BatchedEngine

        return BatchedEngine(device)
    if name == "triton":
        from batchjob.clustering.triton_engine import TritonEngine

        return TritonEngine(device)
    if name == "cuml":
        from batchjob.clustering.rapids import CumlEngine

        return CumlEngine(device)
    from batchjob.clustering.reference import ReferenceEngine

    return ReferenceEngine()
