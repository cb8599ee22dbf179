"""Other readers of Zarr 3 than xarray open the arrays of the store."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray

from batchjob import config
from batchjob.store import lifecycle as store
from tests.runs import Ids, label, made_up_plan

PLAN = made_up_plan(kept_rows=(2, 9, 15), options=config.Options(scores="attention"))


def test_tensorstore_reads_every_array_of_numbers_and_the_ids(tmp_path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="make dev installs it")
    run = tmp_path / "run"
    store.create(run, PLAN, Ids(20))
    label(run, PLAN, [0, 1, 2])
    read = {}
    for path in sorted((run / "labels.zarr").iterdir()):
        if path.is_dir() and json.loads((path / "zarr.json").read_text())["data_type"] != "string":
            at = {"driver": "file", "path": str(path)}
            read[path.name] = tensorstore.open({"driver": "zarr3", "kvstore": at}).result().read().result()
    names = [bytes(row).rstrip(b"\0").decode() for row in read["image_id_bytes"]]
    assert names == [Ids(20).id(row) for row in range(20)]
    with xarray.open_zarr(run / "labels.zarr", chunks=None, consolidated=False) as labels:
        for name, values in read.items():
            assert np.array_equal(values, labels[name].values, equal_nan=values.dtype.kind == "f"), name
