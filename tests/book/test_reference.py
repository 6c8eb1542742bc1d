"""The reference lists every module of the library, so that none stays undocumented."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_module_is_in_the_reference():
    pages = "".join(page.read_text() for page in (ROOT / "book" / "api").glob("*.md"))
    package = ROOT / "lib" / "feedforward"
    for path in package.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            module = ".".join(["feedforward", *path.relative_to(package).with_suffix("").parts])
            assert f".. automodule:: {module}\n" in pages, f"{module} is not in book/api"
