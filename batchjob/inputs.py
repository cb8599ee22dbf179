"""What `plan` read and later commands read again: its hashes, and whether it is still the same."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from batchjob.errors import UserError

INDEX = "index/"  # how keys of files below RUN begin; all others are absolute paths of annotations
_MASK_FOLDERS = {"SegmentationObject", "SegmentationClass"}


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(run: Path, annotations: str) -> dict[str, str]:
    """Path -> sha256 of every file of RUN/index, and of each annotation file or folder (absolute, joined by commas)."""
    found = {f"{INDEX}{path.name}": sha256_of(path) for path in sorted((run / "index").iterdir())}
    return found | hashes_of_annotations(annotations)


def hashes_of_annotations(annotations: str) -> dict[str, str]:
    """Absolute path -> sha256 of each annotation file or folder; `annotations` are paths joined by commas, or empty."""
    paths = [os.path.abspath(path) for path in annotations.split(",") if path]
    return {path: _sha256_of_annotations(path) for path in paths}


def differences(run: Path, planned: Mapping[str, str], *, index: bool = True, annotations: bool = False) -> list[str]:
    """A sentence for each file of RUN/index, and of the annotations, that is not what `planned` says it was."""
    wanted = {p: h for p, h in planned.items() if (index if p.startswith(INDEX) else annotations)}
    found = [_difference(run, path, digest) for path, digest in wanted.items()]
    if index and planned:
        found += [f"{run / 'index' / name} was not planned" for name in _others(run, planned)]
    return [sentence for sentence in found if sentence]


def raise_for_changes(run: Path, planned: Mapping[str, str], *, index: bool = True, annotations: bool = False) -> None:
    """Raises UserError with what differs from the plan: row i is image i, with its k and its instances, no more."""
    if found := differences(run, planned, index=index, annotations=annotations):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{found[0]}{more}; bring it back as it was, make a damaged index again with: batchjob run DATA {run}, "
            "or plan anew into another RUN"
        )


def _difference(run: Path, path: str, planned: str) -> str:
    full = run / path if path.startswith(INDEX) else Path(path)
    try:
        digest = sha256_of(full) if path.startswith(INDEX) else _sha256_of_annotations(path)
    except OSError as error:
        return f"{full} was planned and can't be read now: {error.strerror}"
    return "" if digest == planned else f"{full} has changed since it was planned (sha256 {planned[:12]}…)"


def _others(run: Path, planned: Iterable[str]) -> list[str]:
    try:
        return sorted(set(os.listdir(run / "index")) - {path.removeprefix(INDEX) for path in planned})
    except OSError:
        return []  # its files are told one by one


def _sha256_of_annotations(path: str) -> str:
    """Of a file, its contents; of a folder, the names and contents of the annotations in it."""
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
