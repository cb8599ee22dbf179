"""Which models are taken or refused, at which sizes, and with which weights."""

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from batchjob.config import Options
from batchjob.errors import UserError
from batchjob.model import network
from batchjob.model.attention import Extractor
from batchjob.model.choices import resolve_heads, resolve_layers
from batchjob.model.describe import Model, ModelSpec, describe, load_model
from tests.networks import make_model, make_pixels

TINY = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "size", "grid", "patch_px", "prefix", "heads", "has_cls"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "", (16, 16), 14, 1, 6, True),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "448", (32, 32), 14, 5, 6, True),
        ("vit_base_patch16_224.mae", "336x448", (21, 28), 16, 1, 12, True),
        ("vit_small_patch16_dinov3.lvd1689m", "", (14, 14), 16, 5, 6, True),
        ("vit_7b_patch16_dinov3", "", (14, 14), 16, 5, 32, True),
        ("vit_giant_patch14_dinov2", "", (16, 16), 14, 1, 24, True),
        ("deit_base_distilled_patch16_384", "", (14, 14), 16, 2, 12, True),
        ("vit_base_patch32_clip_448", "", (7, 7), 32, 1, 12, True),
        ("vit_base_patch8_224", "", (28, 28), 8, 1, 12, True),
        ("vit_base_patch16_siglip_512", "512", (32, 32), 16, 0, 12, False),
        ("vit_base_patch16_reg4_gap_256", "", (14, 14), 16, 4, 12, False),
        ("beit_large_patch16_512", "", (14, 14), 16, 1, 16, True),
        ("vit_base_r50_s16_224", "", (14, 14), 16, 1, 12, True),
    ],
)
def test_tokens_and_grid_are_those_of_the_model_at_the_asked_size(
    name: str, size: str, grid: tuple[int, int], patch_px: int, prefix: int, heads: int, has_cls: bool
) -> None:
    spec = describe(Options(model=name, image_size=size))
    assert (spec.kind, spec.grid, spec.patch_px) == ("vit", grid, (patch_px, patch_px))
    assert (spec.num_prefix_tokens, spec.num_heads, spec.has_cls) == (prefix, heads, has_cls)
    assert spec.input_px == (grid[0] * patch_px, grid[1] * patch_px)
    assert spec.num_tokens == prefix + grid[0] * grid[1]


def test_preprocessing_is_that_of_the_named_weights() -> None:
    dinov2, augreg = describe(Options(model="vit_small_patch14_dinov2.lvd142m")), describe(Options(model=TINY))
    assert dinov2.mean == (0.485, 0.456, 0.406)
    assert augreg.mean == augreg.std == (0.5, 0.5, 0.5)
    assert dinov2.interpolation == "bicubic"


def test_pixels_are_normalised_as_timm_does() -> None:
    model = make_model(TINY, "32", depth=1)
    pixels = make_pixels(model)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.mean, model.spec.std))
    torch.testing.assert_close(model.normalise(pixels), (pixels.float() / 255 - mean) / std)


def test_a_spec_read_back_from_json_is_equal() -> None:
    for name in (TINY, "resnet18"):
        spec = describe(Options(model=name))
        assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "hiera_tiny_224",
        "samvit_base_patch16",
        "maxvit_tiny_tf_224",
        "pit_s_224",
        "levit_128s",
        "twins_svt_small",
        "cait_xxs24_224",
        "xcit_nano_12_p16_224",
        "convit_tiny",
        "mobilevit_s",
        "mvitv2_tiny",
        "pvt_v2_b0",
        "davit_tiny",
        "crossvit_tiny_240",
        "volo_d1_224",
        "coat_tiny",
        "efficientvit_m0",
    ],
)
def test_attention_without_a_global_patch_to_patch_map_is_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match=f"model {name} has no patch-to-patch map: it attends inside windows"):
        describe(Options(model=name))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"])
def test_the_tokens_of_such_a_model_are_refused_in_a_sentence_about_tokens(name: str) -> None:
    with pytest.raises(UserError, match=f"model {name} has no tokens for --cluster-on token, which takes") as caught:
        describe(Options(model=name, cluster_on="token"))
    assert "patch-to-patch" not in str(caught.value)


def test_differential_attention_is_refused_since_its_map_is_a_difference_of_two() -> None:
    name = "vit_dlittle_patch16_reg1_gap_256"
    if not timm.is_model(name):
        pytest.fail(f"timm {timm.__version__} has no {name}; take another model with DiffAttention")
    with pytest.raises(UserError, match="has no patch-to-patch map"):
        describe(Options(model=name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_tiny_patch16_225"}, "not in timm .*did you mean vit_tiny_patch16_224"),
        ({"model": "vit_small_patch14_dinov2.lvd142"}, "timm knows no weights 'lvd142' .*did you mean 'lvd142m'"),
        ({"model": TINY, "image_size": "225"}, r"--image-size 225 is not a multiple of .* 16x16 patches; try 224x224"),
        ({"model": TINY, "image_size": "224x230"}, "--image-size 224x230 is not a multiple .* try 224x224"),
        ({"model": TINY, "image_size": "5"}, "--image-size 5 is not a multiple .* try 16x16"),
        ({"model": TINY, "image_size": "big"}, "--image-size 'big' is not a size in pixels"),
        ({"model": TINY, "image_size": "0"}, "--image-size '0' is not a size in pixels"),
        ({"model": TINY, "stage": "2"}, "--stage 2 is for a CNN's features"),
        ({"model": "resnet18", "stage": "9"}, "--stage 9 is not a stage of resnet18; give one of 0 to 4 .*3: 16"),
        ({"model": "resnet18", "image_size": "230"}, "not a multiple of the model's 16x16 patches; try 224x224"),
        ({"model": "mixer_b16_224", "image_size": "256"}, "--image-size 256 does not suit mixer_b16_224"),
        ({"model": "gemma4_vit_167m_enc", "image_size": "224"}, "--image-size 224 does not suit .* 768x768"),
    ],
)
def test_what_a_model_cannot_do_is_one_line_with_the_way_out(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        describe(Options(**options))
    assert "\n" not in str(caught.value)


def test_a_model_whose_patches_do_not_divide_224_keeps_its_own_size() -> None:
    assert describe(Options(model="gemma4_vit_167m_enc")).input_px == (768, 768)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-1", (11,)),
        ("0,5,11", (0, 5, 11)),
        ("all", tuple(range(12))),
        ("11,-12, 3,3", (0, 3, 11)),
        ("-2,-1", (10, 11)),
    ],
)
def test_layers_are_resolved_ascending_and_once(text: str, expected: tuple[int, ...]) -> None:
    assert resolve_layers(text, describe(Options(model=TINY))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "--layers 12 out of range: vit_tiny_patch16_224 has 12 layers; give 0 to 11"),
        ("-13,0", "--layers -13 out of range"),
        ("last", "--layers 'last' is not a list of numbers"),
        ("", "--layers '' is not a list of numbers"),
    ],
)
def test_layers_out_of_range_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_layers(text, describe(Options(model=TINY)))


def test_heads_are_resolved_like_layers() -> None:
    spec = describe(Options(model=TINY))
    assert resolve_heads("all", spec) == (0, 1, 2)
    assert resolve_heads("-1,0", spec) == (0, 2)
    with pytest.raises(UserError, match="--heads 3 out of range: vit_tiny_patch16_224 has 3 heads"):
        resolve_heads("3", spec)


def test_random_weights_depend_on_the_seed_alone_and_keep_the_random_state() -> None:
    spec = describe(Options(model=TINY, image_size="32"))
    before = torch.get_rng_state()
    first, again, other = (load_model(spec, None, precision="fp32", device="cpu", seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    key = "blocks.3.attn.qkv.weight"
    weights = [dict(model.net.named_parameters())[key] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_random_weights_have_a_layer_scale_of_one(name: str) -> None:
    scales = [
        parameter
        for key, parameter in make_model(name, "112", depth=2, embed_dim=192, num_heads=3).net.named_parameters()
        if "gamma" in key
    ]
    assert len(scales) == 4
    assert all((scale == 1).all() for scale in scales)


def state_of(name: str, **arguments: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(timm.create_model(name, **arguments).state_dict())


def load(name: str, state: dict[str, Tensor], size: str = "") -> Model:
    return load_model(describe(Options(model=name, image_size=size)), state, precision="fp32", device="cpu")


def test_positions_are_interpolated_as_timm_does_also_to_a_grid_of_as_many_patches() -> None:
    state = state_of(TINY)
    for size, grid in (("112x448", (7, 28)), ("336x448", (21, 28)), ("96", (6, 6))):
        expected = resample_abs_pos_embed(state["pos_embed"], list(grid), (14, 14), num_prefix_tokens=1)
        model = load(TINY, state, size)
        torch.testing.assert_close(model.net.pos_embed, expected)
        assert not torch.equal(model.net.pos_embed[:, 1:], state["pos_embed"][:, 1:])


def test_dinov2_at_224_equals_timms_own_resizing_of_its_518_px_weights() -> None:
    name = "vit_small_patch14_dinov2"
    state = state_of(name, num_classes=0)
    overlay = {"state_dict": dict(state)}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=224, num_classes=0)
    for key, value in load(name, state).net.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key])


def test_weights_trained_at_the_asked_size_are_taken_as_they_are() -> None:
    state = state_of(TINY, img_size=96)
    assert torch.equal(load(TINY, state, "96").net.pos_embed, state["pos_embed"])


def test_a_fine_tuned_classifier_in_the_file_does_not_matter() -> None:
    state = state_of(TINY, num_classes=7)
    assert "head.weight" in state
    model = load(TINY, state)
    assert torch.equal(model.net.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "blocks.11" not in k}, "missing blocks.11.norm1.weight.*and 9 more"),
        (lambda s: s | {"extra.weight": torch.zeros(1)}, "unexpected extra.weight"),
        (lambda s: s | {"norm.weight": torch.zeros(7)}, r"other sizes norm.weight \[7\] for \[192\]"),
        (
            lambda s: {"a": torch.zeros(1)},
            "missing cls_token, pos_embed, patch_embed.proj.weight and 147 more; unexpected",
        ),
        (lambda s: {}, "hold no tensors"),
        (lambda s: s | {"norm.weight": torch.full((192,), torch.nan)}, "hold NaN or Inf in norm.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_the_keys_that_differ(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(TINY, change(state_of(TINY, num_classes=0)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_weights_of_a_larger_sibling_are_refused() -> None:
    with pytest.raises(UserError, match=r"the weights are not those of vit_tiny_patch16_224: .*other sizes"):
        load(TINY, state_of("vit_small_patch16_224", num_classes=0))


def test_cnn_weights_are_loaded_strictly_too() -> None:
    state = state_of("resnet18", num_classes=0)
    model = load("resnet18", state)
    assert torch.equal(model.net.conv1.weight, state["conv1.weight"])
    with pytest.raises(UserError, match=r"missing layer1\.0\.conv1\.weight"):
        load("resnet18", {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"})


def test_describing_a_model_does_not_allocate_its_weights() -> None:
    net = network.build("vit_7b_patch16_dinov3", num_classes=0)
    assert all(parameter.device.type == "meta" for parameter in net.parameters())


def test_a_square_and_a_turned_photo_give_turned_maps_of_a_model_without_positions() -> None:
    """Checks that rows and columns are not mixed up: without positions, turning the photo turns the map."""
    wide, tall = (make_model(TINY, size, seed=4) for size in ("48x80", "80x48"))
    with torch.no_grad():
        for model in (wide, tall):
            model.net.pos_embed.zero_()
            kernel = model.net.patch_embed.proj.weight
            kernel.copy_((kernel + kernel.transpose(-1, -2)) / 2)
    pixels = make_pixels(wide)
    (first,) = Extractor(wide, (5,), (0, 1, 2))(pixels)
    (second,) = Extractor(tall, (5,), (0, 1, 2))(pixels.transpose(-1, -2))
    turned = np.arange(15).reshape(5, 3).T.ravel()  # for each patch of the wide grid, its patch in the tall one
    torch.testing.assert_close(first.cls, second.cls[..., turned], atol=1e-5, rtol=0)
    torch.testing.assert_close(first.rows, second.rows[..., turned, :][..., turned], atol=1e-5, rtol=0)
