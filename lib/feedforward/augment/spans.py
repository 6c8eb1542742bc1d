"""Text with protected spans, and edits that move the spans' offsets and never their words."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from operator import index

# A word begins with a letter or a digit and goes on to white space or punctuation, so that
# combining marks and joined emoji stay with it; one apostrophe, hyphen or full stop may join two
# parts (don't, well-known, U.S), a comma two digits.
_STOP = r"\s!-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u205e\u2e00-\u2e7f\u3000-\u303f\uff01-\uff0f"
_WORD = re.compile(rf"[^\W_][^{_STOP}]*(?:(?:['’.-](?=[^\W_])|,(?=\d))[^{_STOP}]+)*")

Span = tuple[int, int]
Edit = tuple[int, int, str]


class SpanError(ValueError):
    """A span outside its text, or an edit that would change one: says which."""


@dataclass(frozen=True)
class ProtectedText:
    """A text and the stretches of it that no augmentation may change.

    The spans may come in any order, touch, overlap and lie in one another; an edited text holds
    them in the same order. Offsets count characters (code points), the end is exclusive.

    Args:
        text: Any text.
        spans: ``(start, end)`` of each protected stretch, at least one character long.

    Raises:
        SpanError: A span is empty, reversed or not inside the text.

    >>> protected = ProtectedText("Paris is in France.", ((0, 5), (12, 18)))
    >>> edited = protected.edit([(6, 8, "lies"), (9, 9, "today ")])
    >>> edited.text, edited.spans, edited.protected
    ('Paris lies today in France.', ((0, 5), (20, 26)), ('Paris', 'France'))

    Book: ``book/robust-qa/02-augmentation``.
    """

    text: str
    spans: tuple[Span, ...] = ()

    def __post_init__(self):
        spans = tuple((index(start), index(end)) for start, end in self.spans)
        length = len(self.text)
        for start, end in spans:
            if not 0 <= start < end <= length:
                raise SpanError(
                    f"span ({start}, {end}) does not lie in a text of {length} characters: "
                    "0 <= start < end <= length is needed"
                )
        object.__setattr__(self, "spans", spans)

    @property
    def protected(self) -> tuple[str, ...]:
        """What the spans hold, in their order."""
        return tuple(self.text[start:end] for start, end in self.spans)

    @property
    def blocks(self) -> list[Span]:
        """The protected stretches from left to right, those that touch or overlap made one.

        >>> ProtectedText("abcdefgh", ((5, 6), (0, 3), (1, 2), (3, 4))).blocks
        [(0, 4), (5, 6)]
        """
        blocks: list[Span] = []
        for start, end in sorted(self.spans):
            if blocks and start <= blocks[-1][1]:
                blocks[-1] = (blocks[-1][0], max(end, blocks[-1][1]))
            else:
                blocks.append((start, end))
        return blocks

    @property
    def free(self) -> list[Span]:
        """The stretches between the blocks, from left to right, none of them empty."""
        blocks = self.blocks
        starts = [0, *(end for _, end in blocks)]
        ends = [*(start for start, _ in blocks), len(self.text)]
        return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]

    def edit(self, edits: Iterable[Edit]) -> "ProtectedText":
        """The text with stretches replaced, and the spans moved to where their words now are.

        Text inserted where a span begins stands before it, where a span ends after it.

        Args:
            edits: ``(start, end, replacement)`` in offsets of this text, in any order;
                ``start == end`` inserts, an empty replacement deletes.

        Raises:
            SpanError: Edits overlap, leave the text or reach into a span.
        """
        edits = sorted(edits, key=lambda edit: edit[:2])
        pieces, cursor = [], 0
        for start, end, replacement in edits:
            if not cursor <= start <= end <= len(self.text):
                raise SpanError(
                    f"edit ({start}, {end}, {replacement!r}) overlaps the edit before it or does "
                    f"not lie in a text of {len(self.text)} characters"
                )
            pieces += self.text[cursor:start], replacement
            cursor = end
        pieces.append(self.text[cursor:])

        ends = [end for _, end, _ in edits]
        shifts = [0, *accumulate(len(new) - (end - start) for start, end, new in edits)]
        spans = []
        for start, end in self.spans:
            before = bisect_right(ends, start)  # edits that lie wholly before the span
            if before < len(edits) and edits[before][0] < end:
                raise SpanError(
                    f"edit {edits[before]} reaches into the protected span ({start}, {end}), "
                    f"{self.text[start:end]!r}"
                )
            spans.append((start + shifts[before], end + shifts[before]))
        return ProtectedText("".join(pieces), tuple(spans))

    def rewrite(self, function: Callable[[str], str]) -> "ProtectedText":
        """Every unprotected stretch replaced by what `function` makes of it.

        >>> ProtectedText("red and blue", ((4, 7),)).rewrite(str.upper).text
        'RED and BLUE'
        """
        return self.edit([(a, b, function(self.text[a:b])) for a, b in self.free])


def free_words(protected: ProtectedText) -> list[Span]:
    """The places of the words that no protected span touches, from left to right.

    >>> free_words(ProtectedText("Well-known U.S. don't-s, café: 1,000!", ((11, 12),)))
    [(0, 10), (16, 23), (25, 29), (31, 36)]
    """
    free, blocks, at = [], protected.blocks, 0
    for word in _WORD.finditer(protected.text):
        start, end = word.span()
        while at < len(blocks) and blocks[at][1] <= start:
            at += 1
        if at == len(blocks) or end <= blocks[at][0]:
            free.append((start, end))
    return free


def whole_words(protected: ProtectedText) -> list[Span]:
    """The blocks of a text, each widened to the words that it touches.

    >>> whole_words(ProtectedText("a playwright's plays", ((2, 6),)))
    [(2, 14)]
    """
    free = set(free_words(protected))
    touched = (word.span() for word in _WORD.finditer(protected.text))
    widened = [*protected.spans, *(span for span in touched if span not in free)]
    return ProtectedText(protected.text, tuple(widened)).blocks


@dataclass(frozen=True)
class Rewritten:
    """What an augmenter that can fail made of a text.

    Attributes:
        text: The new text; a span less for each protected stretch that was lost.
        repaired: How many spans stand in words that were put back as they were, because the
            augmented ones had lost them.
    """

    text: ProtectedText
    repaired: int = 0
