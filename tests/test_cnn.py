"""A CNN's pseudo-attention and saliency: hand-computed, against scikit-learn, and through the extractor."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from batchjob.config import Options
from batchjob.model import self_similarity as cnn
from batchjob.model.attention import Extractor
from batchjob.model.choices import resolve_heads, resolve_layers
from batchjob.model.describe import describe
from tests.networks import make_model, make_pixels


def test_two_features_at_right_angles_share_attention_as_computed_by_hand() -> None:
    features = torch.tensor([[[[3.0, 5.0, 0.0]], [[0.0, 0.0, 2.0]]]])  # [1, 2, 1, 3]: two patches alike, one across
    rows = cnn.self_similarity(features)[0, 0]
    high, low = math.exp(1 / cnn.TEMPERATURE), 1.0
    assert rows[0].tolist() == pytest.approx([high / (2 * high + low)] * 2 + [low / (2 * high + low)], rel=1e-5)
    assert rows[2].tolist() == pytest.approx([low / (high + 2 * low)] * 2 + [high / (high + 2 * low)], rel=1e-5)
    assert rows.sum(-1).tolist() == pytest.approx([1, 1, 1])
    norm = cnn.feature_norm(features)[0, 0]
    assert norm.tolist() == pytest.approx([0.3, 0.5, 0.2])


def test_pseudo_attention_does_not_depend_on_the_size_of_the_features() -> None:
    features = torch.rand(2, 16, 3, 4)
    scaled = features * torch.rand(2, 1, 3, 4).add(0.5)
    torch.testing.assert_close(cnn.self_similarity(features), cnn.self_similarity(scaled), atol=1e-6, rtol=1e-5)


def test_the_first_component_is_that_of_scikit_learn_with_the_sign_of_the_norm() -> None:
    features = torch.randn(5, 24, 6, 7, generator=torch.Generator().manual_seed(0)) + 0.3
    found = cnn.first_component(features)
    assert found.shape == (5, 1, 42)
    for image, mine in zip(features, found[:, 0], strict=True):
        patches = image.flatten(1).T.numpy().astype(np.float64)
        expected = PCA(n_components=1, svd_solver="full").fit_transform(patches)[:, 0]
        norm = np.linalg.norm(patches, axis=1)
        expected *= np.sign(np.corrcoef(expected, norm)[0, 1])
        np.testing.assert_allclose(mine, expected / np.abs(expected).max(), atol=2e-3)
        assert float(mine.abs().max()) == pytest.approx(1)


def test_features_without_any_difference_give_uniform_rows_and_no_component() -> None:
    flat = torch.ones(1, 8, 3, 3)
    torch.testing.assert_close(cnn.self_similarity(flat), torch.full((1, 1, 9, 9), 1 / 9))
    assert (cnn.first_component(flat) == 0).all()
    assert cnn.self_similarity(torch.zeros(1, 8, 3, 3)).isfinite().all()
    assert (cnn.feature_norm(torch.zeros(1, 8, 3, 3)) == 0).all()


@pytest.mark.parametrize(
    ("name", "size", "stage", "stride", "grid"),
    [
        ("resnet18", "", "", 16, (14, 14)),
        ("resnet50", "96x128", "", 16, (6, 8)),
        ("resnet18", "64", "-1", 32, (2, 2)),
        ("resnet18", "64", "1", 4, (16, 16)),
        ("convnext_atto", "64", "", 16, (4, 4)),
        ("efficientnet_b0", "64", "", 16, (4, 4)),
        ("mobilenetv3_small_050", "64", "", 16, (4, 4)),
        ("densenet121", "64", "", 16, (4, 4)),
        ("regnetx_002", "64", "", 16, (4, 4)),
        ("vgg11", "64", "", 16, (4, 4)),
        ("mixer_s16_224", "", "", 16, (14, 14)),
    ],
)
def test_feature_networks_have_the_form_of_one_layer_with_one_head(
    name: str, size: str, stage: str, stride: int, grid: tuple[int, int]
) -> None:
    spec = describe(Options(model=name, image_size=size, stage=stage))
    assert (spec.kind, spec.num_layers, spec.num_heads, spec.num_prefix_tokens) == ("cnn", 1, 1, 0)
    assert (spec.patch_px, spec.grid, spec.has_cls) == ((stride, stride), grid, False)
    assert (resolve_layers("-1", spec), resolve_heads("all", spec)) == ((0,), (0,))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_s_maps_are_made_of_the_features_of_its_stage(precision: str) -> None:
    model = make_model("resnet18", "64x96", precision=precision)
    pixels = make_pixels(model)
    (maps,) = Extractor(model, (0,), (0,))(pixels)
    with torch.no_grad():
        (features,) = model(pixels)
    assert features.shape == (2, 256, 4, 6)
    torch.testing.assert_close(maps.rows.float(), cnn.self_similarity(features), atol=1e-3, rtol=0)
    torch.testing.assert_close(maps.cls.float(), cnn.feature_norm(features), atol=1e-3, rtol=0)
    assert maps.component is not None
    torch.testing.assert_close(maps.component.float(), cnn.first_component(features), atol=1e-3, rtol=0)
    assert maps.rows.dtype == (torch.float32 if precision == "fp32" else torch.float16)
    assert (maps.prefix_mass == 0).all()
    assert maps.finite.all()


def test_features_that_overflow_are_marked() -> None:
    model = make_model("resnet18", "64")
    hook = model.net.layer2.register_forward_hook(
        lambda _m, _i, output: torch.cat([output[:1], output[1:] * float("nan")])
    )
    (maps,) = Extractor(model, (0,), (0,))(make_pixels(model))
    hook.remove()
    assert maps.finite.tolist() == [True, False]
    assert maps.rows.isfinite().all()
