"""The check that an engine agrees with the torch engine on this machine, done before a run relies on it."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from batchjob.clustering.base import Clusters, Engine
from batchjob.clustering.batched import BatchedEngine

PROBLEMS = 36
WORSE = 1e-3  # an inertia whose relative excess is above this counts as worse
MOST_WORSE = 0.05  # share of the problems that may be worse: rounding decides between nearly equal optima


def find_refusal(open_engine: Callable[[], Engine], device: torch.device, *, rows: int, n_init: int) -> str:
    """Solves a few problems with an engine, and says why it can't be relied on here.

    Parameters
    ----------
    open_engine
        Makes the engine; it may raise.
    device
        Where the engine shall work.
    rows
        P of the problems that the run will have, so that the variant is checked which the run will use.
    n_init
        As in `Engine.kmeans`.

    Returns
    -------
    The rest of a sentence, such as `does not work here (CompilationError: …)`; empty where the engine agrees with
    torch.

    Notes
    -----
    The `PROBLEMS` problems are of every kind: attention-like rows, groups, equal rows, rows left out, k from 1 to 12.
    """
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed"
    x, k, mask = _make_problems(rows, device)
    seeds = torch.arange(PROBLEMS)
    try:
        found = open_engine().kmeans(x, k, seeds, n_init=n_init, mask=mask)
        inertia = found.inertia.cpu()
    except Exception as error:  # a compiler or a driver may raise anything
        why = " ".join(str(error).split())[:160]
        return f"does not work here ({type(error).__name__}: {why})"
    expected = BatchedEngine(device).kmeans(x, k, seeds, n_init=n_init, mask=mask)
    return _compare(found, inertia, expected)


def _compare(found: Clusters, inertia: Tensor, expected: Clusters) -> str:
    """How the answers differ from the expected ones, as the rest of a sentence; empty where they agree."""
    theirs = expected.inertia.cpu()
    scale = theirs.clamp_min(1e-6 * float(theirs.max()))
    worse = int((~(inertia <= theirs + WORSE * scale)).sum())
    counts = int((found.k.cpu() != expected.k.cpu()).sum())
    if worse > MOST_WORSE * len(theirs):
        return f"found a higher inertia than torch for {worse} of {len(theirs)} problems"
    if counts:
        return f"found another number of clusters than torch for {counts} of {len(theirs)} problems"
    return ""


def _make_problems(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(x float32 [N, P, P], k int64 [N] on the CPU, mask bool [N, P]): the same problems on every device."""
    generator = torch.Generator().manual_seed(0)
    k = torch.arange(PROBLEMS) % 12 + 1
    groups = torch.stack([torch.randperm(rows, generator=generator) % int(count) for count in k])
    own = (groups[:, :, None] == groups[:, None, :]).float()
    noise = torch.rand(PROBLEMS, rows, rows, generator=generator)
    x = torch.where((torch.arange(PROBLEMS) % 3 == 0)[:, None, None], (3 * noise).softmax(-1), own + 0.3 * noise + 0.01)
    x[4] = 1.0
    x[5] = own[5]
    mask = torch.ones(PROBLEMS, rows, dtype=torch.bool)
    mask[1::4, ::5] = False
    return (x / x.sum(-1, keepdim=True)).to(device), k, mask.to(device)
