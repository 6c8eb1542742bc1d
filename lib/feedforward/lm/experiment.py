"""Train language models that differ in their feed-forward layers, and measure them alike.

``grid`` lists the arms of a part of the book at a profile, ``run`` trains one and returns its
record, ``trained_model`` gives the model of a run for pictures and generation.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from feedforward.files import DataError
from feedforward.layers.cost import HasShape, count
from feedforward.layers.experts import MoE, collect_routing
from feedforward.layers.guided import SCHEDULES, SelfGuided, advance, guide, release
from feedforward.layers.routing import Routing, load_balancing_loss, router_z_loss
from feedforward.layers.structured import BlockShuffle
from feedforward.lm.data import (
    Text,
    batches,
    bits_per_byte,
    evaluation_batches,
    load_text,
)
from feedforward.lm.model import STRUCTURED, Decoder, DecoderConfig
from feedforward.profiles import get_profile, resolve_device, unknown
from feedforward.records import (
    Provenance,
    Record,
    RecordError,
    added,
    agreed,
    is_first_process,
    run_directory,
    run_lock,
)
from feedforward.training import (
    TrainingConfig,
    load_weights,
    save_weights,
    seed_everything,
    train,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Guidance:
    """Self-guided training of the structured layers (arXiv 2406.16450, section 4).

    Explained in ``book/structured-ffn/03-self-guided-training``.

    Args:
        steps: Optimizer steps with guides; they are dropped after the last.
        repeat: The protocol at equal FLOPs: the last `steps` of all the run's steps see the data of
            its first `steps` again, now without guides. False: fresh data to the end.
        stochastic: The cheap form, which uses the guide in half of the forward passes.
        schedule: How the guides' part falls, ``"cosine"`` or ``"linear"``.
        released_start: Start the guides of BlockShuffle as the paper's released code does, without
            the permutations, so that they are not what the layers compute; for the audit.

    Raises:
        ValueError: When `steps` is not positive or the schedule is unknown.
    """

    steps: int
    repeat: bool = False
    stochastic: bool = True
    schedule: str = "cosine"
    released_start: bool = False

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"guidance has steps {self.steps!r}; give a whole number from 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", self.schedule, SCHEDULES))


@dataclass(frozen=True)
class LanguageModelConfig:
    """Everything that decides the numbers of one run.

    Args:
        variant: The arm of the comparison.
        model: Shape of the model; its vocabulary is the tokeniser's.
        training: Steps, learning rate and the rest of the loop.
        seed: Of the weights and of the order of the data.
        batch: Sequences of ``model.context`` tokens of a micro-batch; a step has
            ``training.accumulate`` of them in each process.
        source: Of the text, as `feedforward.lm.data.load_text` takes it.
        balance: Weight of the load-balancing loss, averaged over the layers.
        z: Weight of the router z-loss, averaged over the layers.
        curve_tokens: Validation tokens of a point of the validation curve.
        final_tokens: Validation and test tokens of the final numbers; None: all of them.
        experiment: The part of the book.
        guidance: Self-guided training of structured layers; None: none.
        processes: That torchrun starts, one a GPU; each has micro-batches of its own.
        text_tokens: Training tokens to stream of a text of the hub, the same number for the runs
            that are compared, so that they have one text; None: as many as this run sees.

    Raises:
        ValueError: When a number is out of range, or there is nothing to guide.
    """

    variant: str
    model: DecoderConfig
    training: TrainingConfig
    seed: int = 0
    batch: int = 16
    source: str = "embedded"
    balance: float = 0.0
    z: float = 0.0
    curve_tokens: int = 16_384
    final_tokens: int | None = None
    experiment: str = "foundations"
    guidance: Guidance | None = added(None)
    processes: int = added(1)
    text_tokens: int | None = added(None)

    def __post_init__(self):
        for name in ("batch", "curve_tokens", "final_tokens", "processes", "text_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.balance < 0 or self.z < 0:
            raise ValueError(f"balance {self.balance} and z {self.z} must not be negative")
        if self.guidance is not None:
            if self.model.ffn not in STRUCTURED:
                raise ValueError(f"guidance is of structured layers; ffn is {self.model.ffn!r}")
            if self.guidance.steps * (1 + self.guidance.repeat) > self.training.steps:
                raise ValueError(
                    f"guidance takes {self.guidance.steps} steps"
                    f"{', twice,' if self.guidance.repeat else ''} of {self.training.steps}: "
                    "train for more steps, or guide for fewer"
                )

    @property
    def tokens_per_step(self) -> int:
        """Tokens seen in one step of the optimizer."""
        micro_batches = self.processes * self.training.accumulate
        return micro_batches * self.batch * self.model.context

    @property
    def tokens(self) -> int:
        """Tokens seen in training, those that a repeated phase sees again included."""
        return self.training.steps * self.tokens_per_step

    @property
    def fresh_steps(self) -> int:
        """Steps before a repeated phase."""
        repeats = self.guidance is not None and self.guidance.repeat
        return self.training.steps - (self.guidance.steps if repeats else 0)


def guided_share(dense: HasShape, structured: HasShape, *, stochastic: bool = True) -> float:
    """How long to guide so that the protocol with a repeated phase costs what dense training does.

    With T steps of data, the first ``rho T`` are guided, and seen again at the end:
    ``rho = (F_dense - F_structured) / (c F_guide + F_structured)`` with the training FLOPs F of a
    token, and c = 1/2 for stochastic guides (arXiv 2406.16450, section 4). Explained in
    ``book/structured-ffn/03-self-guided-training``.

    Args:
        dense: Shape or configuration of the dense model.
        structured: Of the structured one.
        stochastic: Whether the guide is used in half of the forward passes, or in all.

    Raises:
        ValueError: When the structured model is none, or takes more FLOPs than the dense one.

    >>> from feedforward.layers.cost import PAPER_SHAPES as shapes
    >>> [round(guided_share(shapes[s], shapes[f"{s}-lowrank-32"]), 2) for s in ("s", "xl")]
    [0.3, 0.43]
    """
    full, part = (count(config).training_flops for config in (dense, structured))
    share = (full - part) / (guide_flops(structured, stochastic=stochastic) + part)
    if share < 0:
        raise ValueError(
            f"the dense model takes {full:,} training FLOPs a token and the structured one {part:,}"
            ", so that none are left for a guide; give a larger dense model, or other layers"
        )
    return share


def guide_parameters(config: HasShape) -> int:
    """The numbers in the guides of a structured model: one dense matrix for each of its maps.

    Raises:
        ValueError: When its feed-forward layers are not structured.
    """
    shape = config.shape()
    if shape.ffn in ("dense", "MoE"):
        raise ValueError(f"guides are of structured layers; the model's are {shape.ffn}")
    maps = (shape.layers - shape.dense_layers) * (2 + shape.gated)
    return maps * shape.width * shape.hidden


def training_flops(config: LanguageModelConfig) -> int:
    """The FLOPs of a whole run, those of guides and of repeated tokens included.

    Of a token they are ``3 * (2 * parameters in matrix products + 4 * layers * context * attention
    width)``, tied logits included (as arXiv 2406.16450 counts); a guide that every forward pass
    uses adds 6 for each of its parameters, a stochastic one half of that.
    """
    flops = count(config.model).training_flops * config.tokens
    if config.guidance is not None:
        guides = guide_flops(config.model, stochastic=config.guidance.stochastic)
        flops += guides * config.guidance.steps * config.tokens_per_step
    return flops


def guide_flops(structured: HasShape, *, stochastic: bool = True) -> int:
    """Training FLOPs of a token in the guides of a structured model.

    Args:
        structured: Its shape or configuration.
        stochastic: Whether a guide is used in half of the forward passes, or in all.

    Raises:
        ValueError: As `guide_parameters`.
    """
    return (3 if stochastic else 6) * guide_parameters(structured)


# --- the arms -----------------------------------------------------------------------------------

_SHAPES = {
    "smoke": {"width": 128, "layers": 4, "heads": 4, "context": 128, "bias": False},
    "cpu": {"width": 128, "layers": 4, "heads": 4, "context": 128, "bias": False},
    "gpu": {"width": 512, "layers": 8, "heads": 8, "context": 512, "bias": False},
}
_TRAINING = {
    # gentler than the others: with so few steps a short warm-up is at the edge of stability
    "smoke": TrainingConfig(
        steps=96, lr=2e-3, warmup=0.3, precision="fp32", log_every=8, evaluate_every=24
    ),
    "cpu": TrainingConfig(steps=1000, lr=4e-3, precision="fp32", log_every=20, evaluate_every=100),
    "gpu": TrainingConfig(steps=1000, lr=1e-3, precision="bf16", log_every=20, evaluate_every=50),
}
_OTHERS = {
    "smoke": {"batch": 8, "curve_tokens": 4_096, "final_tokens": 16_384},
    "cpu": {"batch": 8},
    "gpu": {"batch": 32, "curve_tokens": 65_536},
}
# feed-forward layer, weight of the balance loss, weight of the z-loss
_FOUNDATIONS = {
    "dense": ({"ffn": "dense"}, 0.0, 0.0),
    "moe": ({"ffn": "moe", "experts": 8, "k": 2}, 0.01, 0.001),
    "switch": ({"ffn": "switch", "experts": 8}, 0.01, 0.001),
    "moe-unbalanced": ({"ffn": "moe", "experts": 8, "k": 2}, 0.0, 0.0),
    "switch-unbalanced": ({"ffn": "switch", "experts": 8}, 0.0, 0.0),
}


def _foundations(profile: str) -> dict[str, LanguageModelConfig]:
    if profile not in _SHAPES:
        raise ValueError(
            f"foundations has no setting of a paper to run: {profile!r} is not among "
            f"{', '.join(_SHAPES)}"
        )
    return {
        variant: LanguageModelConfig(
            variant=variant,
            model=DecoderConfig(**_SHAPES[profile], **ffn),
            training=_TRAINING[profile],
            balance=balance,
            z=z,
            **_OTHERS[profile],
        )
        for variant, (ffn, balance, z) in _FOUNDATIONS.items()
    }


PARTS = {"foundations": _foundations}


def grid(part: str, profile: str) -> dict[str, LanguageModelConfig]:
    """The arms of a part of the book at a profile, by name, all with seed 0.

    ``foundations``: dense, mixture of experts and switch layers at equal active FLOPs, and both
    kinds of experts without the losses that keep them balanced.

    Raises:
        ValueError: When the part or the profile is unknown, or the part has no such profile.
    """
    if part not in PARTS:
        raise ValueError(unknown("part", part, PARTS))
    return PARTS[part](get_profile(profile).name)


# --- one run ------------------------------------------------------------------------------------


def run(
    config: LanguageModelConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> Record:
    """Train the model of `config` and measure it; the test text is read once, at the end.

    Weights and record stay in the run's folder of the cache, where a killed run also continues
    from its last checkpoint; a run that ended is loaded.

    Args:
        config: What to run.
        progress: Show a bar.
        device: Where to run it.

    Returns:
        The record. Losses are in nats per token. Of models with experts, ``load`` gives each
        layer's share of choices per expert on the validation text, ``load entropy`` its entropy
        over that of an even load, ``max share`` its largest share.

    Raises:
        DataError: When the text is missing or damaged, or what is held out is shorter than a
            context.
        TrainingError: When the loss is no longer finite.
    """
    return _run_in(run_directory(run, config), config, progress, device)


def _run_in(folder: Path, config, progress: bool, device: str | torch.device) -> Record:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(folder.with_name(folder.name + ".run.lock")):
        if (ended := agreed(_ended(folder))) is not None:
            return ended
        model, record = _train(
            config, folder / "checkpoints", progress, resolve_device(str(device))
        )
        if not is_first_process():
            return record
        save_weights(model, folder / "model.safetensors")
        record.save(folder / "record.json")  # last: its presence says that the run ended
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def _ended(folder: Path) -> Record | None:
    if not (folder / "model.safetensors").exists():
        return None
    try:
        return Record.load(folder / "record.json")
    except (FileNotFoundError, RecordError):
        return None


def _train(
    config: LanguageModelConfig, checkpoints: Path, progress: bool, device: torch.device
) -> tuple[Decoder, Record]:
    started = time.perf_counter()
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) != config.processes:
        raise ValueError(
            f"{config.variant} is a run of {config.processes} processes and this is one of "
            f"{processes}: start it with torchrun --nproc-per-node {config.processes}"
        )
    text = _text(config)
    context = config.model.context
    for split in ("validation", "test"):  # told before hours of training
        if (tokens := text.details[split]["tokens"]) <= context:
            raise DataError(
                f"the {split} text of {text.source} has {tokens} tokens, which is not one sequence "
                f"of the context of {context} and the token after it; give more text, or a shorter "
                "context"
            )
    seed_everything(config.seed)
    model = Decoder(config.model)
    if config.guidance is not None:
        start_guides(model, config.guidance)
    windows = partial(evaluation_batches, batch=4 * config.batch, context=context)

    def evaluate(model):
        measured = measure(model, windows(text.validation, limit=config.curve_tokens))
        return {"validation loss": measured["loss"]}

    training = time.perf_counter()
    result = train(
        model,
        data_order(config, batches(text.train, config.batch, context, config.seed)),
        partial(_loss, balance=config.balance, z=config.z),
        config.training,
        evaluate=evaluate,
        on_step=_follow(config.guidance) if config.guidance is not None else None,
        checkpoint=checkpoints,
        device=device,
        tokens_per_step=config.tokens_per_step,
        progress=progress,
        description=f"{config.variant}, seed {config.seed}",
    )
    trained = time.perf_counter()
    metrics = {
        "tokens": config.tokens,
        "epochs": config.tokens / len(text.train),
        "tokens per second": config.tokens / result.seconds,
        "unigram loss": unigram_loss(text),
    }
    cost = count(config.model)
    metrics |= {
        "parameters": cost.parameters,
        "active parameters": cost.active_parameters,
        "FLOPs per token": cost.flops,
        "tokens per parameter": config.tokens / cost.parameters,
        "training FLOPs": training_flops(config),
        "loss spikes": loss_spikes(result.curves["loss"]["value"]),
    }
    for split, tokens in (("validation", text.validation), ("test", text.test)):
        measured = measure(model, windows(tokens, limit=config.final_tokens))
        loss = measured.pop("loss")
        metrics |= {
            f"{split} loss": loss,
            f"{split} perplexity": float(np.exp(loss)),
            f"{split} bits per byte": bits_per_byte(loss, text.bytes_per_token(split)),
        }
        if split == "validation":
            metrics |= measured
    # a killed run's earlier pieces are in the result's seconds
    around = training - started + time.perf_counter() - trained
    provenance = Provenance.here(seconds=result.seconds + around, device=device)
    return model, Record.of(
        config, metrics=metrics, curves=_gather(result.curves), provenance=provenance
    )


def _text(config: LanguageModelConfig) -> Text:
    tokens = config.text_tokens or config.fresh_steps * config.tokens_per_step
    return load_text(config.source, vocabulary=config.model.vocabulary, tokens=tokens)


def data_order(config: LanguageModelConfig, batch: Callable[[int], T]) -> Callable[[int], T]:
    """The data of each micro-batch: after the fresh data, a repeated phase begins from the start.

    A function of the index alone, so that resuming inside the repeat is exact too. Explained in
    ``book/structured-ffn/03-self-guided-training``.

    Args:
        config: Of the run.
        batch: The fresh data of the n-th micro-batch, counted over all processes.

    Returns:
        The data of the n-th micro-batch of the run, likewise.
    """
    if config.guidance is None or not config.guidance.repeat:
        return batch
    # every process counts the micro-batches of all
    fresh = config.fresh_steps * config.training.accumulate * config.processes
    return lambda index: batch(index if index < fresh else index - fresh)


def start_guides(model: Decoder, guidance: Guidance) -> None:
    """Give the structured layers of a model their guides, in place.

    Explained in ``book/structured-ffn/03-self-guided-training``.

    Args:
        model: Without guides.
        guidance: Which guides, and whether BlockShuffle's start as in the paper's released code.
    """
    guide(
        model,
        steps=guidance.steps,
        schedule=guidance.schedule,
        stochastic=guidance.stochastic,
    )
    if guidance.released_start:
        for module in model.modules():
            if isinstance(module, SelfGuided) and isinstance(module.layer, BlockShuffle):
                v, u = module.layer.v, module.layer.u
                with torch.no_grad():
                    module.guide.copy_(torch.block_diag(*u) @ torch.block_diag(*v))


def _follow(guidance: Guidance) -> Callable[[torch.nn.Module, int], None]:
    """After each step: the guides' part falls, and they leave at the end of their phase."""

    def on_step(model: torch.nn.Module, step: int) -> None:
        if step < guidance.steps:
            advance(model)  # on resuming, the checkpoint's own count comes after this
        else:
            release(model)

    return on_step


def _loss(
    model: torch.nn.Module, batch: tuple[Tensor, Tensor], *, balance: float, z: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The next token's cross-entropy, and with experts the two losses of their routers."""
    with collect_routing(model) as routings:
        cross_entropy = model(*batch)
    if not routings:
        return cross_entropy, {"train loss": cross_entropy}
    even = torch.stack([load_balancing_loss(routing) for routing in routings]).mean()
    small = torch.stack([router_z_loss(routing) for routing in routings]).mean()
    numbers = {"train loss": cross_entropy, "balance loss": even, "z-loss": small}
    for layer, routing in enumerate(routings):
        numbers[f"routing entropy/layer {layer}"] = routing_entropy(routing)
        for expert, share in enumerate(load(routing)):
            numbers[f"load, layer {layer}/expert {expert}"] = share
    return cross_entropy + balance * even + z * small, numbers


def _gather(curves: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Curves named ``curve/line`` become lines of one curve over the same steps; six digits do."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for name, curve in curves.items():
        name, _, line = name.partition("/")
        lines = gathered.setdefault(name, {"step": curve["step"]})
        lines[line or "value"] = [float(f"{value:.6g}") for value in curve["value"]]
    return gathered


# --- what is measured ---------------------------------------------------------------------------


def loss_spikes(losses: Sequence[float], *, window: int = 20, height: float = 0.25) -> int:
    """How often a training loss jumped: times that it rose above what it had been.

    Explained in ``book/structured-ffn/02-training-dynamics``.

    Args:
        losses: Points of a training curve, nats per token.
        window: Points before each that it is compared with, by their median.
        height: Nats above that median from which on a point is part of a spike.

    Returns:
        The number of spikes; points in a row are one.

    Raises:
        ValueError: When `window` is below 1.

    >>> loss_spikes([3.0, 2.9, 2.8, 4.0, 3.9, 2.7, 2.6, 3.5, 2.5])
    2
    """
    return len(spike_starts(losses, window=window, height=height))


def spike_starts(
    losses: Sequence[float], *, window: int = 20, height: float = 0.25
) -> tuple[int, ...]:
    """At which points of a training curve the spikes begin that `loss_spikes` counts.

    Args:
        losses: As in `loss_spikes`.
        window: As in `loss_spikes`.
        height: As in `loss_spikes`.

    Raises:
        ValueError: When `window` is below 1.

    >>> spike_starts([3.0, 2.9, 2.8, 4.0, 3.9, 2.7, 2.6, 3.5, 2.5])
    (3, 7)
    """
    if window < 1:
        raise ValueError(f"window is {window}; compare with at least 1 point before each")
    high = [
        bool(i and loss > np.median(losses[max(0, i - window) : i]) + height)
        for i, loss in enumerate(losses)
    ]
    pairs = zip([False, *high], high, strict=False)
    return tuple(i for i, (earlier, now) in enumerate(pairs) if now and not earlier)


def load(routing: Routing) -> Tensor:
    """The share of all choices that each expert got, (E,)."""
    chosen = routing.indices if routing.mask is None else routing.indices[routing.mask]
    counts = torch.bincount(chosen.flatten(), minlength=routing.probabilities.shape[-1])
    return counts / counts.sum().clamp(min=1)


def routing_entropy(routing: Routing) -> Tensor:
    """Mean entropy of the probabilities over that of an even choice: 0 certain, 1 undecided."""
    p = routing.probabilities.float()
    entropy = torch.special.entr(p).sum(-1).mean()
    return entropy / torch.log(torch.tensor(float(p.shape[-1])))


@torch.no_grad()
def measure(model: torch.nn.Module, pairs) -> dict:
    """Mean cross-entropy over batches of inputs and targets, and how the experts were used.

    Args:
        model: A `Decoder`, in eval mode afterwards.
        pairs: Batches of (inputs, targets), both (B, T) int64.

    Returns:
        ``loss`` in nats per token; with experts also ``load`` (a list per layer: share of choices
        by expert), ``load entropy`` and ``max share`` and ``routing entropy`` (a number per
        layer), and ``balance loss`` (of the whole text, mean over the layers; 1 when even).

    Raises:
        ValueError: When there is no target.
    """
    model.eval()
    device = next(model.parameters()).device
    total = tokens = 0
    chosen, believed, entropies = [], [], []
    for inputs, targets in pairs:
        inputs, targets = inputs.to(device), targets.to(device)
        with collect_routing(model) as routings:
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        total, tokens = total + float(loss), tokens + targets.numel()
        weight = targets.numel()
        chosen.append([weight * load(r).double() for r in routings])
        believed.append([weight * r.probabilities.mean(0).double() for r in routings])
        entropies.append([weight * routing_entropy(r).double() for r in routings])
    if not tokens:
        raise ValueError("there is no target to measure; give a text of two tokens or more")
    measured: dict = {"loss": total / tokens}
    if chosen and chosen[0]:
        shares = torch.stack([torch.stack(parts) for parts in chosen]).sum(0) / tokens
        mean = torch.stack([torch.stack(parts) for parts in believed]).sum(0) / tokens
        unsure = torch.stack([torch.stack(parts) for parts in entropies]).sum(0) / tokens
        experts = shares.shape[1]
        spread = torch.special.entr(shares).sum(1) / np.log(experts)
        measured |= {
            "load": shares.tolist(),
            "load entropy": spread.tolist(),
            "max share": shares.max(1).values.tolist(),
            "routing entropy": unsure.tolist(),
            "balance loss": float((experts * (shares * mean).sum(1)).mean()),
        }
    return measured


_PIECE = 2**24  # tokens


def unigram_loss(text: Text) -> float:
    """Validation loss in nats per token of a model that only knows how frequent each token is."""
    counts = np.ones(text.vocabulary)
    for start in range(0, len(text.train), _PIECE):  # bincount widens what it counts
        counts += np.bincount(text.train[start : start + _PIECE], minlength=text.vocabulary)
    return float(-np.log(counts / counts.sum())[text.validation[1:]].mean())


# --- a trained model, and its routing -----------------------------------------------------------


def trained_model(
    config: LanguageModelConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> tuple[Decoder, Text, Record]:
    """The model of a run with its text and record: from the cache, trained now if it is not there.

    Args:
        config: Of the run.
        progress: Show a bar while training.
        device: Where to train and to put the model.

    Returns:
        The model in eval mode, the text, and the record of the run that made these weights.
    """
    folder = run_directory(run, config)
    record = _run_in(folder, config, progress, device)
    model = Decoder(config.model)
    load_weights(model, folder / "model.safetensors")
    text = _text(config)
    return model.to(resolve_device(str(device))).eval(), text, record


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token of a text went to.

    Attributes:
        tokens: The T tokens as strings.
        layers: The blocks with experts, from 0.
        indices: (layers, T, k) experts chosen.
        weights: (layers, T, k) their weights.
        probabilities: (layers, T, E).
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    indices: Tensor
    weights: Tensor
    probabilities: Tensor


@torch.no_grad()
def trace_routing(model: Decoder, text: Text, passage: str) -> RoutingTrace:
    """The routing of a passage through every layer with experts.

    Args:
        model: With experts.
        text: Whose tokeniser the model was trained with.
        passage: Some words; what is longer than the context is cut off.

    Raises:
        ValueError: When the passage is empty or the model has no experts.
    """
    layers = tuple(i for i, block in enumerate(model.blocks) if isinstance(block.ffn, MoE))
    if not layers:
        raise ValueError(f"the model's feed-forward layers are {model.config.ffn}: no experts")
    ids = text.encode(passage)[: model.config.context]
    if not ids:
        raise ValueError("the passage is empty; give some words")
    model.eval()
    device = next(model.parameters()).device
    with collect_routing(model) as routings:
        model(torch.tensor([ids], device=device))
    return RoutingTrace(
        tokens=tuple(text.decode([token]) for token in ids),
        layers=layers,
        indices=torch.stack([r.indices for r in routings]).cpu(),
        weights=torch.stack([r.weights for r in routings]).cpu(),
        probabilities=torch.stack([r.probabilities for r in routings]).cpu(),
    )
