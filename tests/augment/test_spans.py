import random

import pytest

from feedforward.augment.spans import ProtectedText, SpanError


def test_text_inserted_at_an_edge_stays_outside():
    text = ProtectedText("abcdef", ((2, 4),))
    edited = text.edit([(2, 2, "<"), (4, 4, ">"), (0, 1, ""), (5, 6, "long")])
    assert edited.text == "b<cd>elong"
    assert edited.protected == ("cd",)


def test_touching_nested_and_equal_spans_keep_their_order_and_words():
    text = ProtectedText("0123456789", ((4, 6), (2, 4), (2, 6), (3, 5), (4, 6)))
    edited = text.edit([(0, 2, ""), (6, 6, "xyz")])
    assert edited.protected == text.protected
    assert edited.spans == ((2, 4), (0, 2), (0, 4), (1, 3), (2, 4))
    # between two spans that only touch there is room; a third across them closes it
    assert ProtectedText("abcd", ((0, 2), (2, 4))).edit([(2, 2, "-")]).text == "ab-cd"
    with pytest.raises(SpanError, match="reaches into the protected span"):
        text.edit([(4, 4, "-")])


@pytest.mark.parametrize("edit", [(1, 3, "x"), (2, 3, ""), (3, 3, "x"), (0, 6, ""), (3, 5, "x")])
def test_an_edit_never_reaches_into_a_span(edit):
    with pytest.raises(SpanError, match="reaches into"):
        ProtectedText("abcdef", ((2, 4),)).edit([edit])


def test_edits_that_overlap_or_leave_the_text_are_refused():
    text = ProtectedText("abcdef")
    for edits in ([(0, 3, ""), (2, 4, "")], [(-1, 2, "")], [(3, 7, "")], [(4, 2, "")]):
        with pytest.raises(SpanError, match="overlaps the edit before it or does not lie in"):
            text.edit(edits)


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (3, 2), (4, 7)])
def test_a_span_must_lie_in_its_text(span):
    with pytest.raises(SpanError, match="text of 6 characters"):
        ProtectedText("abcdef", (span,))


def test_free_and_blocks_share_the_text():
    text = ProtectedText("abcdefgh", ((6, 8), (0, 2), (2, 3)))
    assert text.blocks == [(0, 3), (6, 8)]
    assert text.free == [(3, 6)]
    assert ProtectedText("").free == [] == ProtectedText("").blocks
    assert text.rewrite(lambda part: "").text == "abcgh"


def test_random_edits_against_character_by_character():
    """Each character of a span is marked; after the edits the marks are where the spans say."""
    rng = random.Random(0)
    alphabet = "ab \r\n.é\u0301👩\u200d👩🏽"
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 40)))
        spans = []
        for _ in range(rng.randint(0, 4)):
            start = rng.randrange(len(text))
            spans.append((start, rng.randint(start + 1, len(text))))
        protected = ProtectedText(text, tuple(spans))
        edits, expected = [], []
        for i in range(len(text) + 1):
            if not any(a < i < b for a, b in spans) and rng.random() < 0.3:
                new = "".join(rng.choices(alphabet, k=rng.randint(0, 3)))
                edits.append((i, i, new))
                expected += [(None, c) for c in new]
            if i < len(text):
                free = not any(a <= i < b for a, b in spans)
                if free and rng.random() < 0.3:
                    edits.append((i, i + 1, "XY"))
                    expected += [(None, "X"), (None, "Y")]
                else:
                    expected.append((i, text[i]))
        rng.shuffle(edits)
        edited = protected.edit(edits)
        assert edited.text == "".join(c for _, c in expected)
        marks = [i for i, _ in expected]
        for old, new in zip(spans, edited.spans, strict=True):
            assert marks[new[0] : new[1]] == list(range(*old))
