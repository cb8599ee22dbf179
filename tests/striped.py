"""Makes striped images and a model for them, so that every cluster of a dataset-wide clustering is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import batchjob as package

PX, PATCH, LINES, IMAGES = 96, 16, 6, 30
COLOURS = np.array([[1, -1, -1], [-1, 1, 1], [-1, 1, -1], [1, -1, 1], [-1, -1, 1], [1, 1, -1]])  # red is the first
PLANNED = ["--scope", "dataset", "--k", 2 * LINES]
SCOPE = [*PLANNED, "--workers", 0]


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Returns options for a ViT whose patches attend to patches of their own colour, and whose CLS token to red ones.

    A token is the mean colour of its patch, nothing later adds to it, and queries equal keys.
    """
    import timm  # imported here, since every run of tests imports this file
    import torch
    from safetensors.torch import save_file

    net = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    for name in state:
        if name.endswith("norm1.weight"):
            state[name] += 1
    state["cls_token"][0, 0, :3] = torch.from_numpy(COLOURS[0]).float()
    for channel in range(3):
        state["patch_embed.proj.weight"][channel, channel] = 1 / PATCH**2
        for layer in range(12):
            for head in range(3):
                at = head * 64 + channel
                mixing = state[f"blocks.{layer}.attn.qkv.weight"]
                mixing[at, channel] = mixing[192 + at, channel] = 1.0  # the query and the key
    path = tmp_path_factory.mktemp("weights") / "colours.safetensors"
    save_file(state, path)
    return ["--model", "vit_tiny_patch16_224", "--weights", path, "--image-size", PX]


@pytest.fixture(scope="session")
def striped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder of images of 6 vertical or horizontal stripes, a patch wide, of 6 colours in any order.

    A patch attends to its stripe. So there are 12 kinds of absolute rows (which stripe), and 12 of relative ones (how
    far along the stripe the patch is: the same in any stripe).
    """
    folder, rng = tmp_path_factory.mktemp("striped"), np.random.default_rng(3)
    for i in range(IMAGES):
        order = rng.permutation(LINES)
        order = np.roll(order, i // 2 - list(order).index(0))  # each image has one red stripe
        grid = np.broadcast_to(COLOURS[order], (LINES, LINES, 3))
        grid = grid if i % 2 else grid.transpose(1, 0, 2)
        grey = 127.5 + grid * (120 + rng.uniform(-1, 1, (LINES, LINES, 1)))
        Image.fromarray(grey.astype(np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)).save(folder / f"{i:03d}.png")
    return folder


def planted(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the kind of (each absolute row [images, y, x], each relative row, each image's CLS row)."""
    y, x = np.mgrid[:LINES, :LINES]
    absolute = np.stack([x if i % 2 else LINES + y for i in range(IMAGES)])
    relative = np.stack([y if i % 2 else LINES + x for i in range(IMAGES)])
    red = []
    for i, path in enumerate(sorted(folder.iterdir())):
        pixels = np.asarray(Image.open(path)).astype(int)[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        is_red = (pixels[..., 0] > 200) & (pixels[..., 1] < 50) & (pixels[..., 2] < 50)
        red.append(absolute[i][is_red][0])
    return absolute, relative, np.array(red)


def labels_of(run: Path) -> np.ndarray:
    return np.asarray(package.open(run)["labels"].values[:, 0, 0])  # [images, head, y, x]


def annotate_by_orientation(folder: Path, file: Path) -> Path:
    """Writes COCO annotations of the striped images: every stripe is an instance of `upright` or of `level`."""
    images, annotations = [], []
    for i, path in enumerate(sorted(folder.iterdir())):
        images.append({"id": i, "file_name": path.name, "height": PX, "width": PX})
        for stripe in range(LINES):
            at, size = stripe * PATCH, (PATCH, PX) if i % 2 else (PX, PATCH)
            left, top = (at, 0) if i % 2 else (0, at)
            corners = [left, top, left + size[0], top, left + size[0], top + size[1], left, top + size[1]]
            one = {"id": len(annotations), "image_id": i, "category_id": 1 + i % 2, "iscrowd": 0}
            annotations.append(one | {"segmentation": [corners], "bbox": [left, top, *size], "area": PX * PATCH})
    categories = [{"id": 1, "name": "level"}, {"id": 2, "name": "upright"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file
