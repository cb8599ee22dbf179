import numpy as np
from PIL import Image

from batchjob.geometry import Geometry
from batchjob.loader import Loader
from batchjob.sources import index_images

GEOMETRY = Geometry(28, 28, 14, 14)


def test_batches_come_in_row_order_and_a_bad_file_keeps_its_row(tmp_path):
    for i in range(7):
        Image.new("RGB", (40, 30), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    index = index_images(str(tmp_path))
    with Loader(index, GEOMETRY, fill_rgb=(0, 0, 0), batch_size=3, workers=2) as loader:
        for start, stop in ((0, 7), (2, 5)):
            batches = list(loader.batches(start, stop))
            rows = np.concatenate([b.rows for b in batches])
            reds = np.concatenate([b.pixels[:, 0, 0, 0].numpy() for b in batches])
            status = np.concatenate([b.status for b in batches])
            assert rows.tolist() == list(range(start, stop))
            assert status.tolist() == [2 if r == 3 else 0 for r in rows]
            assert [r for r, s in zip(reds, status, strict=True) if not s] == [r * 20 for r in rows if r != 3]
            assert [f for b in batches for f in b.failures] == [(3, "not_an_image", "empty file")]
