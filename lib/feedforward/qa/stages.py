"""What a reader is trained on, one stage after another: questions, their augmented copies, steps.

The robust question answering system trains in one stage on everything, or on the plentiful
questions of its own domains first and then on the few of the others (arXiv 2204.09598). Here the
runs that are compared take the same number of steps at the same batch: copies of questions are
other windows in the same number of steps, never more of them.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn

from feedforward.augment.back_translation import Apertium, BackTranslation, Marian, RoundTrip
from feedforward.augment.eda import EDA, StrippedEDA
from feedforward.augment.lexicon import Senses, wordnet
from feedforward.augment.questions import Augmented, augment_as_released, augment_questions
from feedforward.files import DataError
from feedforward.layers.experts import MoE
from feedforward.profiles import unknown
from feedforward.qa.data import Questions
from feedforward.qa.model import ReaderMixture
from feedforward.qa.schema import Question
from feedforward.training import TrainingConfig

_SPLITS = {
    "in-domain": ("indomain_train",),
    "out-of-domain": ("oodomain_train",),
    "all": ("indomain_train", "oodomain_train"),
}
# what Apertium calls the languages
_APERTIUM = {"es": "spa", "ca": "cat"}


@dataclass(frozen=True)
class Augmentation:
    """Copies of out-of-domain questions, whose answers stay where they can be found.

    Explained in ``book/robust-qa/02-augmentation``.

    Args:
        kind: ``"eda"`` (synonyms in the place of words) or ``"back-translation"``.
        copies: Of each question; one of back translation, which is not random.
        strength: The share of words that EDA replaces, its alpha.
        senses: Whose words are synonyms, as ``feedforward.augment.lexicon.wordnet`` takes it.
        language: There and back: ``"es"`` or ``"ca"``, with Marian also others such as ``"fr"``.
        engine: ``"apertium"``, a program without a network, or ``"marian"``, models of the hub.
        released: The released code's form: EDA of a text without case and punctuation, in which
            the answer is looked for again; translation of the pieces between the answers.

    Raises:
        ValueError: When a value is not allowed.
    """

    kind: Literal["eda", "back-translation"]
    copies: int = 1
    strength: float = 0.3
    senses: Senses = "all"
    language: str = "es"
    engine: Literal["apertium", "marian"] = "apertium"
    released: bool = False

    def __post_init__(self):
        for name in ("kind", "senses", "engine"):
            allowed = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in allowed:
                raise ValueError(unknown(name, getattr(self, name), allowed))
        if self.copies < 1 or not 0 <= self.strength <= 1:
            raise ValueError(
                f"copies is {self.copies} and strength {self.strength}; give at least 1 copy and a "
                "share from 0 to 1"
            )
        if self.kind == "back-translation" and self.copies > 1:
            raise ValueError(
                f"copies is {self.copies}: back translations into one language are all the same; "
                "give an augmentation for each language"
            )
        if self.engine == "apertium" and self.language not in _APERTIUM:
            raise ValueError(unknown("language of Apertium", self.language, _APERTIUM))

    @property
    def replaces(self) -> bool:
        """Whether the copies, with a stripped one of each, stand in place of the questions."""
        return self.kind == "eda" and self.released

    def __call__(self, questions: Iterable[Question], seed: int) -> Augmented:
        """The copies of some questions, and what became of their answers.

        Raises:
            MissingLexicon: The package with the synonyms is not installed.
            EngineError: The engine of translation is not installed, or failed.
        """
        if self.kind == "eda":
            lexicon = wordnet(senses=self.senses)
            if self.released:
                augmenter = StrippedEDA(synonyms=self.strength, lexicon=lexicon)
                return augment_as_released(
                    questions, copies=self.copies, seed=seed, augmenter=augmenter
                )
            augmenter = EDA(
                synonyms=self.strength, insertions=0, swaps=0, deletions=0, lexicon=lexicon
            )
        else:
            augmenter = BackTranslation(self._engine(), cut_at_answers=self.released)
        return augment_questions(questions, augmenter, copies=self.copies, seed=seed)

    def _engine(self) -> RoundTrip:
        if self.engine == "apertium":
            other = _APERTIUM[self.language]
            return RoundTrip(Apertium(f"eng-{other}"), Apertium(f"{other}-eng"))
        there, back = f"en-{self.language}", f"{self.language}-en"
        return RoundTrip(*(Marian(f"Helsinki-NLP/opus-mt-{way}") for way in (there, back)))


@dataclass(frozen=True)
class Stage:
    """One stage of training: on which questions, for how long, and which weights it leaves.

    Args:
        questions: ``"in-domain"``, ``"out-of-domain"``, or ``"all"`` of the training questions.
        training: Steps, learning rate and the rest of the loop.
        batch: Windows a step.
        per_set: Questions of each set at most, drawn by `subsample`; None for all.
        augmentations: Of the out-of-domain questions; their copies stand beside them, in the
            released form of EDA in their place.
        balance: Weight of the load-balancing loss, averaged over the layers with experts. A gate
            over whole encoders, a mixture's, has none.
        frozen_experts: Keep the experts as the stage finds them; routers and the rest learn.
        choice: Which weights the stage leaves: the ``"last"``, or the best by F1 of those after
            every ``training.evaluate_every`` steps, on a part of the stage's own training
            questions that is not trained on (``"held-out"``), or, as the released code does, on
            the very questions that are reported (``"reported"``).
        held_out: The share of each set's passages that is held out to choose with.
        epochs: Passes over the windows of all but the copies, which then decide the steps;
            ``training.steps`` is what they come to at one window a question.

    Raises:
        ValueError: When a value is out of range or does not go with another.
    """

    questions: Literal["in-domain", "out-of-domain", "all"]
    training: TrainingConfig
    batch: int = 16
    per_set: int | None = None
    augmentations: tuple[Augmentation, ...] = ()
    balance: float = 0.01
    frozen_experts: bool = False
    choice: Literal["last", "held-out", "reported"] = "last"
    held_out: float = 0.2
    epochs: int | None = None

    def __post_init__(self):
        for name in ("questions", "choice"):
            allowed = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in allowed:
                raise ValueError(unknown(name, getattr(self, name), allowed))
        for name in ("batch", "per_set", "epochs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        object.__setattr__(self, "augmentations", tuple(self.augmentations))
        if self.augmentations and self.questions == "in-domain":
            raise ValueError("augmentations are of out-of-domain questions; this stage has none")
        if self.balance < 0:
            raise ValueError(f"balance is {self.balance}; it must not be negative")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; give a share between 0 and 1")
        if self.choice != "last" and self.training.evaluate_every is None:
            raise ValueError(
                f"choice is {self.choice!r} among the weights at evaluations, and there are none: "
                "set evaluate_every of the training"
            )


# --- which questions ----------------------------------------------------------------------------


def subsample(questions: Iterable[Question], count: int | None) -> tuple[Question, ...]:
    """Some questions of a set, spread over as many passages as there are.

    One question of every passage before a second one of any. Which of them the SHA-256 of the
    questions' ids decides, and which passages where there are more than needed, that of the
    passages' texts: the same for every run.

    Args:
        questions: Of one set.
        count: How many; None for all.

    >>> asked = [Question(f"{p}{i}", "Who?", f"Text {p}", (), "demo") for p in "ab" for i in "123"]
    >>> sorted(question.context for question in subsample(asked, 2))
    ['Text a', 'Text b']
    """
    by_context: dict[str, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: _digest(question.id)):
        by_context[question.context].append(question)
    # sorted by passage, then one of each in turn
    rows = [by_context[context] for context in sorted(by_context, key=_digest)]
    turns = itertools.zip_longest(*rows)
    spread = (question for turn in turns for question in turn if question is not None)
    return tuple(itertools.islice(spread, count))


def split_off(
    questions: Iterable[Question], share: float
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The questions of a set to train on, and those to hold out, which share no passage.

    Args:
        questions: Of one set.
        share: Of the passages to hold out: at least one, and never all.

    Raises:
        DataError: When all questions are on one passage.
    """
    questions = tuple(questions)
    contexts = sorted({question.context for question in questions}, key=lambda c: _digest(f"-{c}"))
    if len(contexts) < 2:
        raise DataError(
            f"the {len(questions)} questions of {questions[0].domain if questions else 'a set'!r} "
            "are on one passage: none can be held out to choose weights with. Give more, or "
            "choice='last'."
        )
    held = set(contexts[: min(len(contexts) - 1, max(1, round(share * len(contexts))))])
    parts: tuple[list, list] = ([], [])
    for question in questions:
        parts[question.context in held].append(question)
    return tuple(parts[0]), tuple(parts[1])


@dataclass(frozen=True)
class StageQuestions:
    """What a stage works with.

    Attributes:
        plain: The questions to train on, as they are in the data.
        train: Those to train on, with augmented copies.
        held_out: Those to choose weights with; none without need.
        reports: For each augmentation, what became of the answers.
    """

    plain: tuple[Question, ...]
    train: tuple[Question, ...]
    held_out: tuple[Question, ...]
    reports: tuple[dict[str, Any], ...]


def stage_questions(stage: Stage, data: Questions, seed: int) -> StageQuestions:
    """Draw and augment the questions of a stage. It reads the training splits alone.

    Args:
        stage: Which questions.
        data: From where.
        seed: Of the augmentation.

    Raises:
        DataError: When there are no such questions.
        MissingLexicon: When synonyms are wanted and not installed.
        EngineError: When a translation is wanted and its engine is not installed or failed.
    """
    plain, train, held_out, reports = [], [], [], []
    for split in _SPLITS[stage.questions]:
        own = []
        for questions in data[split].values():
            chosen = subsample(questions, stage.per_set)
            if stage.choice == "held-out":
                chosen, held = split_off(chosen, stage.held_out)
                held_out += held
            own += chosen
        plain += own
        if split == "indomain_train" or not any(a.replaces for a in stage.augmentations):
            train += own
        if split == "oodomain_train":
            for augmentation in stage.augmentations:
                made = augmentation(own, seed)
                train += made.questions
                report = asdict(made.report)
                reports.append(report | {"not_made": len(report["not_made"])})
    if not plain:
        raise DataError(f"{data.source} has no {stage.questions} questions to train on")
    return StageQuestions(tuple(plain), tuple(train), tuple(held_out), tuple(reports))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# --- frozen experts -----------------------------------------------------------------------------


def expert_parameters(reader: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a reader's experts, routers and gates left out."""
    if isinstance(reader, ReaderMixture):
        yield from reader.readers.parameters()
    for module in reader.modules():
        if isinstance(module, MoE):
            weights = (module.w_in, module.b_in, module.w_out, module.b_out)
            yield from (weight for weight in weights if weight is not None)
