"""What the tests of the robot share: whether images can be drawn, and episodes made by hand."""

import numpy as np
import pytest

from feedforward.robot.lerobot import Episode
from feedforward.robot.rendering import choose_backend

RENDERER = choose_backend()  # before a test imports MuJoCo


@pytest.fixture(scope="session")
def renderer():
    """The name of the renderer; a test that asks for it is left out where there is none."""
    if RENDERER == "none":
        pytest.skip("no OpenGL to draw images with: install libosmesa6, or libegl1 and libgl1")
    return RENDERER


@pytest.fixture
def make_episodes():
    """Episodes of random numbers with images that tell which frame they are."""

    def make(count=4, size=16, cameras=("front",), seed=0):
        rng = np.random.default_rng(seed)
        episodes, shown = [], 0
        for place in range(count):
            length = int(rng.integers(12, 30))
            images = {}
            for camera in cameras:
                value = (np.arange(shown, shown + length) * 3) % 192 + 20
                images[camera] = np.broadcast_to(
                    value[:, None, None, None], (length, size, size, 3)
                ).astype(np.uint8)
            shown += length
            episodes.append(
                Episode(
                    instruction=("open it", "close it")[place % 2],
                    state=rng.normal(size=(length, 5)).astype(np.float32),
                    actions=rng.uniform(-1, 1, size=(length, 3)).astype(np.float32),
                    images=images,
                )
            )
        return episodes

    return make
