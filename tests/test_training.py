import errno
import itertools
import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from feedforward import LowRank, MoE, SelfGuided, TopKRouter
from feedforward.files import sha256
from feedforward.layers.guided import advance, release
from feedforward.training import (
    EMA,
    SCHEDULES,
    CheckpointError,
    TrainingConfig,
    TrainingError,
    bf16_products,
    checkpoints,
    load_weights,
    loop,
    precision,
    save_weights,
    seed_everything,
    train,
)


def small_model(stochastic=True):
    torch.manual_seed(7)
    guided = SelfGuided(LowRank(16, 3, rank=2), steps=12, stochastic=stochastic)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Dropout(0.2), nn.GELU(), guided)


def follow(model, step):
    if step < 12:
        advance(model)
    else:
        release(model)


def batches(index):
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(8, 6, generator=generator)
    return x, x[:, :3].abs()


def squared_error(model, batch):
    x, y = batch
    # the loss draws from every generator, so that all of them must be restored
    noise = random.random() + np.random.random()  # noqa: NPY002
    value = F.mse_loss(model(x), y)
    return value, {"noise": noise, "twice": 2 * value}


def config(**changes):
    settings = {
        "steps": 20,
        "lr": 3e-3,
        "accumulate": 2,
        "ema": 0.9,
        "precision": "fp32",
        "log_every": 3,
        "evaluate_every": 4,
        "checkpoint_every_steps": 5,
    }
    return TrainingConfig(**settings | changes)


def evaluate(model):
    torch.rand(3)  # must not disturb the run
    x, y = batches(10_000)
    return F.mse_loss(model(x), y).item()


def run(checkpoint=None, *, data=batches, settings=None, on_step=follow, **options):
    seed_everything(3)
    model = small_model()
    settings = settings or config()
    options = {"device": "cpu", "progress": False, "evaluate": evaluate} | options
    result = train(
        model, data, squared_error, settings, checkpoint=checkpoint, on_step=on_step, **options
    )
    return model, result


def killed_at(index):
    def data(i):
        if i == index:
            raise KeyboardInterrupt
        return batches(i)

    return data


def assert_same(one, other):
    (model, result), (again, resumed) = one, other
    assert resumed.curves == result.curves
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    own, theirs = result.ema.state_dict(model), resumed.ema.state_dict(again)
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_it_learns_and_reports_curves(tmp_path):
    _, result = run(settings=config(steps=120, warmup=0.05))
    loss = result.curves["loss"]
    assert loss["value"][-1] < 0.6 * loss["value"][0]
    assert loss["step"][:2] == [3, 6]
    assert loss["step"][-1] == 120
    assert result.curves["evaluation"]["step"] == list(range(4, 121, 4))
    assert result.curves["twice"]["value"] == pytest.approx([2 * v for v in loss["value"]])
    assert result.seconds > 0
    assert (result.resumed_from, result.precision) == (0, "fp32")


@pytest.mark.parametrize(
    ("index", "step"), [(22, 10), (35, 15)], ids=["before release", "after release"]
)
def test_a_killed_run_ends_with_the_same_numbers(tmp_path, index, step):
    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=killed_at(index))
    resumed = run(tmp_path)
    assert resumed[1].resumed_from == step
    assert_same(whole, resumed)
    random_states = random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    run()
    assert (random.random(), np.random.random(), torch.rand(1)) == random_states  # noqa: NPY002


def test_a_finished_run_loads_without_training(tmp_path):
    done = run(tmp_path)

    def no_data(index):
        raise AssertionError("it must not train again")

    assert_same(done, run(tmp_path, data=no_data))


def test_what_is_released_leaves_optimizer_and_checkpoint(tmp_path):
    run(tmp_path)
    (last,) = tmp_path.glob("step-*")
    names = set(load_file(last / "optimizer.safetensors"))
    assert "4.v/exp_avg" in names
    assert not any("guide" in name for name in names)
    assert "4.guide" not in load_file(last / "model.safetensors")


def test_on_step_may_not_add_parameters():
    def grow(model, step):
        model.append(nn.Linear(3, 3))

    with pytest.raises(ValueError, match=r"on_step added the parameters \['5.weight'"):
        run(on_step=grow)


def test_evaluation_leaves_the_training_alone():
    often, _ = run(settings=config(evaluate_every=1))
    never, _ = run(evaluate=None)
    assert torch.equal(often[0].weight, never[0].weight)


def test_accumulation_is_the_mean_of_the_micro_batches():
    def step_with(accumulate, data):
        model = nn.Linear(6, 3)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        settings = config(steps=1, accumulate=accumulate, clip=None, ema=None, warmup=0)
        train(model, data, squared_error, settings, device="cpu", progress=False)
        return model.weight

    both = [torch.cat(parts) for parts in zip(batches(0), batches(1), strict=True)]
    torch.testing.assert_close(step_with(2, batches), step_with(1, lambda index: both))


def test_parameter_groups_set_rate_warmup_and_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def own(name, parameter):
        return {"lr": 0.5, "warmup": 5, "weight_decay": 0.3} if name == "1.weight" else {}

    optimizer = loop._adamw(model, config(weight_decay=0.1), own)
    found = {
        parameter: (group["peak_lr"], group["warmup"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found[model[0].weight] == (3e-3, 0.1, 0.1)
    assert found[model[0].bias] == (3e-3, 0.1, 0.0)
    assert found[model[1].weight] == (0.5, 5, 0.3)
    everything = loop._adamw(model, config(decay_all=True), None)
    assert [group["weight_decay"] for group in everything.param_groups] == [0.1]
    with pytest.raises(ValueError, match="there is no setting of a parameter group 'rate'"):
        loop._adamw(model, config(), lambda name, parameter: {"rate": 1})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_rises_to_the_peak_and_ends_where_it_should(schedule):
    settings = config(steps=100, warmup=10, schedule=schedule, final_lr=0.2)
    shares = [settings.lr_share(step) for step in range(100)]
    assert shares[0] == 0.1
    assert shares[9] == shares[10] == 1.0
    assert shares[-1] == pytest.approx(1.0 if schedule == "constant" else 0.2)
    assert all(a >= b for a, b in itertools.pairwise(shares[9:]))


def test_ema_follows_and_is_swapped_out_again():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.75)
    nn.init.ones_(model.weight)
    ema.update(model)
    with ema.applied(model):
        assert model.weight.item() == 0.25
    assert model.weight.item() == 1.0
    ema.update(nn.Linear(1, 1))  # none of its weights is known
    assert ema.state_dict(model) == {}


def test_weight_decay_alone_shrinks_matrices():
    model = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = config(
        steps=1, lr=0.1, weight_decay=0.5, warmup=0, schedule="constant", accumulate=1, ema=None
    )
    zero = lambda model, batch: 0.0 * model(batch).sum()  # noqa: E731
    train(model, lambda i: torch.ones(1, 2), zero, settings, device="cpu", progress=False)
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(model.bias.detach(), before["bias"])


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    def data(index):
        x, y = batches(index)
        return x, y * math.nan if index == 15 else y

    with pytest.raises(TrainingError, match=r"loss is nan.* at step 8.*checkpoint of step 5"):
        run(tmp_path, data=data)
    assert_same(run(), run(tmp_path))


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"one element, not \(8, 3\): take its mean"):
        train(
            nn.Linear(6, 3),
            batches,
            lambda model, batch: model(batch[0]),
            config(),
            device="cpu",
            progress=False,
        )


def test_tied_weights_survive_a_checkpoint(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    def loss(model, ids):
        return F.cross_entropy(model(ids), ids)

    def go(data):
        torch.manual_seed(0)
        model = Tied()
        train(model, data, loss, config(), checkpoint=tmp_path, device="cpu", progress=False)
        return model

    model = go(lambda index: torch.arange(9))
    again = go(None)
    assert again.head.weight is again.embed.weight
    assert torch.equal(model.head.weight, again.head.weight)


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=killed_at(22))
    (last,) = tmp_path.glob("step-*")
    return last


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "optimizer.safetensors"])
def test_a_truncated_checkpoint_is_named(stopped, name):
    file = stopped / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=rf"{name} is truncated.*Delete {stopped.parent}"):
        run(stopped.parent)


@pytest.mark.parametrize("content", ["", "{}", '{"state.pt": 1', '{"gone.pt": "00"}'])
def test_a_corrupt_list_of_checksums_is_named(stopped, content):
    (stopped / "checksums.json").write_text(content)
    if content == "{}":  # nothing vouches for the files: none is read
        (stopped / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="cannot be continued from"):
        run(stopped.parent)


def test_pickles_are_never_executed(stopped):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(stopped / "executed"),)

    torch.save({"version": 1, "config": Evil()}, stopped / "state.pt")
    sums = json.loads((stopped / "checksums.json").read_text())
    sums["state.pt"] = sha256(stopped / "state.pt")
    (stopped / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="cannot be continued from"):
        run(stopped.parent)
    assert not (stopped / "executed").exists()


def test_a_checkpoint_of_another_run_is_refused(stopped):
    with pytest.raises(CheckpointError, match=r"another configuration.*lr 0.003 there, 0.1 here"):
        run(stopped.parent, settings=config(lr=0.1))
    with pytest.raises(
        CheckpointError, match=r"another model wrote it.*0.bias.*\(16,\) there, \(4,\) here"
    ):
        train(
            nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)),
            batches,
            squared_error,
            config(),
            checkpoint=stopped.parent,
            device="cpu",
            progress=False,
        )
    # how often to write is no part of what is computed
    assert_same(run(), run(stopped.parent, settings=config(checkpoint_every_steps=3)))


@pytest.mark.parametrize("writer", ["save_file", "_flush", "_serialized"])
def test_no_space_left_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, writer):
    original, calls = getattr(checkpoints, writer), []

    def full(*args):
        if (tmp_path / "step-00000005").exists() and args != (tmp_path,):
            calls.append(args)
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(checkpoints, writer, full)
    with pytest.raises(CheckpointError, match=r"step 10 .* no space left.*step-00000005, is kept"):
        run(tmp_path)
    monkeypatch.undo()
    assert calls
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert_same(run(), run(tmp_path))


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / ".step-abc.part").mkdir()
    (tmp_path / ".step-abc.part" / "model.safetensors").write_bytes(b"half")
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_checkpoints_by_time(tmp_path):
    settings = config(checkpoint_every_steps=None, checkpoint_every_seconds=1e-9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=killed_at(14), settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_bf16_autocast_keeps_float32_weights():
    seen = []

    def loss(model, batch):
        seen.append(model(batch[0]).dtype)
        return F.mse_loss(model(batch[0]).float(), batch[1])

    model = nn.Linear(6, 3)
    settings = config(steps=2, precision="bf16", ema=None)
    result = train(model, batches, loss, settings, device="cpu", progress=False)
    assert set(seen) == {torch.bfloat16}
    assert model.weight.dtype == torch.float32
    assert result.precision == "bf16"


@pytest.mark.parametrize("slow", [True, False])
def test_bf16_products_without_instructions_for_them(slow, monkeypatch):
    """They go through float32, and what comes out is the processor's own up to rounding."""
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: not slow)
    seen = []
    product = torch.mm

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    a, b = torch.randn(64, 48), torch.randn(48, 80)
    left, right = a.bfloat16().requires_grad_(), b.bfloat16()
    with Watch(), bf16_products(torch.device("cpu")):
        out = product(left, right)
        out.sum().backward()
    assert set(seen) == {torch.float32 if slow else torch.bfloat16}
    assert out.dtype == left.grad.dtype == torch.bfloat16
    exact = a.bfloat16().double() @ right.double()
    assert (out.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    with bf16_products(torch.device("cpu")):
        assert torch.equal(product(a, b), a @ b)
        bias = torch.randn(80).bfloat16()
        sums = torch.addmm(bias, left.detach(), right)
    torch.testing.assert_close(sums.double(), exact + bias.double(), rtol=2**-7, atol=2**-6)


def test_bf16_products_cover_experts_and_attention(monkeypatch):
    """Values and gradients under autocast are those of float32, up to bfloat16's rounding."""
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: False)
    torch.manual_seed(3)
    experts, x = MoE(32, 64, 4, router=TopKRouter(32, 4, k=2)), torch.randn(2, 24, 32)
    mask = torch.randn(24, 24)
    weights = list(experts.parameters())

    def compute():
        y = experts(x).unflatten(-1, (2, 16)).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y, mask.to(y.dtype))
        return y, torch.autograd.grad(y.float().square().sum(), weights)

    seen = set()
    through = precision._ThroughFloat32.__torch_dispatch__

    def watch(self, func, *rest):
        seen.add(func)
        return through(self, func, *rest)

    monkeypatch.setattr(precision._ThroughFloat32, "__torch_dispatch__", watch)
    exact, exact_gradients = compute()
    with bf16_products(torch.device("cpu")), torch.autocast("cpu", torch.bfloat16):
        rounded, gradients = compute()
    assert rounded.dtype == torch.bfloat16
    assert torch.ops.aten._grouped_mm.default in seen
    assert precision._ATTENTION in seen
    for one, other in [(rounded, exact), *zip(gradients, exact_gradients, strict=True)]:
        assert (one - other).norm() <= 0.02 * other.norm()


def test_bf16_products_are_left_alone_where_not_asked_for(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: False)
    seen = []
    monkeypatch.setattr(precision, "_ThroughFloat32", lambda: seen.append(1))
    with bf16_products(torch.device("cpu"), enabled=False):
        pass
    with bf16_products(torch.device("meta")):
        pass
    assert seen == []


def test_seed_everything_seeds_every_generator():
    def draw():
        seed_everything(5)
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number from 1"),
        ({"steps": True}, "steps is True"),
        ({"lr": 0.0}, "lr is 0.0; it must be a number above 0"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"warmup": 1.5}, "warmup is 1.5; it must be a share"),
        ({"warmup": 21}, "int up to 20"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "fp16"}, "there is no precision 'fp16'"),
        ({"final_lr": 2}, "final_lr is 2"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": 0.9}, "betas is 0.9"),
        ({"clip": 0}, "clip is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"checkpoint_every_seconds": math.nan}, "checkpoint_every_seconds is nan"),
    ],
)
def test_a_wrong_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config(**changes)


def test_weights_of_other_shapes_change_nothing(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for widths in ((4, 1), (3, 1)), ((4, 3), (3, 2)):  # one that broadcasts, one that does not
        other = nn.Sequential(*(nn.Linear(*each) for each in widths))
        save_weights(other, tmp_path / "weights")
        with pytest.raises(ValueError, match=r"another model: .*\) there, \(\d.*\) here"):
            load_weights(model, tmp_path / "weights")
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    save_weights(other := nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), tmp_path / "weights")
    load_weights(model, tmp_path / "weights")
    assert torch.equal(model[1].weight, other[1].weight)


PROGRAM = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
import test_training
model = test_training.model_without_dropout(accumulate=2, checkpoint={folder!r})
torch.save(model.state_dict(), {out!r} + str(dist.get_rank()))
"""


def model_without_dropout(**options):
    model = small_model(stochastic=False)
    model[2] = nn.Identity()
    settings = config(clip=None, accumulate=options.pop("accumulate"))
    loss = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    train(model, batches, loss, settings, on_step=follow, device="cpu", **options)
    return model


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    folder, out = str(tmp_path / "check points"), str(tmp_path / "weights")
    program = PROGRAM.format(tests=os.path.dirname(__file__), folder=folder, out=out)
    (tmp_path / "program.py").write_text(program)
    settings = {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XDG")} | settings
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    alone = model_without_dropout(accumulate=4, progress=False).state_dict()
    for rank in (0, 1):
        state = torch.load(f"{out}{rank}", weights_only=True)
        assert state.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    assert list(home.iterdir()) == []  # nothing is configured or left there
