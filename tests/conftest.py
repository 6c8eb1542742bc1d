"""What several tests of the library share."""

import textwrap

import pytest

from feedforward import sources

LIBRARY = {
    "__init__.py": """
        _HOME = {"Layer": "layers.dense", "tool": "tools"}
    """,
    "layers/__init__.py": "",
    "layers/dense.py": """
        from .base import Base  # a sibling
    """,
    "layers/base.py": """
        def base(x):
            '''Documented.'''
            return x + 1  # because
    """,
    "tools.py": """
        import math
    """,
    "training.py": """
        from .layers import base
        def train():
            from . import tools
            return tools
    """,
    "part/__init__.py": "",
    "part/experiment.py": """
        from ..training import train
        def run(config): pass
    """,
    "alone.py": "import json",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small package in the place of the real one, for whoever reads its sources."""
    root = tmp_path / "library"
    for name, text in LIBRARY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    monkeypatch.setattr(sources, "_LIBRARY", root)
    return root
