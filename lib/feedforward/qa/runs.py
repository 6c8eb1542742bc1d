"""Train readers in stages and measure them alike, in their own domains and out of them.

``run`` makes a record of one configuration, ``trained_reader`` gives its reader for pictures and
examples. The weights after each stage lie in a folder of their own under the key of all that
decides them, so that runs with the same first stages share those weights.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.encoders import check_length, folder_sha256, outline
from feedforward.files import DataError, atomic_write, cache_directory
from feedforward.layers.cost import count
from feedforward.layers.experts import collect_routing
from feedforward.layers.routing import load_balancing_loss
from feedforward.profiles import resolve_device
from feedforward.qa.data import Questions, load_questions
from feedforward.qa.evaluation import (
    Decoding,
    Measured,
    Usage,
    by_domain,
    check_windows,
    chosen_by_half,
    expert_layers,
    measure,
    pad,
    pool,
)
from feedforward.qa.features import Batches, Features, prepare
from feedforward.qa.metrics import ItemScores
from feedforward.qa.model import (
    DroppedSecondRouter,
    ReaderConfig,
    ReaderMixture,
    build_reader,
    encoders_of,
    load_tokenizer,
    repeated_flops,
)
from feedforward.qa.schema import Question
from feedforward.qa.stages import Stage, expert_parameters, stage_questions, subsample
from feedforward.records import (
    Provenance,
    Record,
    RecordError,
    config_key,
    has_fast_bf16,
    plain_config,
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

EXPERIMENT = "robust-qa"
LOCAL = "FEEDFORWARD_DATA"
"""The source of runs on the reader's own data: the folder ``qa`` in ``$FEEDFORWARD_DATA``."""


@dataclass(frozen=True)
class QuestionAnsweringConfig:
    """Everything that decides the numbers of one run.

    Args:
        variant: The arm of the comparison.
        reader: Which reader; its seed gives way to the run's.
        stages: What it is trained on, one stage after another.
        seed: Of the weights that are not pretrained, the order of the windows and the augmentation.
        source: Of the questions, as ``load_questions`` takes it, or `LOCAL`.
        length: Tokens of a window at most.
        stride: Tokens that a window shares with the next of its passage.
        without_answer: What windows without an answer teach: ``"cls"``, or ``"drop"``: nothing.
        dropout: Of the pretrained encoder; None for its own.
        decoding: Which spans may be answers.
        scored_inside: In-domain questions of each set that are scored at most, drawn by
            ``subsample``; None for all.
        scored_outside: Likewise of each out-of-domain set.
        batch: Windows at a time when answering.
        repeats: How often the out-of-domain questions are answered by the same weights, each time
            with other random numbers.
        pad_to_length: Pad every window to `length`, as the released code does.
        experiment: The part of the book.

    Raises:
        ValueError: When a number is out of range, or there is no stage.
    """

    variant: str
    reader: ReaderConfig
    stages: tuple[Stage, ...]
    seed: int = 0
    source: str = "embedded"
    length: int = 256
    stride: int = 64
    without_answer: str = "cls"
    dropout: float | None = 0.0
    decoding: Decoding = field(default_factory=Decoding)
    scored_inside: int | None = None
    scored_outside: int | None = None
    batch: int = 32
    repeats: int = 1
    pad_to_length: bool = False
    experiment: str = EXPERIMENT

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("stages is empty; give at least one stage of training")
        for name in ("length", "batch", "repeats", "scored_inside", "scored_outside"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a share from 0 and below 1, or None")
        expertless = self.reader.form in ("dense", "dense-head")
        if expertless and any(stage.frozen_experts for stage in self.stages):
            raise ValueError(
                f"frozen_experts is set and a reader of the form {self.reader.form!r} has none"
            )

    def inputs(self) -> dict[str, str]:
        """Checksums of what the fields only name: data and an encoder in folders of one's own.

        Runs on other files under the same names are other runs. Where the source is `LOCAL` and
        nothing is set, there are no data, and what was recorded can be loaded.

        Raises:
            DataError: When the data are missing or damaged.
        """
        found = {}
        absent = self.source == LOCAL and not os.environ.get(LOCAL)
        if not (absent or self.source == "embedded" or self.source.startswith("hub:")):
            found["data"] = load_data(self.source).sha256
        if weights := folder_sha256(self.reader.encoder):
            found["encoder"] = weights
        return found


# --- one run ------------------------------------------------------------------------------------


def run(
    config: QuestionAnsweringConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> Record:
    """Train the reader of `config` stage by stage and measure it.

    The questions that are reported are answered once, after training, unless a stage chooses its
    weights by them; before it they are only counted. A run that was killed continues from its last
    checkpoint, or from the last stage that it or another run with the same stages ended.

    Args:
        config: What to run.
        progress: Show bars.
        device: Where to run it.

    Returns:
        The record. ``data`` begins the checksum of the questions, ``encoder`` that of an encoder
        from a folder. F1 and EM, in percent, are means over questions: ``in-domain F1``,
        ``out-of-domain EM`` and of each domain (``squad F1``); ``items`` has those of single
        questions. ``range of out-of-domain F1`` is over the repeated answers, whose mean the scores
        are; of a reader that drops second experts, ``dropped weight`` is what an out-of-domain
        token loses of its weights, which sum to 1, and the names that end in ``without dropping``
        are what the same reader gives when they stay. Of readers with experts: ``expert layers``
        names the layers; ``load`` gives by domain, and for ``all``, each layer's share of choices
        by expert; ``largest share`` is the share of real tokens that choose the busiest expert and
        ``routing entropy`` that of the router's probabilities over that of an even choice, both a
        mean over the layers; where the layers have a capacity, ``dropped share`` is the share of
        real tokens' choices that no expert had room for, and ``dropped share without padding`` what
        it would be of the same choices in the same places had no padding taken any; ``dropped share
        by domain`` has both of each layer. ``F1 on the choosing half`` and ``F1 on the other half``
        come with a stage that chooses by the reported questions. ``stages`` tells what each stage
        did, ``training seconds`` and ``training FLOPs`` are of all of them.

    Raises:
        DataError: When questions are missing, damaged, or without an answer to be scored by.
        MissingEncoder: When the encoder cannot be loaded.
        MissingLexicon: When synonyms are wanted and not installed.
        EngineError: When a translation is wanted and its engine is not installed or failed.
        TrainingError: When the loss is no longer finite.
        ValueError: When several processes run it, or its windows are longer than the encoder reads.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "readers are trained by one process: start the run without torchrun, several runs "
            "side by side with --shard"
        )
    device = resolve_device(str(device))
    folder = run_directory(run, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(folder.with_name(folder.name + ".run.lock")):
        try:
            return Record.load(folder / "record.json")
        except (FileNotFoundError, RecordError):
            pass
        check_length(
            outline(config.reader.encoder),
            config.length,
            "a window of this run",
            "set its length to no more",
        )
        data, tokenizer = load_data(config.source), load_tokenizer(config.reader.encoder)
        _check_questions(config, data)
        reader, logs = _Training(config, data, tokenizer, progress, device).after()
        record = _measured(config, data, tokenizer, reader.to(device), logs, device)
        record.save(folder / "record.json")
    return record


def trained_reader(
    config: QuestionAnsweringConfig, *, progress: bool = True, device: str | torch.device = "auto"
) -> tuple[nn.Module, Any, Questions, Record]:
    """The reader of a run: from the cache, trained now if it is not there.

    Args:
        config: Of the run.
        progress: Show bars while training.
        device: Where to train and to put the reader.

    Returns:
        The reader in evaluation mode, its tokenizer, all questions of the source, and the record
        of the run.
    """
    record = run(config, progress=progress, device=device)
    device = resolve_device(str(device))
    data, tokenizer = load_data(config.source), load_tokenizer(config.reader.encoder)
    reader, _ = _Training(config, data, tokenizer, progress, device).after()
    return reader.to(device).eval(), tokenizer, data, record


def load_data(source: str) -> Questions:
    """The questions of a source, kept for the next run of this process while they are the same.

    Args:
        source: As ``load_questions`` takes it, or `LOCAL`.

    Raises:
        DataError: When they are missing or damaged.
    """
    if source != LOCAL:
        return _load(source, _stamps(source))
    given = os.environ.get(LOCAL)
    folder = Path(given or ".").expanduser() / "qa"
    if not given or not folder.is_dir():
        state = f"is {given!r}, which has no folder qa" if given else "is not set"
        raise DataError(
            f"this run needs question answering data of your own and {LOCAL} {state}. Set it to a "
            "folder that holds qa/indomain_train, qa/indomain_val, qa/oodomain_train and "
            "qa/oodomain_val with one SQuAD file a set; the profile smoke needs none."
        )
    return _load(str(folder), _stamps(folder))


@lru_cache(maxsize=1)
def _load(source: str, stamps: tuple) -> Questions:
    return load_questions(source)


def _stamps(source: str | Path) -> tuple:
    """What changes with the files of a folder: their names, sizes and times."""
    files = sorted(Path(source).expanduser().glob("*/*"))
    return tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _scored(config: QuestionAnsweringConfig, data: Questions, split: str) -> tuple[Question, ...]:
    """The questions of a split that are scored."""
    limit = config.scored_inside if split == "indomain_val" else config.scored_outside
    sets = data[split].values()
    return tuple(question for own in sets for question in subsample(own, limit))


def _check_questions(config: QuestionAnsweringConfig, data: Questions) -> None:
    """Find before training what would end the run after it."""
    for split in ("indomain_val", "oodomain_val"):
        scored = _scored(config, data, split)
        if not scored:
            raise DataError(f"{data.source} has no questions in {split}, which a run reports")
        if unanswered := [question.id for question in scored if not question.answers]:
            raise DataError(
                f"{len(unanswered)} of the {len(scored)} questions of {split} have no accepted "
                f"answer, {unanswered[0]!r} the first, and cannot be scored: leave them out"
            )
    for stage in config.stages:
        plain = stage_questions(replace(stage, augmentations=()), data, config.seed).plain
        for augmentation in stage.augmentations:
            augmentation(plain[-1:], config.seed)  # a lexicon or an engine may be missing


def _measured(config, data, tokenizer, reader, logs, device) -> Record:
    """Answer the questions that are reported, and put everything into a record."""
    started = time.perf_counter()
    answer = _answering(config, tokenizer, device)
    # of readers that answer at random: the same numbers whether training ran just now or not
    seed_everything(0)
    inside = answer(reader, by_domain_of(config, _scored(config, data, "indomain_val"), tokenizer))
    windows = by_domain_of(config, _scored(config, data, "oodomain_val"), tokenizer)

    def repeated() -> list[Measured]:
        tries = []
        for number in range(config.repeats):
            seed_everything(number)
            tries.append(answer(reader, windows))
        return tries

    tries = repeated()
    outside = _mean_of([one.items for one in tries])
    metrics: dict[str, Any] = {"data": data.sha256[:16], "items": {}}
    if weights := folder_sha256(config.reader.encoder):
        metrics["encoder"] = weights[:16]
    for place, items in (("in-domain", inside.items), ("out-of-domain", outside)):
        for metric in ("f1", "em"):
            name = f"{place} {metric.upper()}"
            metrics[name] = float(getattr(items, metric).mean())
            values = items.by_question(metric)
            metrics["items"][name] = {key: _short(value) for key, value in values.items()}
        for domain, score in items.by_domain().items():
            metrics |= {f"{domain} F1": score.f1, f"{domain} EM": score.em}
    metrics["range of out-of-domain F1"] = _range_of_f1(tries)
    if config.reader.drop_second:
        with _without_dropping(reader):
            sober = repeated()
        metrics["range of out-of-domain F1 without dropping"] = _range_of_f1(sober)
        items = _mean_of([one.items for one in sober])
        for metric in ("f1", "em"):
            name = f"out-of-domain {metric.upper()} without dropping"
            metrics[name] = float(getattr(items, metric).mean())
    if layers := expert_layers(reader):
        metrics |= _usage(config, layers, inside, tries)
    for log in logs:
        if "points" in log and "reported" in log["choice"]:
            points = [np.array(values) for values in log["points"].values()]
            halves = chosen_by_half(points, outside.domains)
            names = ("F1 on the choosing half", "F1 on the other half")
            metrics |= dict(zip(names, halves, strict=True))
    metrics |= _costs(reader, logs)
    spent = time.perf_counter() - started + sum(log["seconds"] for log in logs)
    return Record.of(
        config,
        metrics=metrics,
        curves={
            f"stage {number}: {name}": curve
            for number, log in enumerate(logs, start=1)
            for name, curve in log["curves"].items()
        },
        provenance=Provenance.here(seconds=spent, device=device),
    )


def by_domain_of(
    config: QuestionAnsweringConfig, questions: Sequence[Question], tokenizer
) -> dict[str, Features]:
    """The windows of questions as a run reads them, domain by domain."""
    return by_domain(questions, tokenizer, length=config.length, stride=config.stride)


def _answering(config, tokenizer, device):
    """``answer(reader, features by domain) -> Measured`` as this run answers."""
    return partial(
        measure,
        decoding=config.decoding,
        batch=config.batch,
        bf16=_bf16(config, device),
        padded=_padded(config, tokenizer),
    )


def _bf16(config: QuestionAnsweringConfig, device: torch.device) -> bool:
    precision = config.stages[-1].training.precision
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def _padded(config: QuestionAnsweringConfig, tokenizer) -> tuple[int, int] | None:
    return (config.length, tokenizer.pad_token_id or 0) if config.pad_to_length else None


def _range_of_f1(tries: Sequence[Measured]) -> float:
    means = [one.items.f1.mean() for one in tries]
    return float(max(means) - min(means))


@contextlib.contextmanager
def _without_dropping(reader: nn.Module) -> Iterator[None]:
    """In the block, second experts stay."""
    routers = [module for module in reader.modules() if isinstance(module, DroppedSecondRouter)]
    for router in routers:
        router.dropping = False
    try:
        yield
    finally:
        for router in routers:
            router.dropping = True


def _mean_of(tries: Sequence[ItemScores]) -> ItemScores:
    """Question by question."""
    f1, em = (np.mean([getattr(one, name) for one in tries], axis=0) for name in ("f1", "em"))
    return replace(tries[0], f1=f1, em=em)


def _short(value: float) -> float | int:
    value = round(value, 4)
    return int(value) if value.is_integer() else value


def _usage(config, layers: Sequence[str], inside: Measured, tries: Sequence[Measured]) -> dict:
    """How the experts were used, over all answers."""
    domains: dict[str, Sequence[Usage]] = dict(inside.usage)
    for domain in tries[0].usage:
        domains[domain] = pool(one.usage[domain] for one in tries)
    every = pool(domains.values())
    by_name = {"all": every} | domains
    metrics = {
        "expert layers": list(layers),
        "load": {
            name: [[round(share, 6) for share in layer.load] for layer in usage]
            for name, usage in by_name.items()
        },
        "largest share": float(np.mean([layer.largest_share for layer in every])),
        "routing entropy": float(np.mean([layer.routing_entropy for layer in every])),
        "routing entropy by layer": {
            name: [round(layer.routing_entropy, 6) for layer in usage]
            for name, usage in by_name.items()
        },
    }
    if config.reader.drop_second:
        outside = pool(pool(one.usage.values()) for one in tries)
        metrics["dropped weight"] = float(np.mean([layer.lost_weight for layer in outside]))
    if config.reader.eval_capacity_factor is not None:
        metrics["dropped share"] = float(np.mean([layer.dropped_share for layer in every]))
        crowded = float(np.mean([layer.crowded_share for layer in every]))
        metrics["dropped share without padding"] = crowded
        metrics["dropped share by domain"] = {
            name: [
                [round(share, 6) for share in (layer.dropped_share, layer.crowded_share)]
                for layer in usage
            ]
            for name, usage in by_name.items()
        }
    return metrics


def _costs(reader: nn.Module, logs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cost = count(reader)
    encoders = encoders_of(reader)
    tokens, pairs = (sum(log[name] for log in logs) for name in ("tokens", "token pairs"))
    again = sum(map(repeated_flops, encoders))
    attention = sum(
        12 * encoder.config.num_hidden_layers * encoder.config.hidden_size for encoder in encoders
    )
    kept = ("questions", "windows", "steps", "tokens", "augmentation", "chosen step", "held out")
    return {
        "parameters": cost.parameters,
        "active parameters": cost.active_parameters,
        "training FLOPs": (cost.training_flops + 3 * again) * tokens + attention * pairs,
        "training seconds": sum(log["seconds"] for log in logs),
        "stages": [{name: log[name] for name in kept if name in log} for log in logs],
    }


# --- the stages ---------------------------------------------------------------------------------


class _Training:
    """The training of a run, stage after stage, each from the cache where it is there."""

    def __init__(self, config, data: Questions, tokenizer, progress: bool, device: torch.device):
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.progress, self.device = progress, device
        # other code never goes on with these weights
        self.code = run_directory(run, config).name.rpartition("-")[2]

    def folder(self, stages: int) -> Path:
        """Where the weights after so many stages lie: under all that decides them."""
        plain = plain_config(self.config)
        names = ("length", "stride", "without_answer", "dropout", "pad_to_length", "seed")
        decisive = {name: plain[name] for name in names}
        decisive["stages"] = plain["stages"][:stages]
        decisive["reader"] = plain["reader"] | {"seed": None}
        decisive["data"] = self.data.sha256
        decisive["encoder"] = folder_sha256(self.config.reader.encoder)
        if any(stage.choice != "last" for stage in self.config.stages[:stages]):
            decisive |= {name: plain[name] for name in ("decoding", "batch")}
        if any(stage.choice == "reported" for stage in self.config.stages[:stages]):
            decisive["scored_outside"] = plain["scored_outside"]
        key = f"{config_key(decisive, 'stages')}-{self.code}"
        return cache_directory("runs", self.config.experiment, "stages", key)

    def after(self, stages: int | None = None) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The reader after so many stages, by default all, and what each of them did."""
        stages = len(self.config.stages) if stages is None else stages
        if not stages:
            seed_everything(self.config.seed)
            return make_reader(self.config), []
        folder = self.folder(stages)
        folder.mkdir(parents=True, exist_ok=True)
        with run_lock(folder.with_name(folder.name + ".lock")):
            if (logs := self._ended(folder)) is not None:
                reader = make_reader(self.config)
                load_weights(reader, folder / "model.safetensors")
                return reader, logs
            reader, logs = self.after(stages - 1)
            logs.append(self._train(reader, stages - 1, folder))
            save_weights(reader, folder / "model.safetensors")
            # last: its presence says that the stage ended
            with atomic_write(folder / "stages.json", "w") as file:
                json.dump(logs, file)
            for name in ("checkpoints", "choice"):
                shutil.rmtree(folder / name, ignore_errors=True)
        return reader, logs

    def _ended(self, folder: Path) -> list[dict[str, Any]] | None:
        if not (folder / "model.safetensors").exists():
            return None
        try:
            return json.loads((folder / "stages.json").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _train(self, reader: nn.Module, number: int, folder: Path) -> dict[str, Any]:
        config, stage = self.config, self.config.stages[number]
        questions = stage_questions(stage, self.data, config.seed)
        windows = partial(
            prepare,
            tokenizer=self.tokenizer,
            length=config.length,
            stride=config.stride,
            without_answer=config.without_answer,
        )
        features = windows(questions.train)
        batches = Batches(features, stage.batch, config.seed)
        training = stage.training
        if stage.epochs is not None:
            originals = Batches(windows(questions.plain), stage.batch, config.seed)
            training = replace(training, steps=stage.epochs * originals.steps_per_epoch)
        # on a processor PyTorch's fused kernel takes half again as long to train in bfloat16
        # (256 tokens, measured with 2.13), and half as long to answer
        fused = encoders_of(reader)[0].config._attn_implementation
        quick = "eager" if self.device.type == "cpu" else fused
        chooser = None
        if stage.choice != "last":
            asked = questions.held_out
            if stage.choice == "reported":
                asked = _scored(config, self.data, "oodomain_val")
            answer = _answering(config, self.tokenizer, self.device)
            held = by_domain_of(config, asked, self.tokenizer)

            def scores() -> np.ndarray:
                with _attention(reader, fused):
                    return answer(reader, held).items.f1

            chooser = _Chooser(folder / "choice", scores)
        padded = _padded(config, self.tokenizer)
        seed_everything(config.seed)
        frozen = list(expert_parameters(reader)) if stage.frozen_experts else []
        for parameter in frozen:
            parameter.requires_grad_(False)
        with _attention(reader, quick):
            result = train(
                reader,
                batches if padded is None else lambda step: pad(batches(step), *padded),
                partial(reading_loss, balance=stage.balance),
                training,
                evaluate=chooser,
                on_step=chooser.follow if chooser else None,
                checkpoint=folder / "checkpoints" if _checkpoints(training) else None,
                device=self.device,
                progress=self.progress,
                description=f"{config.variant}, seed {config.seed}, stage {number + 1}",
            )
        for parameter in frozen:
            parameter.requires_grad_(True)
        log: dict[str, Any] = {
            "questions": len(questions.train),
            "windows": len(features),
            "steps": training.steps,
            "seconds": result.seconds,
            "choice": stage.choice,
            "augmentation": list(questions.reports),
            "curves": _gather(result.curves),
            **_tokens(batches, training.steps, 0 if padded is None else config.length),
        }
        if chooser:
            log |= {
                "held out": len(questions.held_out),
                "points": chooser.points,
                "chosen step": chooser.best,
            }
            load_weights(reader, chooser.weights)
        return log


def _tokens(batches: Batches, steps: int, least: int) -> dict[str, int]:
    """Tokens of all steps, padding included, and pairs of tokens that attend to one another."""
    tokens = pairs = 0
    for step in range(steps):
        windows = batches.windows(step)
        length = max(least, int(batches.features.lengths[windows].max()))
        tokens += len(windows) * length
        pairs += len(windows) * length**2
    return {"tokens": tokens, "token pairs": pairs}


def _checkpoints(training: TrainingConfig) -> bool:
    """Whether a killed stage goes on; a short one may rather begin again than write them."""
    return bool(training.checkpoint_every_steps or training.checkpoint_every_seconds)


class _Chooser:
    """Scores the reader at points of its training and keeps the weights of the best of them.

    Args:
        folder: Of its own; what is in it is continued.
        scores: Gives the F1 of each question that chooses.
    """

    def __init__(self, folder: Path, scores: Callable[[], np.ndarray]):
        self.folder, self.scores = folder, scores
        self.weights = folder / "best.safetensors"
        self.step = 0
        self.points: dict[str, list[float]] = {}
        if (folder / "points.json").exists():
            self.points = json.loads((folder / "points.json").read_text())

    def follow(self, reader: nn.Module, step: int) -> None:
        """Note the number of steps done."""
        self.step = step

    def __call__(self, reader: nn.Module) -> dict[str, float]:
        f1 = self.scores()
        # a run that goes on from a checkpoint comes by later points again
        self.points = {step: own for step, own in self.points.items() if int(step) < self.step}
        self.points[str(self.step)] = f1.tolist()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.best == self.step:
            save_weights(reader, self.weights)
        with atomic_write(self.folder / "points.json", "w") as file:
            json.dump(self.points, file)
        return {"F1 that chooses": float(f1.mean())}

    @property
    def best(self) -> int:
        """The number of steps with the highest mean F1, the fewest of them."""
        return int(max(self.points, key=lambda step: (np.mean(self.points[step]), -int(step))))


def make_reader(config: QuestionAnsweringConfig) -> nn.Module:
    """The untrained reader of a run, in evaluation mode."""
    reader = build_reader(replace(config.reader, seed=config.seed))
    if config.dropout is not None:
        for encoder in encoders_of(reader):
            for module in encoder.modules():
                if isinstance(module, nn.Dropout):
                    module.p = config.dropout
    return reader


@contextlib.contextmanager
def _attention(reader: nn.Module, implementation: str) -> Iterator[None]:
    """Compute the encoders' attention this way in the block."""
    encoders = encoders_of(reader)
    before = encoders[0].config._attn_implementation
    for encoder in encoders:
        encoder.set_attn_implementation(implementation)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.set_attn_implementation(before)


def reading_loss(
    reader: nn.Module, batch: dict[str, Tensor], *, balance: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch: cross-entropies of the answer's first and last token, their mean.

    Padding cannot be an answer. With experts, ``load_balancing_loss`` of each layer, averaged over
    the layers, is added with its weight.

    Args:
        reader: From ``build_reader``.
        batch: As ``Features.batch`` gives it.
        balance: That weight.

    Returns:
        The loss, and the numbers that become curves of training.
    """
    inputs = {name: value for name, value in batch.items() if not name.endswith("_positions")}
    with collect_routing(reader) as routings:
        output = reader(**inputs)
    real = batch["attention_mask"].bool()
    loss = (
        sum(
            F.cross_entropy(
                logits.float().masked_fill(~real, torch.finfo(torch.float32).min),
                batch[f"{side}_positions"],
            )
            for side, logits in (("start", output.start_logits), ("end", output.end_logits))
        )
        / 2
    )
    numbers = {"reading loss": loss}
    if output.gate is not None:
        for expert, share in enumerate(output.gate.mean(0)):
            numbers[f"load, gate/expert {expert}"] = share
    if not routings:
        return loss, numbers
    even = torch.stack([load_balancing_loss(routing) for routing in routings]).mean()
    numbers["balance loss"] = even
    for layer, routing in enumerate(routings):
        experts = routing.probabilities.shape[1]
        counts = torch.bincount(routing.indices[real.flatten()].flatten(), minlength=experts)
        for expert, share in enumerate(counts / counts.sum()):
            numbers[f"load, layer {layer}/expert {expert}"] = share
    return loss + balance * even, numbers


def _gather(curves: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Curves named ``curve/line`` become lines of one curve over the same steps; six digits do."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for name, curve in curves.items():
        name, _, line = name.partition("/")
        lines = gathered.setdefault(name, {"step": curve["step"]})
        lines[line or "value"] = [float(f"{value:.6g}") for value in curve["value"]]
    return gathered


# --- routing, token by token --------------------------------------------------------------------


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token of a window went to.

    Attributes:
        tokens: The T tokens as strings, [CLS], the question and the special tokens included.
        passage: Which of them are the passage's.
        domain: Of the question.
        layers: Where the experts are, as ``expert_layers`` names them.
        indices: (layers, T, k) experts chosen.
        weights: (layers, T, k) their weights.
        probabilities: (layers, T, E).
    """

    tokens: tuple[str, ...]
    passage: slice
    domain: str
    layers: tuple[str, ...]
    indices: Tensor
    weights: Tensor
    probabilities: Tensor


@torch.no_grad()
def trace_routing(
    reader: nn.Module, tokenizer, question: Question, *, length: int = 256, stride: int = 64
) -> RoutingTrace:
    """The routing of a question and its passage through every layer with experts.

    Of a passage in several windows the first that holds an answer is taken, else the first. There
    is no padding. Explained in ``book/robust-qa/03-readers-with-experts``.

    Args:
        reader: With experts for single tokens; in evaluation mode afterwards.
        tokenizer: Its own.
        question: With its passage.
        length: Tokens of a window at most.
        stride: Tokens that two windows share.

    Raises:
        ValueError: When the reader has no experts for single tokens, or the window is longer than
            its encoder reads.
    """
    layers = expert_layers(reader)
    if not layers or isinstance(reader, ReaderMixture):
        raise ValueError(
            f"{type(reader).__name__} has no experts for single tokens: give one of the form "
            "'moe-head', 'switch' or 'stacked'"
        )
    features = prepare([question], tokenizer, length=length, stride=stride)
    window = int(features.answerable.argmax())
    check_windows(reader, int(features.lengths[window]))
    inputs = features.batch([window])
    device = next(reader.parameters()).device
    inputs = {k: v.to(device) for k, v in inputs.items() if not k.endswith("_positions")}
    reader.eval()
    with collect_routing(reader) as routings:
        reader(**inputs)
    begin = int(features.lead[window])
    return RoutingTrace(
        tokens=tuple(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())),
        passage=slice(begin, begin + int(features.size[window])),
        domain=question.domain,
        layers=layers,
        indices=torch.stack([r.indices for r in routings]).cpu(),
        weights=torch.stack([r.weights for r in routings]).cpu(),
        probabilities=torch.stack([r.probabilities for r in routings]).cpu(),
    )
