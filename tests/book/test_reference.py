"""The reference lists every module of the library, so that none stays undocumented."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))

from chapter_links import link_chapters  # noqa: E402


def test_every_module_is_in_the_reference():
    pages = "".join(page.read_text() for page in (ROOT / "book" / "api").glob("*.md"))
    package = ROOT / "lib" / "feedforward"
    for path in package.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            module = ".".join(["feedforward", *path.relative_to(package).with_suffix("").parts])
            assert f".. automodule:: {module}\n" in pages, f"{module} is not in book/api"


def test_docstrings_name_chapters_that_exist():
    named = set()
    for path in (ROOT / "lib" / "feedforward").rglob("*.py"):
        named |= set(re.findall(r"``book/([\w/-]+)``", path.read_text()))
    assert len(named) >= 17
    pages = {"data", *(p.relative_to(ROOT / "book").as_posix() for p in (ROOT / "book").rglob("*"))}
    assert not [name for name in named if not {name, f"{name}.md"} & pages]


def test_named_chapters_become_links():
    app = SimpleNamespace(env=SimpleNamespace(found_docs={"adamoe/02-upcycling", "adamoe/index"}))
    lines = [
        "See ``book/adamoe``,",
        "``book/adamoe/02-upcycling``, ``book/adamoe/09-none``; ``book``.",
    ]
    link_chapters(app, "function", "f", None, None, lines)
    assert lines == [
        "See :doc:`/adamoe/index`,",
        ":doc:`/adamoe/02-upcycling`, ``book/adamoe/09-none``; ``book``.",
    ]
