"""The tables and scores that `stats` writes: their checksums, recorded when it ends and compared before a reading."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchjob.errors import UserError
from batchjob.files import checks_of, clear_disk_errors, drop_scratch, new_scratch, only_one, seal_file, unseal_file
from batchjob.store.partitions import Damage, check_all, check_files, published, read_marker

_SEAL = "done/stats.json"
_AGAIN = "make it again with: batchjob stats"
_TABLES = {  # the names, without what follows the dot, of the files that `stats` writes in RUN/stats
    *("agreement", "agreement_runs", "annotations", "answer", "comparison", "counts", "modifiers", "pairs", "scores"),
    *("selection", "summary", "codebook", "codebook_agreement", "codebook_categories", "codebook_images"),
    "codebook_positions",
}


@contextmanager
def writing_stats(run: Path) -> Iterator[None]:
    """Makes what is written in the block the statistics of RUN, once the block ends without an error.

    Waits first until another process has left its block. Raises WorkLeft where the disk is full, and UserError where
    RUN can't be written.
    """
    with clear_disk_errors(run, f"cannot write the statistics of {run}"), only_one(run, "done/stats.lock"):
        labels = _checks_of_labels(run)
        _drop_own_scores(run)
        _seal(run, {"ended": False, "labels": labels, "files": {}})
        for path in (run / "stats").glob("*.*"):  # else tables of other annotations or runs stay beside the new ones
            if path.stem in _TABLES and path.suffix in (".parquet", ".csv", ".json"):
                path.unlink()
        yield
        _seal(run, {"ended": True, "labels": labels, "files": checks_of(run, _written(run))})
        drop_scratch(run)


def check_stats(run: Path, *, contents: bool) -> list[Damage]:
    """Finds what is wrong with the statistics of a run.

    Parameters
    ----------
    run
        The folder of the run.
    contents
        Whether every byte is read; else only sizes are looked at.

    Returns
    -------
    A Damage for each file, or one for all of them; none where `stats` has not written any.
    """
    if not (run / _SEAL).exists():
        return []
    sealed = unseal_file(run / _SEAL)
    if sealed is None:
        return [Damage(-1, _SEAL, f"the checksums of the statistics are unreadable; {_AGAIN} {run}")]
    if not sealed["ended"]:
        return [Damage(-1, "stats", f"`stats` was stopped while it wrote them; {_AGAIN} {run}")]
    if sealed["labels"] != _checks_of_labels(run):
        return [Damage(-1, "stats", f"images were labelled since `stats` wrote them; {_AGAIN} {run}")]
    found = check_files(run, -1, sealed["files"], contents=contents)
    return [Damage(-1, damage.path, f"{damage.reason}; {_AGAIN} {run}") for damage in found]


def raise_for_damage(run: Path, find_static: Callable[[], list[Damage]], *, stats: bool, contents: bool = True) -> None:
    """Checks that what is published in a run is as it was written.

    Parameters
    ----------
    run
        The folder of the run.
    find_static
        Finds what is wrong with the files that belong to the whole store: `lifecycle.check_static`.
    stats
        Whether to check the statistics as well.
    contents
        Whether every byte is read; else only sizes are looked at.

    Raises
    ------
    UserError
        Something is damaged; names the first file, and how many more there are.
    """
    while True:
        before = _seals(run)
        damages = find_static() + check_all(run, published(run), contents=contents)
        if stats:
            damages += check_stats(run, contents=contents)
        if not damages or before == _seals(run):  # else another command has just replaced files
            break
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise UserError(
            f"{run} is damaged: {damages[0]}{more}; batchjob show {run} --verify lists all and says how to mend it"
        )


def _seals(run: Path) -> list[tuple[str, int, int]]:
    """Tells the present files of checksums from earlier ones."""
    found = ((path.name, path.stat()) for path in sorted((run / "done").glob("st*.json")))
    return [(name, stat.st_ino, stat.st_mtime_ns) for name, stat in found]


def damaged_arrays(run: Path) -> list[str]:
    """Finds the metadata files, relative to RUN, of the arrays of scores that are not as `stats` wrote them."""
    sealed = unseal_file(run / _SEAL)
    files = sealed["files"] if sealed else {}
    own = {path: check for path, check in files.items() if path.endswith("/zarr.json") and path.count("/") > 1}
    return [damage.path for damage in check_files(run, -1, own, contents=True)]


def is_of_stats(run: Path, path: str) -> bool:
    """Finds out whether a file is of an array of scores that `stats` wrote.

    Parameters
    ----------
    run
        The folder of the run.
    path
        The file, relative to RUN.

    Returns
    -------
    Whether it is; False where the list of the arrays that labelling writes is damaged.
    """
    known = _labelled(run)  # empty where the list is damaged
    return bool(known) and path.startswith("scores.zarr/") and path.count("/") > 1 and path.split("/")[1] not in known


def _checks_of_labels(run: Path) -> int:
    """A checksum of all checksums of published partitions, which tells whether the statistics are of these labels."""
    markers = [read_marker(run, partition) for partition in published(run)]
    return zlib.crc32(json.dumps([marker and marker["files"] for marker in markers], sort_keys=True).encode())


def _seal(run: Path, body: dict[str, Any]) -> None:
    scratch = new_scratch(run)
    seal_file(run / _SEAL, body, scratch)
    scratch.rmdir()


def _drop_own_scores(run: Path) -> None:
    """Removes what an earlier `stats` wrote in scores.zarr; it may be damaged, half written or of other annotations."""
    if unseal_file(run / "done" / "store.json") is None:  # it is not known which arrays `stats` wrote
        return
    for folder in _own_arrays(run) if _labelled(run) else [run / "scores.zarr"]:
        shutil.rmtree(folder, ignore_errors=True)


def _own_arrays(run: Path) -> list[Path]:
    """The folders of the arrays of scores.zarr that `stats` writes and labelling does not."""
    known = _labelled(run)
    return [folder for folder in (run / "scores.zarr").glob("*/") if folder.name not in known]


def _written(run: Path) -> list[str]:
    """The files that `stats` writes, relative to RUN: those of RUN/stats and of its arrays of scores.

    The list of the arrays, scores.zarr/zarr.json, is one of them unless labelling computed scores, or `finish` has
    published it since.
    """
    files = [path for folder in (run / "stats", *_own_arrays(run)) for path in folder.rglob("*")]
    files += [] if "zarr.json" in _labelled(run) else [run / "scores.zarr" / "zarr.json"]
    return sorted(str(path.relative_to(run)) for path in files if path.is_file())


def _labelled(run: Path) -> set[str]:
    """The names of what labelling and `plan` write in scores.zarr: arrays, coordinates and zarr.json."""
    static = unseal_file(run / "done" / "store.json")
    paths = static["files"] if static else ()
    return {path.split("/")[1] for path in paths if path.startswith("scores.zarr/")}
