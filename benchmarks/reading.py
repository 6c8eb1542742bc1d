"""Time reading side by side with the way of transformers' question answering example.

    python benchmarks/reading.py                            # all of it on one thread, some minutes
    python benchmarks/reading.py --only training --rounds 9 --json reading.json
    python benchmarks/reading.py --source hub:squad --only preparation

``training``: windows a second of one encoder with a linear map, on the same windows at the same
batch. Ours are steps as the book's runs take them: windows of like length in a batch, bfloat16
where the processor multiplies it, plain attention, no dropout. The example's are those of
``Trainer`` with its default settings, loader, optimizer and schedule: every window padded to the
full length, float32, dropout. The other two lines say how much of the difference these make.
``preparation``: windows with labels a second, against the example's function in ``datasets.map``
with two processes; wall time. ``decoding``: from logits to answers, windows a second. ``EDA``:
contexts of 100 words a second. A ratio above 1 means faster than the example.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch import nn

from feedforward.augment.eda import EDA
from feedforward.augment.spans import ProtectedText
from feedforward.files import atomic_write
from feedforward.memory import reuse_memory
from feedforward.qa.data import Question, load_questions
from feedforward.qa.decoding import best_answers
from feedforward.qa.features import Batches, Features, prepare
from feedforward.qa.model import ReaderConfig, load_encoder, load_tokenizer
from feedforward.qa.runs import QuestionAnsweringConfig, make_reader, reading_loss
from feedforward.qa.stages import Stage
from feedforward.records import Provenance, has_fast_bf16
from feedforward.timing import interleaved
from feedforward.training import TrainingConfig

BARS = {"training": 1.3, "preparation": 1.0, "decoding": 2000.0, "EDA": 2000.0}


# --- the example's way --------------------------------------------------------------------------


def example_features(batch: dict[str, list], *, tokenizer, length: int, stride: int) -> dict:
    """Padded windows with labels of a batch of questions, window by window as the example does."""
    made = tokenizer(
        [question.lstrip() for question in batch["question"]],
        batch["context"],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    owners = made.pop("overflow_to_sample_mapping")
    offsets = made.pop("offset_mapping")
    made["start_positions"], made["end_positions"] = [], []
    for window, places in enumerate(offsets):
        sides = made.sequence_ids(window)
        begin, end = batch["start"][owners[window]], batch["end"][owners[window]]
        first, last = sides.index(1), len(sides) - 1 - sides[::-1].index(1)
        if places[first][0] > begin or places[last][1] < end:
            first = last = 0  # [CLS]: the answer is not in this window
        else:
            while first <= last and places[first][0] <= begin:
                first += 1
            while places[last][1] >= end:
                last -= 1
            first, last = first - 1, last + 1
        made["start_positions"].append(first)
        made["end_positions"].append(last)
    return made


def as_table(questions: list[Question]) -> datasets.Dataset:
    """The columns that the example reads; of several answers the first."""
    return datasets.Dataset.from_dict(
        {
            "question": [q.question for q in questions],
            "context": [q.context for q in questions],
            "start": [q.answers[0].start for q in questions],
            "end": [q.answers[0].end for q in questions],
        }
    )


def mapped(table: datasets.Dataset, function: Callable, processes: int | None) -> datasets.Dataset:
    """What ``datasets.map`` makes of a table, never from its cache."""
    return table.map(
        function,
        batched=True,
        num_proc=processes,
        remove_columns=table.column_names,
        load_from_cache_file=False,
    )


def example_training(table: datasets.Dataset, args: argparse.Namespace) -> Callable[[], None]:
    """A function that trains some steps with the parts of ``Trainer``, in the order of its loop.

    Its own ``train`` would begin anew, with new moments and loaders, at each turn.
    """
    encoder = load_encoder(args.encoder)
    model = transformers.AutoModelForQuestionAnswering.from_config(encoder.config)
    settings = transformers.TrainingArguments(
        tempfile.mkdtemp(prefix="reading-"),
        per_device_train_batch_size=args.batch,
        max_steps=10_000,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=table)
    trainer.create_optimizer_and_scheduler(settings.max_steps)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    loader = itertools.chain.from_iterable(iter(trainer.get_train_dataloader, None))

    def steps() -> None:
        for batch in itertools.islice(loader, args.steps):
            trainer.training_step(model, batch)
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()

    return steps


# --- ours ---------------------------------------------------------------------------------------


def our_training(features: Features, args: argparse.Namespace, **changes) -> Callable[[], None]:
    """A function that trains some steps as the book's runs do; it keeps reader and optimizer."""
    stage = Stage("in-domain", TrainingConfig(steps=1, lr=5e-5), batch=args.batch)
    config = QuestionAnsweringConfig(
        "benchmark",
        ReaderConfig(args.encoder),
        (stage,),
        dropout=changes.get("dropout", 0.0),
    )
    reader = make_reader(config).train()
    reader.encoder.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(reader.parameters(), lr=5e-5, fused=True)
    batches, numbers = Batches(features, args.batch, seed=0), itertools.count()
    bf16 = changes.get("bf16", has_fast_bf16("cpu"))

    def steps() -> None:
        for number in itertools.islice(numbers, args.steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = reading_loss(reader, batches(number), balance=0.0)
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


# --- what is timed ------------------------------------------------------------------------------


def training(questions: list[Question], tokenizer, args) -> Iterator[dict]:
    sizes = {"length": args.length, "stride": args.stride}
    features = prepare(questions, tokenizer, **sizes)
    function = partial(example_features, tokenizer=tokenizer, **sizes)
    runs = {
        "ours": our_training(features, args),
        "ours, dropout": our_training(features, args, dropout=None),
        "ours, float32": our_training(features, args, bf16=False),
        "example": example_training(mapped(as_table(questions), function, None), args),
    }
    times = interleaved(runs, device="cpu", rounds=args.rounds, least=args.rounds, turn=0.0)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        rate = args.steps * args.batch / seconds
        ratio = medians["example"] / seconds
        bar = BARS["training"] if name == "ours" else None
        yield row("training", name, rate, "windows/s", ratio, bar, ratio)


def preparation(questions: list[Question], tokenizer, args) -> Iterator[dict]:
    sizes = {"length": args.length, "stride": args.stride}
    table = as_table(questions)
    function = partial(example_features, tokenizer=tokenizer, **sizes)
    runs = {
        "ours": lambda: prepare(questions, tokenizer, **sizes),
        "example": lambda: mapped(table, function, 2),
    }
    medians = wall(runs, args.rounds)
    windows = len(prepare(questions, tokenizer, **sizes))
    for name, seconds in medians.items():
        ratio = medians["example"] / seconds
        bar = BARS["preparation"] if name == "ours" else None
        yield row("preparation", name, windows / seconds, "windows/s", ratio, bar, ratio)


def decoding(questions: list[Question], tokenizer, args) -> Iterator[dict]:
    features = prepare(questions, tokenizer, length=args.length, stride=args.stride)
    shape = 2, len(features), int(features.lengths.max())
    logits = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    seconds = wall({"ours": lambda: best_answers(features, *logits)}, args.rounds)["ours"]
    rate = len(features) / seconds
    yield row("decoding", "ours", rate, "windows/s", None, BARS["decoding"], rate)


def eda(questions: list[Question], tokenizer, args) -> Iterator[dict]:
    contexts = [ProtectedText(" ".join(q.context.split()[:100])) for q in questions]
    contexts = [text for text in contexts if len(text.text.split()) == 100][:500]
    augmenter, rng = EDA(), np.random.default_rng(0)
    runs = {"ours": lambda: [augmenter(text, rng) for text in contexts]}
    seconds = statistics.median(
        interleaved(runs, device="cpu", rounds=args.rounds, least=args.rounds)["ours"]
    )
    rate = len(contexts) / seconds
    yield row("EDA", "ours", rate, "contexts/s", None, BARS["EDA"], rate)


PARTS = {"training": training, "preparation": preparation, "decoding": decoding, "eda": eda}


def wall(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of wall time, turn and turn about: other processes do part of the work."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            if number:  # the first round only warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def row(part: str, name: str, rate: float, unit: str, ratio, bar, reached: float) -> dict:
    """One line of the table; `reached` is what the bar is about."""
    return {
        "part": part,
        "name": name,
        "rate": rate,
        "unit": unit,
        "ratio": ratio,
        "bar": bar,
        "holds": None if bar is None else reached >= bar,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--source", default="embedded", help="of the questions")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--encoder", default="embedded")
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="the default of Trainer")
    parser.add_argument("--steps", type=int, default=4, help="of training, in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    args = parser.parse_args(argv)
    for name in ("questions", "length", "batch", "steps", "rounds", "threads"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} takes a positive number")
    return args


def main(argv: list[str] | None = None) -> int:
    args, start = parse(argv), time.monotonic()
    torch.set_num_threads(args.threads)
    reuse_memory()  # as the programs of the library do: else taking pages is timed too
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.encoder)
    questions = list(load_questions(args.source).pooled("indomain_train"))
    every = max(1, len(questions) // args.questions)
    questions = questions[::every][: args.questions]
    rows = []
    print(f"{'part':<13}{'way':<15}{'rate':>12} {'unit':<11}{'of example':>11}{'bar':>9}")
    for name in args.only:
        for one in PARTS[name](questions, tokenizer, args):
            rows.append(one)
            ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}"
            bar = "" if one["bar"] is None else f"{one['bar']:g}{'' if one['holds'] else ' !'}"
            print(
                f"{one['part']:<13}{one['name']:<15}{one['rate']:>12,.1f} {one['unit']:<11}"
                f"{ratio:>11}{bar:>9}",
                flush=True,
            )
    provenance = Provenance.here(seconds=time.monotonic() - start)
    print(
        f"{provenance.device}, {provenance.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {provenance.seconds:.0f} s; ! a bar fails"
    )
    if args.json:
        with atomic_write(args.json, "w") as file:
            json.dump({"provenance": asdict(provenance), "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
