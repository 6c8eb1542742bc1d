"""Sentences of a text by a rule, without a model."""

import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence

from feedforward.augment.spans import Span

# full stops that end no sentence, beside those of single capitals (J. S. Bach)
_TITLES = """
    adm al approx ave bros ca capt cf co col corp dept dr e.g ed eds est esp fig figs fr gen gov hon
    i.e inc jan feb mar apr jun jul aug sep sept oct nov dec jr lt ltd maj messrs mr mrs ms mt no
    nos op pp prof pt rep rev sen sgt sr st v viz vol vols vs
"""
_ABBREVIATIONS = frozenset(_TITLES.split())
_LINE = re.compile(r"[\n\r\v\f\x85\u2028\u2029]+")
# possessive, and only at the first of a run: else fifty thousand dots are tried from each of them
_END = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’»)\]]*(?=\s+["'“‘«(\[¿¡]*(\S))|(?<![。！？])[。！？]++["'”’」』）]*"""
)
_LAST_WORD = re.compile(r"([^\W\d_](?:[^\W\d_]|\.(?=[^\W\d_]))*)$")


def split_sentences(text: str, *, keep: Sequence[Span] = (), longest: int = 100) -> list[Span]:
    """The places of a text's sentences, without the white space around them.

    A sentence ends at a line's end, and at ``.``, ``!``, ``?`` or ``…`` (closing quotes and
    brackets included) before white space and something other than a small letter, unless the full
    stop belongs to a single capital or a common abbreviation. What is longer than `longest` words
    is parted after a comma, semicolon or colon of its second half, or where it gets too long:
    translation models cut longer input off.

    Args:
        text: Any text.
        keep: Places that no end may part, sorted and apart from each other.
        longest: Words of a sentence at most, unless a kept place is longer.

    >>> text = 'Dr. J. Smith left. "Why?" she asked.\\nNo answer'
    >>> [text[start:end] for start, end in split_sentences(text)]
    ['Dr. J. Smith left.', '"Why?" she asked.', 'No answer']
    """
    cuts = {edge for line in _LINE.finditer(text) for edge in line.span()}
    for end in _END.finditer(text):
        following = end[1]
        if following and following.islower():
            continue
        if end[0] == "." and (
            last := _LAST_WORD.search(text, max(0, end.start() - 30), end.start())
        ):
            word = last[1]
            if word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isupper()):
                continue
        cuts.add(end.end())

    starts = [start for start, _ in keep]

    def parts_a_kept_place(cut: int) -> bool:
        at = bisect_left(starts, cut) - 1  # the last one that begins before the cut
        return at >= 0 and cut < keep[at][1]

    free = [0, *(cut for cut in sorted(cuts) if not parts_a_kept_place(cut)), len(text)]
    sentences = []
    for low, high in itertools.pairwise(free):
        words = [(m.start() + low, m.end() + low) for m in re.finditer(r"\S+", text[low:high])]
        while len(words) > longest:
            pauses = [
                i for i in range(longest, longest // 2, -1) if text[words[i - 1][1] - 1] in ",;:"
            ]
            places = [*pauses, *range(longest, 0, -1), *range(longest + 1, len(words))]
            at = next((i for i in places if not parts_a_kept_place(words[i][0])), len(words))
            sentences.append((words[0][0], words[at - 1][1]))
            words = words[at:]
        if words:
            sentences.append((words[0][0], words[-1][1]))
    return [_whole(span, keep, starts) for span in sentences]


def _whole(span: Span, keep: Sequence[Span], starts: list[int]) -> Span:
    """A sentence with the white space that kept places at its edges begin or end with."""
    start, end = span
    before = bisect_left(starts, start) - 1
    if before >= 0 and start < keep[before][1]:
        start = keep[before][0]
    last = bisect_left(starts, end) - 1
    if last >= 0 and end < keep[last][1]:
        end = keep[last][1]
    return start, end
