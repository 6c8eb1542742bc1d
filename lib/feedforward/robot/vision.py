"""What a policy sees of an image: small pictures, in the place of a large encoder's features.

A published policy looks through a vision tower of hundreds of millions of weights. Nothing of that
size comes with this book, and thumbnails show where a gripper and an object are.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def thumbnails(images: Mapping[str, np.ndarray], *, size: int = 16) -> Tensor:
    """Images averaged down, one row of numbers a camera.

    Args:
        images: By camera (B, H, W, 3) uint8, red, green and blue.
        size: Height and width of a thumbnail.

    Returns:
        (B, C, 3 * size * size) from -1 to 1, cameras in the order given.

    Raises:
        ValueError: When there is no camera, or something else than such images.

    >>> thumbnails({"front": np.zeros((2, 84, 84, 3), np.uint8)}).shape
    torch.Size([2, 1, 768])
    """
    wrong = {
        name: (each.shape, str(each.dtype))
        for name, each in images.items()
        if each.ndim != 4 or each.shape[-1] != 3 or each.dtype != np.uint8
    }
    if wrong or not images:
        raise ValueError(f"give images (B, H, W, 3) of uint8 by camera, not {wrong or 'none'}")
    seen = []
    for each in images.values():
        pixels = torch.from_numpy(np.ascontiguousarray(each)).permute(0, 3, 1, 2).float()
        seen.append(F.adaptive_avg_pool2d(pixels / 127.5 - 1, size).flatten(1))
    return torch.stack(seen, dim=1)


def frame_features(
    images: Mapping[str, Any], frames: int, *, size: int = 16, batch: int = 256
) -> np.ndarray:
    """The thumbnails of all frames of demonstrations, computed once: (N, C, F) float32.

    Args:
        images: As ``Demonstrations`` has them: by camera something that is indexed by places.
        frames: Their number N.
        size: As in `thumbnails`.
        batch: Frames that are decoded together.
    """

    def parts() -> Iterator[np.ndarray]:
        for first in range(0, frames, batch):
            places = np.arange(first, min(frames, first + batch))
            shown = {camera: own[places] for camera, own in images.items()}
            yield thumbnails(shown, size=size).numpy()

    return np.concatenate(list(parts()))
