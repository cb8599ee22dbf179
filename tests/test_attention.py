"""The attention maps of every family of vision transformers, against timm's own explicit path."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from batchjob.model.attention import Extractor, LayerMaps, renormalise, softmax_rows
from batchjob.model.choices import resolve_heads, resolve_layers
from batchjob.model.describe import Model
from tests.networks import make_model, make_pixels, unfused

# (name, image size): every family, made small below, at sizes of a few patches, square or not
FAMILIES = [
    ("vit_tiny_patch16_224", "64"),
    ("vit_small_patch8_224.dino", "32x48"),
    ("vit_small_patch32_224", "96x128"),
    ("vit_base_patch16_224.mae", "48x64"),
    ("deit_tiny_distilled_patch16_224", "64x48"),
    ("deit3_small_patch16_224", "64"),
    ("vit_small_patch14_dinov2.lvd142m", "70x56"),
    ("vit_small_patch14_reg4_dinov2.lvd142m", "56x70"),
    ("vit_giant_patch14_dinov2", "56"),
    ("vit_small_patch16_dinov3.lvd1689m", "64x80"),
    ("vit_7b_patch16_dinov3", "64"),
    ("eva_giant_patch14_224", "56"),
    ("eva02_tiny_patch14_224", "70x56"),
    ("eva02_base_patch16_clip_224", "64x48"),
    ("vit_small_patch16_rope_224", "48x64"),
    ("vit_small_patch16_rope_mixed_224", "64"),
    ("vit_pe_core_tiny_patch16_384", "64"),
    ("vit_base_patch16_sapiens2", "64"),
    ("beit_base_patch16_224", "64x48"),
    ("beitv2_base_patch16_224", "64"),
    ("beit3_base_patch16_224", "64"),
    ("vit_base_patch32_clip_224", "96x64"),
    ("vit_large_patch14_clip_quickgelu_336", "56"),
    ("vit_base_patch16_siglip_224", "64x48"),
    ("vit_relpos_small_patch16_224", "64x48"),
    ("vit_srelpos_small_patch16_224", "64"),
    ("vit_relpos_base_patch16_clsgap_224", "64"),
    ("vit_medium_patch16_gap_256", "64"),
    ("vit_wee_patch16_reg1_gap_256", "64x48"),
    ("vit_little_patch16_reg4_gap_256", "64"),
    ("vit_base_patch16_xp_224", "64"),
    ("vit_base_patch16_radio_v3", "64"),
    ("aimv2_large_patch14_224", "56"),
    ("flexivit_small", "64"),
    ("qwen3_vit_88m_enc", "64x96"),
    ("deepseek_vit_412m_enc", "56"),
    ("gemma4_vit_167m_enc", "96x48"),
    ("naflexvit_base_patch16_gap", "64x48"),
    ("vit_small_r26_s32_224", "96x64"),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: f"{family[0]}-{family[1]}")
def model(request: pytest.FixtureRequest) -> Model:
    name, image_size = request.param
    smaller: dict[str, object] = {"depth": 3, "embed_dim": 192, "num_heads": 3}
    if "sapiens2" in name:
        smaller["num_kv_heads"] = (3, 1, 3)  # three heads share the keys of one in the middle layer
    made = make_model(name, image_size, **smaller)
    with torch.no_grad():  # relative positions, which timm starts at (or near) zero
        for key, parameter in made.net.named_parameters():
            if "relative_position_bias_table" in key:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
            if "gemma4" in name and "q_norm" in key:  # scale 1: initial scores reach 60 and lose digits
                parameter.fill_(0.125)
    return made


def all_maps(model: Model, pixels: Tensor) -> list[LayerMaps]:
    layers, heads = resolve_layers("all", model.spec), resolve_heads("all", model.spec)
    return list(Extractor(model, layers, heads)(pixels))


def test_every_layer_and_head_equals_timms_explicit_path(model: Model) -> None:
    pixels, spec = make_pixels(model), model.spec
    with unfused(model.net) as expected:
        model(pixels)
    maps = all_maps(model, pixels)
    assert [m.layer for m in maps] == list(range(spec.num_layers))
    assert len(expected) == spec.num_layers
    prefix = spec.num_prefix_tokens
    for layer, full in zip(maps, expected, strict=True):
        seen = full[:, :, prefix:]
        torch.testing.assert_close(layer.rows, seen[..., prefix:], atol=1e-5, rtol=0)
        cls = full[:, :, 0, prefix:] if spec.has_cls else seen[..., prefix:].mean(2)
        torch.testing.assert_close(layer.cls, cls, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.prefix_mass, seen[..., :prefix].sum(-1).mean(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.rows.sum(-1).mean(-1) + layer.prefix_mass, torch.ones(2, spec.num_heads))
        assert layer.finite.all()
    spread = torch.stack([m.rows.std() / m.rows.mean() for m in maps])
    assert spread.max() > 1e-3  # maps must differ from uniform, or equality would prove nothing


@pytest.mark.parametrize("what", ["query", "key", "value", "token"])
def test_vectors_of_a_few_layers_and_heads_are_those_of_all(model: Model, what: str) -> None:
    pixels, spec = make_pixels(model), model.spec
    layers = resolve_layers("all", spec)
    every = (0,) if what == "token" else tuple(range(spec.num_heads))
    full = list(Extractor(model, layers, every, cluster_on=what, short_cut=False)(pixels))
    some = (0,) if what == "token" else (0, spec.num_heads - 1)
    (quick,) = Extractor(model, layers[-1:], some, cluster_on=what)(pixels)
    assert quick.vectors is not None
    assert full[-1].vectors is not None
    assert quick.vectors.shape[:3] == (2, len(some), spec.num_patches)
    torch.testing.assert_close(quick.vectors, full[-1].vectors[:, list(some)], atol=2e-5, rtol=1e-5)
    assert not torch.equal(full[0].vectors, full[-1].vectors)  # type: ignore[arg-type]
    if what == "token":
        assert quick.rows is None
    else:
        plain = list(Extractor(model, layers, every)(pixels))[-1]
        torch.testing.assert_close(full[-1].cls, plain.cls)  # the maps must be unchanged
        torch.testing.assert_close(full[-1].rows, plain.rows)


def test_the_short_cut_for_a_few_heads_equals_the_general_way(model: Model) -> None:
    pixels, spec = make_pixels(model), model.spec
    heads = (0, spec.num_heads - 1)
    for layer in (0, spec.num_layers - 1):
        (quick,) = Extractor(model, (layer,), heads)(pixels)
        (general,) = Extractor(model, (layer,), heads, short_cut=False)(pixels)
        full = all_maps(model, pixels)[layer]
        torch.testing.assert_close(quick.rows, general.rows, atol=2e-6, rtol=0)
        torch.testing.assert_close(quick.rows, full.rows[:, list(heads)], atol=2e-6, rtol=0)
        torch.testing.assert_close(quick.cls, full.cls[:, list(heads)], atol=2e-6, rtol=0)
        torch.testing.assert_close(quick.prefix_mass, full.prefix_mass[:, list(heads)], atol=2e-6, rtol=0)


class FusedCalls(TorchFunctionMode):
    """Records the values that each fused attention takes and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            self.seen.append((args[2], output))
        return output


def test_map_times_values_is_what_the_fused_block_computes(model: Model) -> None:
    pixels, spec = make_pixels(model), model.spec
    with torch.no_grad(), FusedCalls() as fused:
        model(pixels)
    extractor = Extractor(model, resolve_layers("all", spec), resolve_heads("all", spec))
    for (_, call), (values, output) in zip(extractor.calls(pixels), fused.seen[: spec.num_layers], strict=True):
        attention = softmax_rows(call.query, call.key, call)
        torch.testing.assert_close(attention @ values, output, atol=1e-5, rtol=1e-5)


def test_a_patch_is_its_own_token_in_row_major_order(model: Model) -> None:
    """Checks that painting one patch changes its own token, and no other patch's, in the input of the first block."""
    spec, first = model.spec, model.blocks[0]
    inputs: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    plain = torch.full((1, 3, *spec.input_px), 90, dtype=torch.uint8)
    painted = plain.clone()
    row, column = 1, spec.grid[1] - 1
    height, width = spec.patch_px
    painted[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = 200
    with torch.no_grad():
        model(plain), model(painted)
    hook.remove()
    changed = (inputs[0] != inputs[1]).any(dim=-1).flatten().nonzero().flatten().tolist()
    token = spec.num_prefix_tokens + row * spec.grid[1] + column
    if hasattr(getattr(model.net, "patch_embed", None), "backbone"):  # its tokens see other patches
        assert token in changed
    else:
        assert changed == [token]


def test_blocks_behind_the_last_wanted_layer_are_never_run() -> None:
    model = make_model("vit_tiny_patch16_224", "64")
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda _m, _i, _o, number=number: ran.append(number))
    for short_cut in (True, False):
        extract = Extractor(model, (2, 5), (0,), short_cut=short_cut)
        ran.clear()
        assert [m.layer for m in extract(make_pixels(model))] == [2, 5]
        assert ran == [0, 1, 2, 3, 4]


def test_a_short_cut_that_no_longer_fits_timm_is_dropped_with_a_warning() -> None:
    model = make_model("vit_tiny_patch16_224", "64", qk_norm=True)
    pixels = make_pixels(model)
    (expected,) = Extractor(model, (11,), (1,), short_cut=False)(pixels)
    plain = type(model.blocks[11].attn).forward

    def changed(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(self, -x, *args, **kwargs)  # as another release of timm might do

    with mock.patch.object(type(model.blocks[11].attn), "forward", changed):
        with pytest.warns(UserWarning, match="the short cut does not fit Attention of timm"):
            extract = Extractor(model, (11,), (1,))
        (found,) = extract(pixels)
        (general,) = Extractor(model, (11,), (1,), short_cut=False)(pixels)
    assert torch.equal(found.rows, general.rows)
    assert not torch.allclose(found.rows, expected.rows, atol=1e-4)


def test_a_network_that_never_calls_fused_attention_is_an_error() -> None:
    model = make_model("vit_tiny_patch16_224", "64")
    extract = Extractor(model, (0, 3), (0, 1))
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"attention of layers \(0, 3\) wanted, of \[3\] seen"):
        list(extract(make_pixels(model)))


@pytest.fixture
def tiny() -> Model:
    return make_model("vit_tiny_patch16_224", "64")


def test_an_image_whose_activations_overflow_is_marked_and_the_others_stay_as_they_are(tiny: Model) -> None:
    pixels = make_pixels(tiny, count=3)
    (plain,) = Extractor(tiny, (11,), (0, 1, 2))(pixels)
    poison = tiny.blocks[3].register_forward_hook(
        lambda _m, _i, output: torch.cat([output[:1], output[1:2] * float("inf"), output[2:]])
    )
    (maps,) = Extractor(tiny, (11,), (0, 1, 2))(pixels)
    poison.remove()
    assert maps.finite.tolist() == [True, False, True]
    assert maps.rows.isfinite().all()
    torch.testing.assert_close(maps.rows[1], torch.full_like(maps.rows[1], 1 / tiny.spec.num_tokens))
    torch.testing.assert_close(maps.rows[[0, 2]], plain.rows[[0, 2]], atol=0, rtol=0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_maps_as_float16_close_to_float32(precision: str) -> None:
    exact = make_model("vit_tiny_patch16_224", "64")
    half = make_model("vit_tiny_patch16_224", "64", precision=precision)
    pixels = make_pixels(exact)
    (expected,) = Extractor(exact, (11,), (0, 1, 2))(pixels)
    (maps,) = Extractor(half, (11,), (0, 1, 2))(pixels)
    assert maps.rows.dtype == maps.cls.dtype == torch.float16
    assert maps.prefix_mass.dtype == torch.float32
    error = (maps.rows.float() - expected.rows).abs().max() / expected.rows.max()
    assert error < (0.02 if precision == "fp16" else 0.1)


def test_the_result_of_an_image_is_the_same_whatever_the_chunk_of_the_softmax(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = make_pixels(tiny, count=5)
    (whole,) = Extractor(tiny, (11,), (0, 1, 2))(pixels)
    monkeypatch.setattr("batchjob.model.attention.CHUNK_BYTES", 1)
    (single,) = Extractor(tiny, (11,), (0, 1, 2))(pixels)
    torch.testing.assert_close(single.rows, whole.rows, atol=1e-7, rtol=0)


def test_renormalised_rows_sum_to_one_over_the_patches_that_are_image() -> None:
    rows = torch.rand(2, 3, 5, 5).half() * 1e-3
    full = renormalise(rows)
    assert full.dtype == torch.float32
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 3, 5))
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    part = renormalise(rows, mask)
    assert (part[0, :, :, 3:] == 0).all()
    torch.testing.assert_close(part.sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(part[1], full[1])
    assert (renormalise(torch.zeros(1, 1, 2, 2)) == 0).all()
