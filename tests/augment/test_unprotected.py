import random

import numpy as np
import pytest

from feedforward.augment.spans import ProtectedText
from feedforward.augment.unprotected import Unprotected

TEXT = "The quick brown fox (in 1066) jumps over the lazy dog, they say.\r\nNothing else."
SPANS = ((24, 28), (10, 19), (45, 49))


def run(augmenter, seed=0, text=TEXT, spans=SPANS):
    return Unprotected(augmenter)(ProtectedText(text, spans), np.random.default_rng(seed))


@pytest.mark.parametrize("name", ["word.RandomWordAug", "char.RandomCharAug", "word.SplitAug"])
def test_nlpaugs_augmenters_never_reach_a_span(name):
    kind, name = name.split(".")
    module = pytest.importorskip(f"nlpaug.augmenter.{kind}")
    augmenter = getattr(module, name)()
    copies = [run(augmenter, seed) for seed in range(20)]
    assert all(copy.protected == ("1066", "brown fox", "lazy") for copy in copies)
    assert len({copy.text for copy in copies}) > 10
    assert [run(augmenter, seed) for seed in range(20)] == copies


def test_the_state_of_the_global_generators_is_put_back():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.random()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    run(lambda text: f"{random.random()}")
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002


def test_white_space_and_bare_punctuation_stay():
    seen = []

    def note(text):
        seen.append(text)
        return ["X"]

    assert (
        run(note, text="  ab , cd \n. ef", spans=((2, 4), (7, 9))).text
        == "  ab , cd \n. X"[:10] + "\nX"
    )
    assert seen == [". ef"]


def test_other_results_are_refused():
    assert run(lambda text: []).text == TEXT
    with pytest.raises(ValueError, match="made 7 of a text"):
        run(lambda text: 7)
    with pytest.raises(TypeError, match="no method augment"):
        Unprotected(3)
