"""The choice between fp16 and bf16 for a model."""

from dataclasses import replace

import torch

from batchjob.model.attention import Extractor
from batchjob.model.describe import Model
from batchjob.model.precision import choose_half, largest_activation, probe_pixels
from tests.networks import make_model, make_pixels


def swollen(factor: float) -> Model:
    """A model whose third block adds enormous numbers to the residual stream."""
    model = make_model("vit_tiny_patch16_224", "64")
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias.fill_(factor)
    return model


def test_a_model_with_small_activations_gets_fp16() -> None:
    precision, why = choose_half(make_model("vit_tiny_patch16_224", "64"))
    assert precision == "fp16"
    assert "largest activation" in why


def test_a_model_that_would_overflow_fp16_gets_bf16_and_its_maps_are_finite_there() -> None:
    model = swollen(1e6)
    assert choose_half(model)[0] == "bf16"
    pixels = make_pixels(model)
    state = model.net.state_dict()
    for precision, is_finite in (("fp16", False), ("bf16", True)):
        half = make_model("vit_tiny_patch16_224", "64", precision=precision)
        half.net.load_state_dict(state)
        (maps,) = Extractor(half, (11,), (0, 1, 2))(pixels)
        assert maps.finite.tolist() == [is_finite, is_finite]


def test_a_model_too_large_to_be_tried_gets_bf16() -> None:
    model = make_model("vit_tiny_patch16_224", "64")
    model.spec = replace(model.spec, parameters=6_700_000_000)
    assert choose_half(model)[0] == "bf16"


def test_nan_counts_as_infinitely_large() -> None:
    model = swollen(float("nan"))
    assert largest_activation(model, probe_pixels(model)) == float("inf")
