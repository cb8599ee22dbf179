"""The objects that the statistics use: read from labels.zarr if they are those of the planned annotations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from batchjob.data.annotations import open_annotations
from batchjob.stats import run_stats
from batchjob.stats.pool import Pool
from batchjob.stats.truth import Truth, lay_out
from batchjob.store.run import Run
from tests.made_up_runs import scene, table, write_annotations, write_run

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


def test_scores_of_the_planned_objects_are_left_out_with_other_objects(tmp_path: Path) -> None:
    """`pair_auc` was computed while labelling. Numbers and order of the annotations do not make objects others."""
    run = write_run(tmp_path / "run", COUNT)
    same = write_annotations(tmp_path / "same.json", COUNT)
    content = json.loads(same.read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 5
    content["annotations"].reverse()
    content["categories"] = [{"id": 5, "name": "plate"}]
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps(content))
    for annotations in (same, renamed):
        lines = "\n".join(run_stats([run], annotations=str(annotations), jobs=1))
        assert "pair_auc" in set(table(run, "summary")["score"])
        assert "other objects" not in lines
    moved = write_annotations(tmp_path / "moved.json", COUNT, scene_seed=1)
    fewer = write_annotations(tmp_path / "fewer.json", COUNT, missing=[2])
    for annotations in (moved, fewer):
        lines = "\n".join(run_stats([run], annotations=str(annotations), jobs=1))
        found = set(table(run, "summary")["score"])
        assert "instance_ari" in found
        assert "entropy" in found
        assert not {"pair_auc", "pair_auc_matched"} & found
        assert "instance_ari_truth, pair_auc, pair_auc_matched were computed for other objects" in lines
        assert "Exploratory, pair_auc" not in lines
    run_stats([run], annotations=str(same), jobs=1)
    assert "pair_auc" in set(table(run, "summary")["score"])
