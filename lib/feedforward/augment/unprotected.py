"""Any augmenter of strings, nlpaug's first, on the unprotected stretches of a text."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from feedforward.augment.spans import ProtectedText


class Unprotected:
    """An augmenter that knows no spans, kept away from them.

    It sees each stretch between protected spans by itself, without the white space around it, which
    stays; stretches without a letter or digit it does not see. What it draws from ``random`` and
    ``numpy.random`` comes from the given generator, and the state of both is put back.

    Args:
        augmenter: An object with ``augment(text)`` (nlpaug's) or a function of a string; it
            gives a string or a list with one.

    Raises:
        TypeError: It is neither.

    >>> import numpy as np
    >>> loud = Unprotected(str.upper)
    >>> loud(ProtectedText("red and blue", ((4, 7),)), np.random.default_rng(0)).text
    'RED and BLUE'

    Book: ``book/robust-qa/02-augmentation``.
    """

    def __init__(self, augmenter: Any):
        self.augmenter = augmenter
        self._function = getattr(augmenter, "augment", augmenter)
        if not callable(self._function):
            raise TypeError(f"{augmenter!r} has no method augment and is no function")

    def __call__(self, protected: ProtectedText, rng: np.random.Generator) -> ProtectedText:
        """The text with its unprotected stretches augmented.

        Raises:
            ValueError: The augmenter gave something else than a text for one of them.
        """
        with _global_randomness(int(rng.integers(2**32))):
            return protected.rewrite(self._stretch)

    def _stretch(self, text: str) -> str:
        core = text.strip()
        if not re.search(r"[^\W_]", core):
            return text
        before, _, after = text.partition(core)
        result = self._function(core)
        if isinstance(result, list):  # nlpaug gives a list, an empty one where it sees nothing
            result = result[0] if result else core
        if not isinstance(result, str):
            raise ValueError(f"{self.augmenter!r} made {result!r} of a text; a text is needed")
        return before + result + after


@contextmanager
def _global_randomness(seed: int) -> Iterator[None]:
    """Seed what libraries without generators draw from, for a while."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
