"""Images: cut without overlap, told apart by models that differ in their FFNs alone."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from feedforward import images as module
from feedforward.files import cache_directory
from feedforward.images import (
    SPLITS,
    Batches,
    DataError,
    ImageConfig,
    Images,
    Split,
    flops_per_image,
    grid,
    load_images,
    make_model,
    measure,
    run,
)
from feedforward.surgery import find_ffns
from feedforward.training import TrainingConfig, TrainingError, seed_everything

PART = "structured-ffn-images"
ARMS = ["dense", *(f"{k}-{p}" for k in ("lowrank", "blockshuffle", "blockdense") for p in (63, 32))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "results"))


@pytest.fixture
def config():
    return ImageConfig(
        "lowrank-32",
        training=TrainingConfig(steps=6, lr=1e-3, precision="fp32", log_every=2, evaluate_every=3),
        rates=(1e-3, 1e-2),
        ffn="LowRank",
        rank=4,
        train_images=60,
        validation_images=80,
        width=16,
        layers=2,
        batch=16,
    )


@pytest.fixture
def pictures():
    """Made images of 5 x 6 pixels in two channels: 7, 5 and 3 of them in two classes."""
    rng = np.random.default_rng(0)

    def split(count):
        pixels = torch.from_numpy(rng.integers(1, 200, (count, 2, 5, 6), dtype=np.uint8))
        return Split(pixels, torch.arange(count) % 2)

    return Images("made", 2, split(7), split(5), split(3))


# --- images -------------------------------------------------------------------------------------


def test_digits_are_cut_without_overlap_or_loss():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = load_images("digits", train=300, validation=400)
    assert images.size == (1, 8, 8)
    assert images.classes == 10
    parts = [getattr(images, split) for split in SPLITS]
    assert [len(part) for part in parts] == [300, 400, 1097]
    pairs = [
        (label, *pixels)
        for part in parts
        for label, pixels in zip(part.labels.tolist(), part.images.flatten(1).tolist(), strict=True)
    ]
    assert sorted(pairs) == sorted((t, *x) for t, x in zip(digits.target, digits.data, strict=True))


def test_each_class_has_its_share_of_every_split():
    images = load_images("digits", train=300, validation=400)
    whole = sum(np.array(getattr(images, split).balance(10)) for split in SPLITS)
    for split in SPLITS:
        part = getattr(images, split)
        assert np.abs(np.array(part.balance(10)) - whole * len(part) / 1797).max() <= 1


def test_the_cut_follows_from_its_seed():
    first, other = (load_images("digits", train=50, validation=50, seed=s) for s in (0, 1))
    module._load.cache_clear()
    again = load_images("digits", train=50, validation=50, seed=0)
    assert again is not first
    for split in SPLITS:
        assert torch.equal(getattr(again, split).images, getattr(first, split).images)
        assert not torch.equal(getattr(other, split).images, getattr(first, split).images)


def test_pixels_are_normalised_by_the_training_images_alone(pictures):
    x = pictures.normalised(pictures.train.images)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(2))
    others = dataclasses.replace(pictures, test=pictures.validation)
    assert torch.equal(others.normalised(pictures.train.images), x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "digit"}, "no source 'digit'; did you mean 'digits'"),
        ({"train": 1400, "validation": 397}, "has 1797 images.*leave some for the test"),
        ({"train": 0}, "at least 1"),
        ({"train": 5}, "classes"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        load_images(**wrong)


@pytest.fixture
def hub(monkeypatch):
    """Puts a function in the place of the hub's `load_dataset`."""

    def put(load_dataset):
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(**load_dataset))
        module._load.cache_clear()

    yield put
    module._load.cache_clear()


def test_cifar10_keeps_its_own_test_images(hub):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    labels = [number % 10 for number in range(50)]

    def load_dataset(name):
        assert name == "uoft-cs/cifar10"
        split = {"img": [Image.fromarray(image) for image in pixels], "label": labels}
        return {"train": split, "test": {name: column[:20] for name, column in split.items()}}

    hub({"load_dataset": load_dataset})
    images = load_images("cifar10", train=30, validation=20)
    assert images.size == (3, 32, 32)
    assert [len(getattr(images, split)) for split in SPLITS] == [30, 20, 20]
    assert np.array_equal(images.test.images, pixels[:20].transpose(0, 3, 1, 2))
    assert images.train.balance(10) == [3] * 10
    joined = torch.cat([images.train.images, images.validation.images])
    assert joined.sum().item() == pixels.sum()
    with pytest.raises(ValueError, match="has 50 images to cut"):
        load_images("cifar10", train=30, validation=21)


def test_cifar10_without_network_is_a_clear_error(hub):
    def load_dataset(name):
        raise ConnectionError("no route to host")

    hub({"load_dataset": load_dataset})
    with pytest.raises(DataError, match=r"cannot be loaded.*no route.*source='digits'"):
        load_images("cifar10", train=30, validation=20)


# --- batches ------------------------------------------------------------------------------------


def rows_of(split: Split, batch: torch.Tensor) -> list[int]:
    return [int((split.images == x).flatten(1).all(1).nonzero()) for x in batch]


def test_every_epoch_has_each_image_once_in_its_own_order(pictures, monkeypatch):
    monkeypatch.setattr(Images, "normalised", lambda self, x: x)
    step = Batches(pictures, 3, seed=0)
    rows = [row for s in range(14) for row in rows_of(pictures.train, step(s)[0])]
    epochs = [rows[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    x, y = step(4)
    assert torch.equal(y, pictures.train.labels[rows_of(pictures.train, x)])


def test_a_batch_follows_from_its_step_and_seed(pictures):
    options = {"shift": 2, "flip": True}
    first, again, other = (Batches(pictures, 4, seed=s, **options) for s in (3, 3, 4))
    forwards = [first(s)[0] for s in range(5)]
    backwards = [again(s)[0] for s in reversed(range(5))][::-1]
    assert all(map(torch.equal, forwards, backwards))
    assert not torch.equal(other(0)[0], forwards[0])


def test_shifted_and_mirrored_images_are_parts_of_their_own(pictures, monkeypatch):
    monkeypatch.setattr(Images, "normalised", lambda self, x: x)
    plain = Batches(pictures, 7, seed=0)
    step = Batches(pictures, 7, seed=0, shift=1, flip=True)
    seen = set()
    for s in range(30):
        for original, x in zip(plain(s)[0], step(s)[0], strict=True):
            assert x.dtype == torch.uint8
            for flipped in (False, True):
                padded = F.pad(original, [1] * 4)
                for down in range(3):
                    for right in range(3):
                        part = padded[:, down : down + 5, right : right + 6]
                        if torch.equal(part.flip(-1) if flipped else part, x):
                            seen.add((flipped, down, right))
                            break
                    else:
                        continue
                    break
                else:
                    continue
                break
            else:
                pytest.fail("an image is no shift of its original")
    assert len(seen) == 18  # all shifts, straight and mirrored, occur


# --- the arms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_arms_of_one_size_have_equally_many_parameters(profile):
    arms = grid(PART, profile)
    assert list(arms) == ARMS
    size = (1, 8, 8) if arms["dense"].source == "digits" else (3, 32, 32)
    blank = Split(torch.zeros(1, *size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    images = Images("blank", 10, blank, blank, blank)
    dense = arms["dense"]
    whole = (dense.layers - 1) * 8 * dense.width**2
    costs = {}
    for name, arm in arms.items():
        assert arm.variant == name
        assert (arm.experiment, arm.seed) == (PART, 0)
        assert (arm.rates, arm.training) == (dense.rates, dense.training)
        with torch.device("meta"):
            model = make_model(arm, images)
        parameters = sum(p.numel() for p in model.parameters())
        costs[name] = (parameters, flops_per_image(arm, images))
    for name, (parameters, flops) in costs.items():
        share = {"63": 0.625, "32": 0.3125}.get(name[-2:], 1)
        assert costs["dense"][0] - parameters == whole - share * whole
        assert (parameters, flops) == costs[f"lowrank-{name[-2:]}" if share < 1 else "dense"]


def test_arms_differ_in_the_ffns_behind_the_first_block_alone():
    arms = grid(PART, "cpu")
    images = load_images("digits")
    weights = {}
    for name, arm in arms.items():
        seed_everything(0)
        model = make_model(arm, images)
        kinds = [[type(linear).__name__ for linear in ffn.linears] for ffn in find_ffns(model)]
        kind = "Linear" if name == "dense" else arm.ffn
        assert kinds == [["Linear"] * 2] + [[kind] * 2] * (arm.layers - 1)
        weights[name] = model.state_dict()
    first = next(key for key in weights["dense"] if ".fc1." in key)
    common = [key for key in weights["dense"] if ".fc" not in key or key.startswith(first[:12])]
    assert len(common) > 30
    for state in weights.values():
        assert all(torch.equal(state[key], weights["dense"][key]) for key in common)


@pytest.mark.parametrize("ffn", ["dense", "LowRank", "BlockShuffle", "BlockDense"])
def test_flops_agree_with_those_of_the_operations_run(config, ffn):
    sizes = {"LowRank": (4, None), "BlockShuffle": (None, 4), "BlockDense": (6, 2)}
    rank, blocks = sizes.get(ffn, (None, None))
    config = dataclasses.replace(config, ffn=ffn, rank=rank, blocks=blocks)
    images = load_images("digits")
    model = make_model(config, images).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=images.normalised(images.test.images[:3]))
    assert counter.get_total_flops() == 3 * flops_per_image(config, images)


def test_unknown_parts_and_profiles_are_refused():
    with pytest.raises(ValueError, match="no part 'structured-ffn'; did you mean"):
        grid("structured-ffn", "cpu")
    with pytest.raises(ValueError, match="no profile 'cup'"):
        grid(PART, "cup")
    with pytest.raises(ValueError, match=r"no setting of a paper.*'paper'.*smoke, cpu, gpu"):
        grid(PART, "paper")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "mnist"}, "no source 'mnist'"),
        ({"ffn": "lowrank"}, "no ffn 'lowrank'; did you mean 'LowRank'"),
        ({"rank": None}, "rank is None"),
        ({"blocks": 2}, "blocks is 2"),
        ({"rates": ()}, "rates is"),
        ({"rates": (0.1, 0.1)}, "rates is"),
        ({"rates": (0.1, 0.0)}, "rates is"),
        ({"batch": 0}, "batch 0"),
        ({"shift": -1}, "shift -1"),
    ],
)
def test_numbers_out_of_range_are_refused(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **wrong)


def test_patches_must_fill_the_images(config):
    with pytest.raises(ValueError, match="patch 3 does not divide images of 8 x 8"):
        make_model(dataclasses.replace(config, patch=3), load_images("digits"))


# --- runs ---------------------------------------------------------------------------------------


def test_measuring_equals_one_pass_over_everything(config):
    images = load_images("digits")
    torch.manual_seed(0)
    model = make_model(config, images)
    measured = measure(model, images=images, split="test")
    with torch.no_grad():
        logits = model(pixel_values=images.normalised(images.test.images)).logits
    loss = F.cross_entropy(logits, images.test.labels).item()
    assert measured["test loss"] == pytest.approx(loss, rel=1e-5)
    right = (logits.argmax(-1) == images.test.labels).sum().item()
    assert measured["test accuracy"] == pytest.approx(100 * right / 1097)
    assert not model.training


def test_a_run_keeps_the_rate_with_the_least_validation_loss(config, monkeypatch):
    record = run(config, progress=False, device="cpu")
    m = record.metrics
    assert (record.experiment, record.variant, record.seed) == (PART, "lowrank-32", 0)
    assert list(m["rates"]) == ["0.001", "0.01"]
    losses = {rate: measured["validation loss"] for rate, measured in m["rates"].items()}
    chosen = min(losses, key=losses.get)
    assert f"{m['learning rate']:g}" == chosen
    assert m["validation loss"] == losses[chosen]
    assert m["validation accuracy"] == m["rates"][chosen]["validation accuracy"]
    assert record.curves["validation loss"]["value"][-1] == pytest.approx(losses[chosen], rel=1e-5)
    assert max(record.curves["lr"]["value"]) <= m["learning rate"]
    assert record.curves["validation loss"]["step"] == [3, 6]
    assert m["images"] == {"train": 60, "validation": 80, "test": 1657}
    assert m["image size"] == [1, 8, 8]
    assert {split: sum(count) for split, count in m["class balance"].items()} == m["images"]
    images = load_images("digits", train=60, validation=80)
    assert m["parameters"] == sum(p.numel() for p in make_model(config, images).parameters())
    assert m["FLOPs per image"] == flops_per_image(config, images)
    assert m["epochs"] == pytest.approx(6 * 16 / 60)
    assert not list(cache_directory().rglob("step-*"))  # no checkpoint is left

    # turned round, the other rate is chosen, and the same model at it is measured
    def turned(model, *, images, split):
        measured = measure(model, images=images, split=split)
        return {k: -v if k == "validation loss" else v for k, v in measured.items()}

    monkeypatch.setattr(module, "measure", turned)
    other = run(config, progress=False, device="cpu").metrics
    assert other["learning rate"] != m["learning rate"]
    alone = dataclasses.replace(config, rates=(other["learning rate"],))
    assert run(alone, progress=False, device="cpu").metrics["test loss"] == other["test loss"]


def test_the_test_images_are_read_once_the_rate_is_chosen(config, monkeypatch):
    trained, read = [], []

    def watched(*arguments, **options):
        images = load_images(*arguments, **options)

        class Sealed(Split):
            def __getattribute__(self, name):
                if name == "images":
                    assert len(trained) == 2, "the test images were read before the choice"
                    read.append(name)
                return super().__getattribute__(name)

        return dataclasses.replace(images, test=Sealed(images.test.images, images.test.labels))

    def train(*arguments, **options):
        result = original(*arguments, **options)
        trained.append(True)
        return result

    original = module.train
    monkeypatch.setattr(module, "load_images", watched)
    monkeypatch.setattr(module, "train", train)
    run(config, progress=False, device="cpu")
    assert read == ["images"]


def test_a_killed_run_ends_with_the_same_numbers(config, monkeypatch, tmp_path):
    whole = run(config, progress=False, device="cpu")
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "another"))
    often = dataclasses.replace(config.training, checkpoint_every_steps=2)
    again = dataclasses.replace(config, training=often)
    loss, calls = module._loss, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 6 + 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(module, "_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        run(again, progress=False, device="cpu")
    continued = run(again, progress=False, device="cpu")
    assert len(calls) == 10 + 4  # of the second rate steps 3 to 6, of the first none
    assert continued.metrics == whole.metrics
    assert continued.curves == whole.curves


def test_a_rate_that_diverges_is_told_and_left_out(config, monkeypatch):
    original = module.train
    bad = {0.01}

    def train(model, batches, loss, training, **options):
        if training.lr in bad:
            raise TrainingError("loss is nan at step 1")
        return original(model, batches, loss, training, **options)

    monkeypatch.setattr(module, "train", train)
    metrics = run(config, progress=False, device="cpu").metrics
    assert metrics["rates"]["0.01"] is None
    assert metrics["learning rate"] == 0.001
    bad.add(0.001)
    with pytest.raises(TrainingError, match="nan at step 1"):
        run(config, progress=False, device="cpu")


def test_a_model_learns_digits(config):
    longer = dataclasses.replace(config.training, steps=80, evaluate_every=None)
    config = dataclasses.replace(
        config, training=longer, rates=(5e-3,), train_images=300, width=32, rank=8
    )
    record = run(config, progress=False, device="cpu")
    assert record.metrics["accuracy"] > 40  # a guess has 10
    assert record.curves["loss"]["value"][-1] < 0.7 * record.curves["loss"]["value"][0]
