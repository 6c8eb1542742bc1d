import itertools
import random
import time

import pytest

from feedforward.augment.sentences import split_sentences


def sentences(text, **options):
    return [text[start:end] for start, end in split_sentences(text, **options)]


@pytest.mark.parametrize(
    "expected",
    [
        ["He came.", "She left!", "Why?", "Nobody knew…"],
        ["Dr. Smith met Mr. J. R. Ewing at St. Paul's on Jan. 5.", "They talked."],
        ['"Stop!" he said.', "(He meant it.)", "“Now.”", "Then he went."],
        ["It cost 3.5 million.", "In 1999 the U.S. won vs. the rest, i.e. Them."],
        ["no capital here. so no end", "A new line ends it"],
        ["¿Qué?", "¡Sí!", "Él vino.", "Été fini."],
        ["彼は来た。", "彼女は去った。"],
        ["...", "And then."],
        ["one"],
        [],
    ],
)
def test_what_ends_a_sentence(expected):
    text = "\n".join(expected) if "A new line ends it" in expected else " ".join(expected)
    assert sentences(text) == expected
    assert sentences(f" \r\n{text}\r\n\r\n") == expected


def test_kept_places_are_never_parted():
    text = "He read Who? What? by Mr. Xu. Then\nhe slept."
    start = text.index("Who?")
    assert sentences(text, keep=[(start, start + 10)])[0] == "He read Who? What? by Mr. Xu."
    assert sentences(text, keep=[(start, text.index("he slept") + 2)]) == [text]
    assert sentences("a\n b\n c", keep=[(0, 3)]) == ["a\n b", "c"]
    assert sentences("a \n b", keep=[(0, 2)]) == ["a ", "b"]


def test_long_sentences_are_parted_after_a_pause():
    words = [f"w{i}" for i in range(250)]
    words[70] += ","
    parts = sentences(" ".join(words))
    assert [len(part.split()) for part in parts] == [71, 100, 79]
    assert " ".join(parts).split() == words
    whole = " ".join(words)
    assert [len(p.split()) for p in sentences(whole, keep=[(0, len(whole))])] == [250]
    kept = [(whole.index("w60"), whole.index("w130") + 4)]
    assert [len(p.split()) for p in sentences(whole, keep=kept)] == [60, 100, 90]


@pytest.mark.parametrize(
    "run", ["." * 50_000, "?!" * 25_000, "。" * 50_000], ids=["dots", "asks", "wide"]
)
def test_a_long_run_of_ends_is_read_once(run):
    began = time.process_time()
    assert sentences(f"He came{run} She left.")[-1].endswith("She left.")
    assert time.process_time() - began < 2


def test_random_texts_lose_nothing():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab A.?!,\n\r \u2028\"'()é👩\u200d9", k=rng.randint(0, 80)))
        keep, at = [], 0
        while at < len(text) - 2 and rng.random() < 0.6:
            start = rng.randrange(at, len(text) - 1)
            keep.append((start, rng.randint(start + 1, len(text))))
            at = keep[-1][1] + 1
        found = split_sentences(text, keep=keep, longest=4)
        assert found == sorted(found)
        for (_, end), (start, _) in itertools.pairwise(found):
            assert end <= start
        covered = set().union(*(range(*span) for span in found))
        assert all(c.isspace() for i, c in enumerate(text) if i not in covered)
        for start, end in keep:
            inside = {span for span in found if span[0] < end and start < span[1]}
            assert len(inside) == 1 or text[start:end].isspace()
            assert all(a <= start and end <= b for a, b in inside)
