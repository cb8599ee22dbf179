"""Which untrained runs are the `random` null of which trained ones: those that are equal in every other option."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from batchjob.config import Options
from batchjob.errors import UserError
from batchjob.store.run import Run

_MAY_DIFFER = ("weights", "seed")


def match_randoms(runs: Sequence[Run]) -> dict[Path, list[Run]]:
    """The untrained runs that are the `random` null of each run, by its folder.

    Raises
    ------
    UserError
        An untrained run is the null of none of the trained ones; the message names the difference. Another k, layer or
        size would be another question.
    """
    trained = [run for run in runs if not run.is_random]
    found: dict[Path, list[Run]] = {run.folder: [] for run in runs}
    for random in runs if trained else ():
        if not random.is_random:
            continue
        alike = [run for run in trained if not difference(run, random)]
        if not alike:
            nearest = min(trained, key=lambda run: len(difference(run, random)))
            gap = "; ".join(difference(nearest, random))
            raise UserError(
                f"{random.folder} can't be the random null of {nearest.folder}: {gap}; "
                "make it with the same options but --weights random and --seed, or leave it away"
            )
        for run in alike:
            found[run.folder].append(random)
    return found


def difference(trained: Run, random: Run) -> list[str]:
    """Why an untrained run is not the same experiment as a trained one; empty where it is.

    Parameters
    ----------
    trained, random
        The two runs.

    Returns
    -------
    A phrase for each result option but weights and seed that differs, and for the images where they do.
    """
    parts = []
    for f in dataclasses.fields(Options):
        values = [run.options.get(f.name, f.default) for run in (trained, random)]
        if f.name not in _MAY_DIFFER and values[0] != values[1]:
            parts.append(f"--{f.name.replace('_', '-')} is {values[0]!r} there, {values[1]!r} here")
    known: dict[str, tuple[object, object]] = {
        "layers": (trained.layers, random.layers),
        "heads": (trained.heads, random.heads),
        "patches": (trained.geometry.grid, random.geometry.grid),
    }
    parts += [f"{name}: {there} there, {here} here" for name, (there, here) in known.items() if there != here]
    if not parts and trained.ids != random.ids:
        parts.append(f"the images are others: {trained.rows:,} there, {random.rows:,} here")
    return parts
