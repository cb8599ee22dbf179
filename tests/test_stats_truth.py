"""The objects that the statistics use: read from labels.zarr if they are those of the planned annotations."""

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from batchjob.data.annotations import open_annotations
from batchjob.stats.pool import Pool
from batchjob.stats.truth import Truth, lay_out
from batchjob.store.run import Run
from tests.made_up_runs import scene, write_annotations, write_run

COUNT = 6


def laid_out(run: Path, annotations: Path, folder: Path, *, are_planned: bool) -> tuple[Truth, dict[str, int]]:
    folder.mkdir()
    opened = Run(run)
    joined = open_annotations(annotations).join(opened.ids, str(run))
    with Pool(1) as pool:
        truth, counts = lay_out(opened, joined, folder, pool, are_planned=are_planned)
    return truth, dict(counts)


def test_stored_owners_and_decoded_masks_give_the_same_objects(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", COUNT, failed=[3])
    annotations = write_annotations(tmp_path / "a.json", COUNT, missing=[4], wrong_size=[5])
    stored, counted = laid_out(run, annotations, tmp_path / "stored", are_planned=True)
    decoded, expected = laid_out(run, annotations, tmp_path / "decoded", are_planned=False)
    assert counted == expected
    for row in range(COUNT):
        own, other = stored.of(row), decoded.of(row)
        assert (own is None) == (other is None) == (row in (3, 4, 5))
        if own is not None and other is not None:
            for name in ("owner", "category", "boxes", "coverage"):
                np.testing.assert_array_equal(getattr(own, name), getattr(other, name), err_msg=f"{name} {row}")
            np.testing.assert_array_equal(own.owner, scene(row))


def test_stored_owners_are_used_and_other_annotations_are_decoded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", COUNT)
    group: Any = zarr.open_group(str(run / "labels.zarr"), mode="r+", zarr_format=3)
    instance = group["instance"][:]
    instance[1][instance[1] == 0] = -1
    group["instance"][:] = instance
    annotations = write_annotations(tmp_path / "a.json", COUNT)
    stored, _ = laid_out(run, annotations, tmp_path / "stored", are_planned=True)
    decoded, _ = laid_out(run, annotations, tmp_path / "decoded", are_planned=False)
    own, other = stored.of(1), decoded.of(1)
    assert own is not None
    assert other is not None
    assert len(own.category) == len(other.category) - 1
    np.testing.assert_array_equal(own.owner, np.where(scene(1) > 0, scene(1) - 1, -1))
    np.testing.assert_array_equal(other.owner, scene(1))
