import random
import re

import numpy as np
import pytest

from feedforward.augment.eda import EDA, STOP_WORDS, StrippedEDA, strip
from feedforward.augment.lexicon import Lexicon
from feedforward.augment.spans import ProtectedText, free_words

LEXICON = Lexicon(
    {"big": ["large", "huge"], "dog": ["hound"], "old": ["aged"], "river": ["stream", "brook"]}
)
TEXT = "The big dog (an OLD one) swam: the river was old, and Big dogs like a river."
OFF = {"synonyms": 0, "insertions": 0, "swaps": 0, "deletions": 0}


def eda(**shares):
    return EDA(**{**OFF, **shares}, lexicon=LEXICON)


def run(augmenter, text, spans=(), seed=0):
    return augmenter(ProtectedText(text, spans), np.random.default_rng(seed))


def test_synonyms_take_the_case_and_leave_everything_else():
    text = run(eda(synonyms=1), TEXT).text
    pattern = r"The (large|huge) hound \(an AGED one\) swam: the (stream|brook) was aged, "
    assert re.fullmatch(pattern + r"and (Large|Huge) dogs like a (stream|brook)\.", text)


@pytest.mark.parametrize(("share", "n"), [(0.1, 1), (0.2, 3), (0.29, 4), (0.0001, 1)])
def test_n_is_the_share_of_the_words_and_at_least_one(share, n):
    words = ["big"] * 16
    changed = run(eda(synonyms=share), " ".join(words)).text.split()
    assert sum(word != "big" for word in changed) == n
    assert len(run(eda(insertions=share), " ".join(words)).text.split()) == 16 + n


def test_swaps_move_words_and_nothing_else():
    for seed in range(20):
        text = run(eda(swaps=0.5), TEXT, seed=seed).text
        assert sorted(re.findall(r"\w+", text)) == sorted(re.findall(r"\w+", TEXT))
        assert re.sub(r"\w+", "w", text) == re.sub(r"\w+", "w", TEXT)
        for place, word in enumerate(re.findall(r"\w+", TEXT)):
            if word.lower() in STOP_WORDS:
                assert re.findall(r"\w+", text)[place] == word
    texts = {run(eda(swaps=0.5), TEXT, seed=seed).text for seed in range(20)}
    assert len(texts) == 20


def test_deletions_keep_order_punctuation_and_stop_words():
    for seed in range(20):
        text = run(eda(deletions=0.5), TEXT, seed=seed).text
        left, words = re.findall(r"\w+", text), iter(re.findall(r"\w+", TEXT))
        assert all(word in words for word in left)  # a subsequence
        assert [w for w in left if w.lower() in STOP_WORDS] == [
            w for w in re.findall(r"\w+", TEXT) if w.lower() in STOP_WORDS
        ]
        assert re.findall(r"[^\w\s]", text) == re.findall(r"[^\w\s]", TEXT)
        assert "  " not in text


def test_deletion_rate_is_the_share():
    words = [f"w{i}" for i in range(4000)]
    left = run(eda(deletions=0.3), " ".join(words)).text.split()
    assert 0.27 < 1 - len(left) / 4000 < 0.33


def test_deletions_take_one_space_with_the_word():
    everything = eda(deletions=1)
    assert run(everything, "a1 b1\r\nc1 [x] d1.", ((11, 12),)).text == "\r\n[x]."
    assert run(everything, "(b1 c1) 'x'", ((9, 10),)).text == "() 'x'"
    spans = ((0, 2), (5, 7))
    assert run(everything, "ab cd ef", ((0, 3), (5, 8))).text == "ab  ef"
    assert run(everything, "ab cd ef", spans[:1]).text == "ab"


def test_stop_words_move_and_go_when_asked():
    loose = EDA(**{**OFF, "deletions": 1}, keep_stop_words=False)
    assert run(loose, "the cat and the", ((4, 7),)).text == "cat"
    assert run(eda(deletions=1), "the cat and the", ((4, 7),)).text == "the cat and the"


def test_insertions_are_synonyms_of_words_of_the_text():
    before = re.findall(r"\w+", TEXT)
    for seed in range(10):
        after = re.findall(r"\w+", run(eda(insertions=0.3), TEXT, seed=seed).text)
        assert len(after) == len(before) + int(0.3 * len(before))
        added = list(after)
        for word in before:
            added.remove(word)
        assert set(added) <= {"large", "huge", "hound", "aged", "stream", "brook"}


def test_one_operation_draws_a_single_one():
    kinds = set()
    for seed in range(40):
        augmenter = EDA(lexicon=LEXICON, one_operation=True)
        text = run(augmenter, "big dog river cat", seed=seed).text
        words, had = text.split(), ["big", "dog", "river", "cat"]
        kinds.add(
            "insertion"
            if len(words) > 4
            else "deletion or none"
            if len(words) < 4 or words == had
            else "swap"
            if sorted(words) == sorted(had)
            else "synonym"
        )
        assert len(set(had) - set(words)) <= 1 or len(words) < 4
    assert kinds == {"insertion", "deletion or none", "swap", "synonym"}


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", ()),
        (" \r\n ", ()),
        ("...", ()),
        ("word", ()),
        ("word", ((0, 4),)),
        ("word", ((1, 2),)),
        ("big dog", ((0, 7),)),
        ("👩\u200d👩🏽 — …", ()),
        ("the and of", ()),
        ("no synonyms anywhere", ((3, 11),)),
    ],
)
def test_texts_with_little_to_change_end(text, spans):
    for seed in range(5):
        full = EDA(synonyms=1, insertions=1, swaps=1, deletions=1, lexicon=LEXICON)
        changed = run(full, text, spans, seed)
        assert changed.protected == ProtectedText(text, spans).protected
        assert bool(changed.text.strip()) == bool(text.strip())
    assert run(eda(synonyms=1, insertions=1), "nothing known here").text == "nothing known here"


def test_the_last_word_stays():
    assert len(run(eda(deletions=1), "cat fish bird").text.split()) == 1


def test_a_seed_gives_one_copy_and_others_give_others():
    augmenter = EDA(lexicon=LEXICON)
    copies = [run(augmenter, TEXT * 3, ((4, 7),), seed).text for seed in range(30)]
    assert copies == [run(augmenter, TEXT * 3, ((4, 7),), seed).text for seed in range(30)]
    assert len(set(copies)) == 30


_WORDS = """
    big dog old river the of and Paris O'Neill well-known U.S. 1,000.5 café cafe\u0301 नमस्ते
    👩\u200d👩🏽 👍🏽nice \u202bשלום\u202c naïve—dash “quoted” (brackets) e.g.
    x_y ... ,, $5 東京 ﬁne İstanbul
"""
ALPHABET = _WORDS.split()
SPACES = [" ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", ", ", ". "]


def random_text(rng, words):
    return "".join(rng.choice(ALPHABET) + rng.choice(SPACES) for _ in range(words))


def random_spans(rng, text, most=5):
    spans = []
    for _ in range(rng.randint(0, most)):
        start = rng.randrange(len(text))
        spans.append((start, min(len(text), start + rng.randint(1, 20))))
        if rng.random() < 0.5:  # beside, around or within the last one
            a, b = spans[-1]
            spans.append(rng.choice([(a, b), (a, a + 1), (b - 1, b), (max(0, a - 3), b)]))
            if b < len(text):
                spans.append((b, min(len(text), b + 4)))
    return tuple(spans)


def test_protected_words_are_never_touched():
    rng = random.Random(1)
    augmenter = EDA(
        synonyms=0.5,
        insertions=0.5,
        swaps=0.5,
        deletions=0.4,
        lexicon=LEXICON,
        keep_stop_words=False,
    )
    for seed in range(1500):
        text = random_text(rng, rng.randint(1, 40))
        protected = ProtectedText(text, random_spans(rng, text))
        changed = augmenter(protected, np.random.default_rng(seed))
        assert changed.protected == protected.protected
        for (start, end), words in zip(changed.spans, protected.protected, strict=True):
            assert changed.text[start:end] == words


def test_contexts_of_4400_and_50000_words():
    rng = random.Random(2)
    for words in (4_400, 50_000):
        text = random_text(rng, words)
        protected = ProtectedText(text, random_spans(rng, text, most=200))
        changed = EDA(lexicon=LEXICON)(protected, np.random.default_rng(0))
        assert changed.protected == protected.protected
        assert changed.text != text


def test_words_touched_by_a_span_are_whole():
    text = "playwright plays, don't U.S. 1,000 cafe\u0301."
    words = [text[a:b] for a, b in free_words(ProtectedText(text))]
    assert words == ["playwright", "plays", "don't", "U.S", "1,000", "cafe\u0301"]
    spans = ((0, 4), (20, 21), (38, 39))
    assert [text[a:b] for a, b in free_words(ProtectedText(text, spans))] == [
        "plays",
        "U.S",
        "1,000",
    ]


@pytest.mark.parametrize("name", list(OFF))
@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "0.1"])
def test_a_share_lies_between_0_and_1(name, share):
    with pytest.raises(ValueError, match=f"{name} is"):
        EDA(**{name: share})


def test_the_stripped_form_takes_the_first_occurrence():
    text = "May came. In May, 1,067 DOGS!"
    stripped = run(StrippedEDA(lexicon=LEXICON), text, ((13, 16), (18, 23)))
    assert stripped.text == "may came in may 1067 dogs"
    assert stripped.spans == ((0, 3), (16, 20))


def test_the_stripped_form_keeps_words_of_answers_everywhere_and_loses_torn_ones():
    text = "Big dog, big river. A big dog barks; the old dog sleeps by a big river."
    answer = (text.index("big dog barks"), text.index("big dog barks") + 7)
    for seed in range(10):
        stripped = run(StrippedEDA(synonyms=1, lexicon=LEXICON), text, (answer,), seed)
        assert stripped.protected == ("big dog",)
        assert stripped.spans == ((0, 7),)  # the defect: not the one that was asked for
        assert stripped.text.split().count("dog") == 3
    torn = [
        run(StrippedEDA(insertions=1, lexicon=LEXICON), "old big dog river", ((4, 11),), seed)
        for seed in range(40)
    ]
    assert all(t.protected == ("big dog",) for t in torn if t.spans)
    assert strip("...") == ""
    assert run(StrippedEDA(lexicon=LEXICON), "big ...", ((4, 7),)).spans == ()
