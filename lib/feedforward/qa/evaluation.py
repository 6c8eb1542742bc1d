"""What a reader is measured by: F1 and exact match by domain, and how its experts are used."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.encoders import check_length
from feedforward.layers.experts import MoE, collect_routing
from feedforward.layers.routing import Routing
from feedforward.qa.decoding import best_answers, read
from feedforward.qa.features import Features, prepare
from feedforward.qa.metrics import ItemScores, item_scores
from feedforward.qa.model import ReaderMixture, ReaderOutput, encoders_of
from feedforward.qa.schema import Question
from feedforward.training import bf16_products


@dataclass(frozen=True)
class Decoding:
    """Which spans may be an answer, and how those of several windows are compared.

    Args:
        min_tokens: Tokens of an answer at least; 2 is the released code's defect.
        max_tokens: Tokens of an answer at most.
        normalize: Compare by log probability; False: by the sum of logits, as released.

    Raises:
        ValueError: When no length is allowed.
    """

    min_tokens: int = 1
    max_tokens: int = 30
    normalize: bool = True

    def __post_init__(self):
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"answers have from {self.min_tokens} to {self.max_tokens} tokens; give at least "
                "1, and a minimum that is not above the maximum"
            )


class Usage:
    """How the experts of one layer were used by real tokens.

    Of the gate over a mixture's encoders the tokens are windows, and choices its shares.

    Args:
        experts: Number of experts E.

    Attributes:
        tokens: Number of real tokens.
        chosen: (E,) choices that fell on each expert.
        believed: (E,) sum of the router's probabilities.
        entropy: Sum of the probabilities' entropies, in nats.
        dropped: Choices that no expert had room for.
        crowded: As many of them as would have been dropped in the same places without padding.
        lost: Of weights that sum to 1 for each token: how much of them was dropped.
    """

    def __init__(self, experts: int):
        self.tokens, self.entropy, self.lost = 0, 0.0, 0.0
        self.dropped, self.crowded = 0, 0
        self.chosen = torch.zeros(experts, dtype=torch.float64)
        self.believed = torch.zeros(experts, dtype=torch.float64)

    def add(
        self,
        probabilities: Tensor,
        chosen: Tensor,
        dropped: int = 0,
        places: float = math.inf,
        lost: float = 0.0,
    ) -> None:
        """Count some tokens.

        Args:
            probabilities: (T, E) of the router.
            chosen: (E,) their choices.
            dropped: How many of them were dropped.
            places: How many choices each expert had room for, those of padding included.
            lost: How much of their weights was dropped.
        """
        p = probabilities.double()
        self.tokens += len(p)
        self.believed += p.sum(0).cpu()
        self.entropy += float(torch.special.entr(p).sum())
        self.chosen += chosen.double().cpu()
        self.dropped += dropped
        self.lost += lost
        self.crowded += int((chosen - places).clamp(min=0).sum())

    def __add__(self, other: "Usage") -> "Usage":
        total = Usage(len(self.chosen))
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total

    @property
    def load(self) -> list[float]:
        """The share of all choices that each expert got."""
        return (self.chosen / self.chosen.sum().clamp(min=1)).tolist()

    @property
    def largest_share(self) -> float:
        """The share of the tokens that the busiest expert was chosen by."""
        return float(self.chosen.max()) / max(1, self.tokens)

    @property
    def routing_entropy(self) -> float:
        """Mean entropy of the probabilities over that of an even choice: 0 certain, 1 undecided."""
        if len(self.chosen) == 1:
            return 0.0
        return self.entropy / max(1, self.tokens) / float(np.log(len(self.chosen)))

    @property
    def dropped_share(self) -> float:
        """The share of the choices that were dropped."""
        return self.dropped / max(1.0, float(self.chosen.sum()))

    @property
    def lost_weight(self) -> float:
        """What a token lost of its weight, on average."""
        return self.lost / max(1, self.tokens)

    @property
    def crowded_share(self) -> float:
        """The share of the choices that the same places would have dropped without padding."""
        return self.crowded / max(1.0, float(self.chosen.sum()))


@dataclass(frozen=True, eq=False)
class Measured:
    """What a reader did with some questions.

    Attributes:
        items: The scores of each question.
        usage: By domain, of each layer with experts in the order in which they run.
    """

    items: ItemScores
    usage: Mapping[str, Sequence[Usage]]


def pool(usages: Iterable[Sequence[Usage]]) -> list[Usage]:
    """Sum, layer by layer."""
    total: list[Usage] = []
    for layers in usages:
        total = [a + b for a, b in zip(total, layers, strict=True)] if total else list(layers)
    return total


class Watched(nn.Module):
    """A reader that counts how its experts are used; runs in bf16 where asked.

    Args:
        reader: From ``build_reader``.
        bf16: Compute under autocast.
        padded: Pad windows first, as `pad` does; None: leave them.
    """

    def __init__(self, reader: nn.Module, *, bf16: bool, padded: tuple[int, int] | None = None):
        super().__init__()
        self.reader, self.bf16, self.padded = reader, bf16, padded
        self.usage: list[Usage] = []
        self.train(reader.training)

    def forward(self, **inputs: Tensor) -> ReaderOutput:
        """Read windows and count."""
        length = inputs["input_ids"].shape[1]
        if self.padded is not None:
            inputs = pad(inputs, *self.padded)
        device = inputs["input_ids"].device
        with (
            bf16_products(device, self.bf16),
            torch.autocast(device.type, torch.bfloat16, enabled=self.bf16),
            collect_routing(self.reader) as routings,
        ):
            output = self.reader(**inputs)
        real = inputs["attention_mask"].bool().flatten()
        if not self.usage:
            sizes = [routing.probabilities.shape[1] for routing in routings]
            sizes += [] if output.gate is None else [output.gate.shape[1]]
            self.usage = [Usage(size) for size in sizes]
        for usage, routing in zip(self.usage, routings, strict=False):
            probabilities, indices = routing.probabilities[real], routing.indices[real]
            chosen = torch.bincount(indices.flatten(), minlength=probabilities.shape[1])
            weights = routing.weights[real]
            dropped, lost = int((weights == 0).sum()), float((1 - weights.double().sum(1)).sum())
            usage.add(probabilities, chosen, dropped, self._places(routing), lost)
        if output.gate is not None:
            self.usage[-1].add(output.gate, output.gate.sum(0))
        return ReaderOutput(
            output.start_logits[:, :length], output.end_logits[:, :length], output.gate
        )

    def _places(self, routing: Routing) -> float:
        """How many choices each expert had room for in a forward pass, as ``MoE`` counts them."""
        factor = self.reader.capacity[0 if self.reader.training else 1]
        if factor is None:
            return math.inf
        (served, k), experts = routing.indices.shape, routing.probabilities.shape[1]
        if routing.mask is not None:
            served = int(routing.mask.sum())
        return math.ceil(factor * served * k / experts)


def pad(inputs: Mapping[str, Tensor], length: int, token: int) -> dict[str, Tensor]:
    """The inputs of windows padded to one length, as the released code does; labels stay.

    Args:
        inputs: As ``Features.batch`` gives them.
        length: Tokens of a window at least.
        token: What to pad with.
    """
    more = max(0, length - inputs["input_ids"].shape[1])
    return {
        name: F.pad(value, (0, more), value=token if name == "input_ids" else 0)
        if value.dim() == 2
        else value
        for name, value in inputs.items()
    }


def by_domain(
    questions: Iterable[Question], tokenizer, *, length: int, stride: int
) -> dict[str, Features]:
    """The windows of some questions, domain by domain."""
    sets: dict[str, list[Question]] = {}
    for question in questions:
        sets.setdefault(question.domain, []).append(question)
    return {
        domain: prepare(own, tokenizer, length=length, stride=stride)
        for domain, own in sets.items()
    }


def measure(
    reader: nn.Module,
    features: Mapping[str, Features],
    *,
    decoding: Decoding = Decoding(),
    batch: int = 32,
    bf16: bool = False,
    padded: tuple[int, int] | None = None,
) -> Measured:
    """Answer questions and count how the experts are used meanwhile.

    Explained in ``book/robust-qa/01-task-and-gap`` and ``book/robust-qa/03-readers-with-experts``.

    Args:
        reader: From ``build_reader``; its mode is restored.
        features: Windows by domain, from `by_domain`.
        decoding: Which spans may be answers.
        batch: Windows at a time.
        bf16: Compute under autocast.
        padded: Length and token to pad windows with; None: to the longest of a batch.

    Raises:
        ValueError: When a window is longer than the reader's encoder reads.
    """
    longest = [0 if padded is None else padded[0]]
    longest += [int(own.lengths.max(initial=0)) for own in features.values()]
    check_windows(reader, max(longest))
    predictions: dict[str, str] = {}
    usage = {}
    for domain, own in features.items():
        watched = Watched(reader, bf16=bf16, padded=padded)
        options = {"min_tokens": decoding.min_tokens, "max_tokens": decoding.max_tokens}
        logits = read(watched, own, batch=batch)
        predictions |= best_answers(own, *logits, normalize=decoding.normalize, **options)
        usage[domain] = watched.usage
    asked = [question for own in features.values() for question in own.questions]
    return Measured(item_scores(predictions, asked), usage)


def check_windows(reader: nn.Module, tokens: int) -> None:
    """Refuse windows that are longer than a reader's encoder reads.

    Args:
        reader: From ``build_reader``.
        tokens: Of the longest window.

    Raises:
        ValueError: When it is longer than that.
    """
    for encoder in encoders_of(reader):
        cure = "make windows of no more by the length of prepare or by_domain"
        check_length(encoder, tokens, "the longest window", cure)


def expert_layers(reader: nn.Module) -> tuple[str, ...]:
    """Where a reader's experts are, in the order in which they run.

    ``"head"``, ``"encoder layer 2"`` or ``"stacked layer 0"``, layers counted from 0, and
    ``"gate"`` of a mixture of whole encoders; none in a dense reader.
    """
    if isinstance(reader, ReaderMixture):
        return ("gate",)
    names = []
    for name, module in reader.named_modules():
        if isinstance(module, MoE):
            numbers = [part for part in name.split(".") if part.isdigit()]
            place = "encoder" if name.startswith("encoder.") else "stacked"
            names.append(f"{place} layer {numbers[0]}" if numbers else "head")
    return tuple(names)


def chosen_by_half(
    points: Sequence[np.ndarray], domains: Sequence[str], *, splits: int = 100
) -> tuple[float, float]:
    """What choosing by a half of the questions gives on that half, and on the other half.

    The half that chooses takes the point with its best mean. Both halves take turns, so that it
    does not matter which is harder, and the result is the mean over many ways to halve each
    domain. The difference is what a score is too high by when it is reported on the questions
    that chose. Explained in ``book/robust-qa/04-audit``.

    Args:
        points: The scores of each question (N,) at each point of training.
        domains: Of the N questions.
        splits: Ways to halve them.

    Returns:
        The mean score on the half that chose, and on the other one.
    """
    table, rng = np.stack(points), np.random.default_rng(0)
    domains = np.array(domains)
    choosing, other = [], []
    for _ in range(splits):
        first = np.zeros(len(domains), dtype=bool)
        for domain in np.unique(domains):
            places = rng.permutation(np.flatnonzero(domains == domain))
            first[places[: len(places) // 2]] = True
        for half in (first, ~first):
            best = table[table[:, half].mean(1).argmax()]
            choosing.append(best[half].mean())
            other.append(best[~half].mean())
    return float(np.mean(choosing)), float(np.mean(other))
