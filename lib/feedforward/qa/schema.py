"""The schema of question answering: a question, the passage that answers it, its answers.

What loads questions and what builds them, what makes windows of them and what scores them, all
speak of these.
"""

from dataclasses import dataclass

SPLITS = ("indomain_train", "indomain_val", "oodomain_train", "oodomain_val")


@dataclass(frozen=True, slots=True)
class Answer:
    """A stretch of a context that answers a question.

    Attributes:
        text: The stretch itself.
        start: Where it begins in the context, in characters (Unicode code points) from 0.
    """

    text: str
    start: int

    @property
    def end(self) -> int:
        """The first character behind the answer."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the passage that answers it, and all accepted answers.

    It is plain data; what is loaded from files was checked with `problems_of`, and
    `feedforward.qa.features` checks again before it makes labels.

    Attributes:
        id: Unique in its data set.
        question: As it is asked.
        context: The passage; every answer is a stretch of it.
        answers: All accepted answers, the preferred one first; none where they are not known.
        domain: The set it belongs to, for instance ``"squad"``.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    domain: str


def problems_of(question: Question) -> list[str]:
    """What is wrong with a question: an empty text, a span that does not match its context.

    Half a surrogate pair, in the id as well, cannot be written down as UTF-8 and is wrong, too.

    Several answers may be given, and they may overlap; each must stand where it says.

    >>> wrong = Question("1", "Who?", "It was Ada.", (Answer("Ada", 6),), "demo")
    >>> problems_of(wrong)
    ["answer 'Ada' is not at 6, where the context has ' Ad'; it stands at 7"]
    """
    found = []
    for name in ("id", "question", "context"):
        text = getattr(question, name)
        if not text.strip() and name != "id":
            found.append(f"the {name} is empty: write one, or remove the question")
        elif not _encodable(text):
            found.append(f"the {name} holds half a surrogate pair, which is no character")
    for answer in question.answers:
        text, start = answer.text, answer.start
        if not text.strip():
            found.append(f"the answer at {start} is empty: give the words of the context")
        elif start < 0 or answer.end > len(question.context):
            found.append(
                f"answer {_short(text)} from {start} to {answer.end} is outside the context of "
                f"{len(question.context)} characters{_elsewhere(question.context, text)}"
            )
        elif not question.context.startswith(text, start):
            there = _short(question.context[start : answer.end])
            found.append(
                f"answer {_short(text)} is not at {start}, where the context has {there}"
                f"{_elsewhere(question.context, text)}"
            )
    return found


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else f"{text[: width - 3]}...")


def _elsewhere(context: str, text: str) -> str:
    """Where the answer stands, counted in characters: often the offset was counted in bytes."""
    place = context.find(text)
    return f"; it stands at {place}" if place >= 0 else "; the context does not hold it"
