"""The hashes of the files that `plan` read and later commands read again, and whether they are still the same."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from batchjob.errors import UserError

_INDEX = "index/"  # keys of files below RUN begin so; all others are absolute paths of annotations
_MASK_FOLDERS = {"SegmentationObject", "SegmentationClass"}


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(run: Path, annotations: str) -> dict[str, str]:
    """Computes the hashes of what later commands read again.

    Parameters
    ----------
    run
        A folder that holds `index/`.
    annotations
        Paths of annotation files or folders, joined by commas; empty for none.

    Returns
    -------
    sha256 in hex by path: `index/NAME` for each file of the index, and the absolute path of each annotation.
    """
    found = {f"{_INDEX}{path.name}": sha256_of(path) for path in sorted((run / "index").iterdir())}
    return found | hashes_of_annotations(annotations)


def hashes_of_annotations(annotations: str) -> dict[str, str]:
    """Computes the sha256 in hex by absolute path of annotation files or folders; `annotations` is joined by commas."""
    paths = [os.path.abspath(path) for path in annotations.split(",") if path]
    return {path: _sha256_of_annotations(path) for path in paths}


def differences(run: Path, planned: Mapping[str, str], *, index: bool = True, annotations: bool = False) -> list[str]:
    """Finds the files that are not as they were planned.

    Parameters
    ----------
    run
        The folder of the run.
    planned
        What `hashes` returned when the run was planned.
    index, annotations
        Whether to read the files of RUN/index, and those of the annotations.

    Returns
    -------
    A sentence for each file that changed, is missing or was not planned.
    """
    wanted = {p: h for p, h in planned.items() if (index if p.startswith(_INDEX) else annotations)}
    found = [_difference(run, path, digest) for path, digest in wanted.items()]
    if index and planned:
        found += [f"{run / 'index' / name} was not planned" for name in _others(run, planned)]
    return [sentence for sentence in found if sentence]


def raise_for_changes(run: Path, planned: Mapping[str, str], *, index: bool = True, annotations: bool = False) -> None:
    """Checks that files are as they were planned, since row i of every array is image i of the index.

    Parameters
    ----------
    run, planned, index, annotations
        As in `differences`.

    Raises
    ------
    UserError
        A file differs; names the first one, and how many more there are.
    """
    if found := differences(run, planned, index=index, annotations=annotations):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{found[0]}{more}; bring it back as it was, make a damaged index again by the command that batchjob show "
            f"{run} prints, or plan anew into another RUN"
        )


def _difference(run: Path, path: str, planned: str) -> str:
    full = run / path if path.startswith(_INDEX) else Path(path)
    try:
        digest = sha256_of(full) if path.startswith(_INDEX) else _sha256_of_annotations(path)
    except OSError as error:
        return f"{full} was planned and can't be read now: {error.strerror}"
    return "" if digest == planned else f"{full} has changed since it was planned (sha256 {planned[:12]}…)"


def _others(run: Path, planned: Iterable[str]) -> list[str]:
    try:
        return sorted(set(os.listdir(run / "index")) - {path.removeprefix(_INDEX) for path in planned})
    except OSError:
        return []  # a sentence for each of its files says that it can't be read


def _sha256_of_annotations(path: str) -> str:
    """The sha256 of a file's content, or of the names and contents of all annotations in a folder."""
    if not os.path.isdir(path):
        return sha256_of(Path(path))
    files = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if (name.startswith("instances_") and name.endswith(".json"))
        or (name.endswith(".png") and os.path.basename(folder) in _MASK_FOLDERS)
    ]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(os.fsencode(os.path.relpath(file, path)) + b"\0" + bytes.fromhex(sha256_of(Path(file))))
    return whole.hexdigest()
