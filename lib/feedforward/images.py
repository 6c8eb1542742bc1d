"""Small images told apart by a vision transformer whose feed-forward layers are structured.

The check of one sentence of arXiv 2406.16450: block-structured layers are better than LowRank on
images like those of CIFAR. What network and what settings the paper used for it is unknown here, so
this is a test of the claim and not of the paper's run. ``grid`` lists the arms, ``run`` trains one
at each of its learning rates, keeps the one with the lowest validation loss and measures that.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from feedforward.files import DataError
from feedforward.layers.cost import TransformerShape, count
from feedforward.layers.structured import BlockDense, BlockShuffle, LowRank
from feedforward.profiles import get_profile, resolve_device, unknown
from feedforward.records import Provenance, Record, run_directory
from feedforward.surgery import replace_ffn, structured
from feedforward.training import TrainingConfig, TrainingError, seed_everything, train

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

EXPERIMENT = "structured-ffn-images"
SPLITS = ("train", "validation", "test")

_LAYERS = {layer.__name__: layer for layer in (LowRank, BlockShuffle, BlockDense)}


# --- images -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, C, H, W) uint8 and their classes (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def balance(self, classes: int) -> list[int]:
        """How many images there are of each class."""
        return torch.bincount(self.labels, minlength=classes).tolist()


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images in three splits.

    Attributes:
        title: What they are, in prose.
        classes: Number of classes.
        train: Images to learn from.
        validation: To choose the learning rate with.
        test: For the one measurement at the end.
    """

    title: str
    classes: int
    train: Split
    validation: Split
    test: Split

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])

    def normalised(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8 as float32: each channel's mean 0 and deviation 1 in training.

        The mean and the deviation are those of the training images alone.
        """
        mean, deviation = self._moments
        return (images.float() - mean.to(images.device)) / deviation.to(images.device)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        pixels = self.train.images.double()
        mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)


def _digits() -> tuple[str, np.ndarray, np.ndarray, None]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    title = "scikit-learn's handwritten digits, 8 x 8 pixels"
    return title, digits.images[:, None].astype(np.uint8), digits.target, None


def _cifar10() -> tuple[str, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    try:
        import datasets
    except ImportError:
        raise DataError("CIFAR-10 needs the package 'datasets': pip install datasets") from None
    try:
        both = datasets.load_dataset("uoft-cs/cifar10")
        (pixels, labels), test = (
            (
                np.stack([np.asarray(image) for image in both[split]["img"]]).transpose(0, 3, 1, 2),
                np.asarray(both[split]["label"]),
            )
            for split in ("train", "test")
        )
    except Exception as error:  # the client raises a dozen kinds, from DNS to HTTP
        raise DataError(
            f"CIFAR-10 cannot be loaded from the hub ({type(error).__name__}: {error}). It needs a "
            "network the first time; source='digits' needs none."
        ) from error
    return "CIFAR-10, 32 x 32 pixels in colour", pixels, labels, test


SOURCES: dict[str, Callable] = {"digits": _digits, "cifar10": _cifar10}
"""Name -> what reads title, images, labels, and the source's own test images where it has some."""


def load_images(
    source: str = "digits", *, train: int = 300, validation: int = 400, seed: int = 0
) -> Images:
    """Real images, cut into three splits with equal shares of each class.

    ``digits`` comes with scikit-learn: 1,797 handwritten digits of 8 x 8 pixels in 17 shades of
    grey, the test images of the UCI set of Alpaydin and Kaynak, by 13 people; who wrote which is
    not known, so every split has digits of every hand. They are fewer, smaller and easier than
    CIFAR-10. ``cifar10`` is loaded from the Hugging Face hub; its test images are CIFAR-10's own.

    Args:
        source: ``"digits"`` or ``"cifar10"``.
        train: Images to learn from.
        validation: Images to choose the learning rate with; of digits, the rest is for the test.
        seed: Of the cut.

    Raises:
        ValueError: If the source is unknown or has too few images.
        DataError: If CIFAR-10 is asked for without a network.
    """
    if source not in SOURCES:
        raise ValueError(unknown("source", source, SOURCES))
    return _load(source, train, validation, seed)


@lru_cache(maxsize=2)
def _load(source: str, train: int, validation: int, seed: int) -> Images:
    title, images, labels, test = SOURCES[source]()
    free = len(labels) - train - validation
    if min(train, validation) < 1 or free < (test is None):
        raise ValueError(
            f"{source} has {len(labels)} images to cut: train {train} and validation {validation} "
            f"must each be at least 1{' and leave some for the test' if test is None else ''}"
        )
    chosen, rest = _cut(np.arange(len(labels)), labels, train, seed)
    held, rest = _cut(rest, labels, validation, seed)
    splits = [(images[rows], labels[rows]) for rows in (chosen, held)]
    splits.append((images[rest], labels[rest]) if test is None else test)
    return Images(
        title,
        int(labels.max()) + 1,
        *(
            Split(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.int64(y)))
            for x, y in splits
        ),
    )


def _cut(
    rows: np.ndarray, labels: np.ndarray, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`size` of the rows with equal shares of each class, and the others."""
    from sklearn.model_selection import train_test_split

    if size == len(rows):
        return rows, rows[:0]
    cut = train_test_split(rows, train_size=size, stratify=labels[rows], random_state=seed)
    return tuple(cut)


class Batches:
    """The training batch of any step, computed from the step alone: exact to resume.

    Every epoch visits the images in a fresh random order.

    Args:
        images: Whose training split is used.
        batch: Images a batch.
        seed: Of the order and of what is done to the images.
        shift: Largest shift, in pixels, by which an image is moved down or up, right or left; what
            comes in is black.
        flip: Mirror half of the images.

    >>> step = Batches(load_images("digits"), 32, seed=0, shift=1)
    >>> x, y = step(5)
    >>> x.shape, x.dtype, y.shape
    (torch.Size([32, 1, 8, 8]), torch.float32, torch.Size([32]))
    """

    def __init__(
        self, images: Images, batch: int, *, seed: int, shift: int = 0, flip: bool = False
    ):
        self.images, self.batch, self.seed = images, batch, seed
        self.shift, self.flip = shift, flip
        self._order = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.images.train))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) float32 and their classes (B,) of a step, from 0."""
        split = self.images.train
        samples = range(step * self.batch, (step + 1) * self.batch)
        places = (divmod(sample, len(split)) for sample in samples)
        rows = torch.tensor([self._order(epoch)[position] for epoch, position in places])
        images = split.images[rows]
        rng = np.random.default_rng([self.seed, step, 1])
        if self.shift:
            corners = rng.integers(2 * self.shift + 1, size=(2, len(rows)))
            images = _cut_out(F.pad(images, [self.shift] * 4), corners, split.images.shape[-2:])
        if self.flip:
            mirrored = torch.from_numpy(rng.random(len(rows)) < 0.5).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(-1), images)
        return self.images.normalised(images), split.labels[rows]


def _cut_out(images: Tensor, corners: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The part of each image (B, C, ...) of this height and width, from its corner (2, B) on."""
    rows, columns = (
        torch.from_numpy(corner)[:, None] + torch.arange(length)
        for corner, length in zip(corners, size, strict=True)
    )
    each = torch.arange(len(images))[:, None, None]
    return images[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# --- the arms -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageConfig:
    """Everything that decides the numbers of one run.

    Args:
        variant: The arm of the comparison.
        training: Steps and the rest of the loop; its learning rate gives way to each of `rates`.
        rates: Peak learning rates to train with; the lowest validation loss decides.
        ffn: Of the feed-forward layers: "dense", "LowRank", "BlockShuffle" or "BlockDense".
        rank: Rank of LowRank and BlockDense.
        blocks: Number of blocks of BlockShuffle and BlockDense.
        dense_layers: Leading blocks whose FFN stays dense all the same, 1 in the paper.
        source: Of the images, as ``load_images`` takes it.
        train_images: Images to learn from.
        validation_images: Images to choose the learning rate with.
        split_seed: Of the cut into splits, the same in all runs that are compared.
        patch: Pixels of a side of the squares that are the tokens.
        width: Width H of a token; the hidden width of the FFN is 4H.
        layers: Number of blocks.
        heads: Attention heads.
        batch: Images a step.
        shift: Largest random shift of a training image, in pixels.
        flip: Mirror half of the training images.
        seed: Of the weights, the order of the images and their shifts.
        experiment: The part of the book.

    Raises:
        ValueError: When a number is out of range, or rank and blocks do not fit the layer.
    """

    variant: str
    training: TrainingConfig
    rates: tuple[float, ...]
    ffn: str = "dense"
    rank: int | None = None
    blocks: int | None = None
    dense_layers: int = 1
    source: str = "digits"
    train_images: int = 300
    validation_images: int = 400
    split_seed: int = 0
    patch: int = 4
    width: int = 48
    layers: int = 4
    heads: int = 4
    batch: int = 32
    shift: int = 0
    flip: bool = False
    seed: int = 0
    experiment: str = EXPERIMENT

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(unknown("source", self.source, SOURCES))
        if self.ffn not in ("dense", *_LAYERS):
            raise ValueError(unknown("ffn", self.ffn, ("dense", *_LAYERS)))
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates is {self.rates}; give different numbers above 0, at least one")
        if min(self.batch, self.patch) < 1 or self.shift < 0:
            raise ValueError(
                f"batch {self.batch} and patch {self.patch} must be at least 1, and shift "
                f"{self.shift} not negative"
            )
        object.__setattr__(self, "rates", tuple(self.rates))
        self.shape()

    def shape(self) -> TransformerShape:
        """The sizes of the Transformer between patches and classifier, for ``count``."""
        return TransformerShape(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            hidden=4 * self.width,
            logits=None,
            ffn=self.ffn,
            rank=self.rank,
            blocks=self.blocks,
            dense_layers=self.dense_layers,
        )


_IMAGES = {
    "smoke": {"train_images": 200, "validation_images": 200, "width": 24, "layers": 2},
    # So few because the dense model has 97 % right on others after 1,000, where arms can hardly
    # differ, and 92 % after 300; either way it knows those that it learned from by heart.
    "cpu": {"train_images": 300, "validation_images": 400},
    "gpu": {
        "source": "cifar10",
        "train_images": 45_000,
        "validation_images": 5_000,
        "width": 192,
        "layers": 8,
        "batch": 256,
        "shift": 4,
        "flip": True,
    },
}
_TRAINING = {
    "smoke": TrainingConfig(steps=30, lr=3e-3, precision="fp32", evaluate_every=10),
    "cpu": TrainingConfig(steps=400, lr=1e-3, precision="fp32", evaluate_every=50),
    "gpu": TrainingConfig(steps=3_000, lr=1e-3, precision="bf16", log_every=50, evaluate_every=300),
}
_RATES = {"smoke": (3e-3, 1e-2), "cpu": (2.5e-4, 5e-4, 1e-3, 2e-3), "gpu": (3e-4, 1e-3, 3e-3)}


def grid(part: str, profile: str) -> dict[str, ImageConfig]:
    """The arms at a profile, by name, all with seed 0.

    A dense model, and each structured layer with 63 % (62.5) and 32 % (31.25) of the dense FFN's
    weights in all blocks but the first.

    Raises:
        ValueError: When the part or the profile is unknown, or has no such experiment.
    """
    if part != EXPERIMENT:
        raise ValueError(unknown("part", part, [EXPERIMENT]))
    profile = get_profile(profile).name
    if profile not in _IMAGES:
        raise ValueError(
            f"{part} has no setting of a paper to run: {profile!r} is not among "
            f"{', '.join(_IMAGES)}"
        )
    dense = ImageConfig(
        "dense", training=_TRAINING[profile], rates=_RATES[profile], **_IMAGES[profile]
    )
    arms = {"dense": dense}
    for layer in _LAYERS:
        for percent, divisor in ((63, 1), (32, 2)):
            sizes = {
                "LowRank": {"rank": dense.width // 2 // divisor},
                "BlockShuffle": {"blocks": 2 * divisor},
                "BlockDense": {"rank": 2 * dense.width // 3 // divisor, "blocks": 2},
            }[layer]
            variant = f"{layer.lower()}-{percent}"
            arms[variant] = dataclasses.replace(dense, variant=variant, ffn=layer, **sizes)
    return arms


# --- one run ------------------------------------------------------------------------------------


def make_model(config: ImageConfig, images: Images) -> "ViTForImageClassification":
    """A vision transformer of ``transformers`` with random weights and the FFNs of `config`.

    Pre-norm blocks over patches and a class token, learned positions, a linear classifier on the
    class token, no dropout. With one seed the weights outside of replaced FFNs are the same in
    every arm.

    Raises:
        ValueError: If patches do not fill the images.
    """
    from transformers import ViTConfig, ViTForImageClassification

    channels, height, width = images.size
    if height % config.patch or width % config.patch:
        raise ValueError(
            f"patch {config.patch} does not divide images of {height} x {width} pixels"
        )
    model = ViTForImageClassification(
        ViTConfig(
            image_size=(height, width),
            patch_size=config.patch,
            num_channels=channels,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            num_labels=images.classes,
        )
    )
    if config.ffn != "dense":
        build = structured(_LAYERS[config.ffn], **config.shape().sizes)
        replace_ffn(model, build, layers=range(config.dense_layers, config.layers))
    return model


def flops_per_image(config: ImageConfig, images: Images) -> int:
    """FLOPs of a forward pass on one image, counted as by ``count``."""
    channels, height, width = images.size
    patches = (height // config.patch) * (width // config.patch)
    tokens = patches + 1  # the class token
    embedding = patches * 2 * channels * config.patch**2 * config.width
    classifier = 2 * config.width * images.classes
    return embedding + tokens * count(config.shape(), context=tokens).flops + classifier


def run(
    config: ImageConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> Record:
    """Train the model of `config` at each rate, and measure the one with the least validation loss.

    The test images are read once, after that choice. A killed run continues from its last
    checkpoint.

    Args:
        config: What to run.
        progress: Show a bar.
        device: Where to run it.

    Returns:
        The record. ``accuracy`` is in percent of the test images, losses are in nats per image;
        ``learning rate`` is the one that was chosen, and ``rates`` tells what each of them led to,
        None where training diverged. The curves are those of the chosen rate.

    Raises:
        DataError: When the images are not to be had.
        TrainingError: When training diverges at every rate.
    """
    folder = run_directory(run, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".run.lock")):
        record = _run_in(folder, config, progress, resolve_device(str(device)))
        shutil.rmtree(folder, ignore_errors=True)  # the checkpoints
    return record


def _run_in(folder: Path, config: ImageConfig, progress: bool, device: torch.device) -> Record:
    started = time.perf_counter()
    images = load_images(
        config.source,
        train=config.train_images,
        validation=config.validation_images,
        seed=config.split_seed,
    )
    best, rates, diverged = None, {}, None
    for rate in config.rates:
        seed_everything(config.seed)
        model = make_model(config, images)
        try:
            result = train(
                model,
                Batches(
                    images, config.batch, seed=config.seed, shift=config.shift, flip=config.flip
                ),
                _loss,
                dataclasses.replace(config.training, lr=rate),
                evaluate=partial(measure, images=images, split="validation"),
                checkpoint=folder / f"lr-{rate:g}",
                device=device,
                progress=progress,
                description=f"{config.variant}, seed {config.seed}, lr {rate:g}",
            )
        except TrainingError as error:
            rates[f"{rate:g}"], diverged = None, error
            continue
        measured = measure(model, images=images, split="validation")
        rates[f"{rate:g}"] = measured
        if best is None or measured["validation loss"] < best[1]["validation loss"]:
            best = rate, measured, model, result.curves
    if best is None:
        raise diverged
    rate, measured, model, curves = best
    tested = measure(model, images=images, split="test")
    metrics = {
        "accuracy": tested["test accuracy"],
        "test loss": tested["test loss"],
        **measured,
        "learning rate": rate,
        "rates": rates,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "FLOPs per image": flops_per_image(config, images),
        "epochs": config.training.steps * config.batch / config.train_images,
        "image size": images.size,
        "images": {split: len(getattr(images, split)) for split in SPLITS},
        "class balance": {
            split: getattr(images, split).balance(images.classes) for split in SPLITS
        },
    }
    provenance = Provenance.here(seconds=time.perf_counter() - started, device=device)
    curves = {
        name: {axis: [float(f"{v:.6g}") for v in values] for axis, values in curve.items()}
        for name, curve in curves.items()
    }
    return Record.of(config, metrics=metrics, curves=curves, provenance=provenance)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(pixel_values=images).logits.float(), labels)


@torch.no_grad()
def measure(model: nn.Module, *, images: Images, split: str) -> dict[str, float]:
    """Loss and accuracy over one split: ``{"test loss": nats, "test accuracy": percent}``.

    Args:
        model: From ``make_model``, in eval mode afterwards.
        images: Whose split is measured.
        split: One of ``SPLITS``; names the numbers.
    """
    model.eval()
    device = next(model.parameters()).device
    held = getattr(images, split)
    loss = correct = 0
    for pixels, labels in zip(held.images.split(500), held.labels.split(500), strict=True):
        labels = labels.to(device)
        logits = model(pixel_values=images.normalised(pixels.to(device))).logits.float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(-1) == labels).sum().item()
    return {f"{split} loss": loss / len(held), f"{split} accuracy": 100 * correct / len(held)}
