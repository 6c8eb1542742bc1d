"""The chapters as pairs: NN-name.md (MyST, for review) and NN-name.ipynb (stored outputs)."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat

from feedforward import profiles, sources
from feedforward.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
FORMAT = "md:myst"


@dataclass(frozen=True)
class Notebook:
    """A chapter with code: `name` is its path in the book without suffix, "part/NN-name"."""

    name: str

    @property
    def part(self) -> str:
        """The folder it lies in, which is the name of its experiment as well."""
        return self.name.split("/")[0]

    @property
    def source(self) -> str:
        """The MyST file, relative to the checkout."""
        return f"book/{self.name}.md"

    @property
    def stored(self) -> str:
        """The notebook with the stored outputs, relative to the checkout."""
        return f"book/{self.name}.ipynb"

    @property
    def modules(self) -> list[str]:
        """Files of the library that its code uses, directly or through other modules."""
        code = "\n".join(
            cell.source for cell in self.read_source().cells if cell.cell_type == "code"
        )
        return _files_of(sources.source_closure(*sources.modules_of_source(code)))

    @staticmethod
    def modules_behind(module: str) -> list[str]:
        """Files of the library behind `module`, itself included."""
        return _files_of(sources.source_closure(module))

    @property
    def results(self) -> list[str]:
        """The recorded runs of its part's experiments."""
        return sorted(
            str(path.relative_to(ROOT))
            for experiment in profiles.experiments_of(self.part)
            for path in (ROOT / "results" / experiment).rglob("*.json")
        )

    @property
    def registry(self) -> list[str]:
        """The registry of data sets, for a chapter that reads files of other packages."""
        reads = any(path.endswith("/packages.py") for path in self.modules)
        return ["data/registry.toml"] if reads else []

    def read_source(self) -> nbformat.NotebookNode:
        """The MyST file as a notebook without outputs."""
        return jupytext.read(ROOT / self.source, fmt=FORMAT)

    def read_stored(self) -> nbformat.NotebookNode:
        """The notebook with the stored outputs."""
        return jupytext.read(ROOT / self.stored)


def find_notebooks() -> list[Notebook]:
    """Every chapter with code, in the order of the book's folders."""
    paths = {path.with_suffix("") for path in BOOK.glob("*/[0-9][0-9]-*.*")}
    return [Notebook(path.relative_to(BOOK).as_posix()) for path in sorted(paths)]


def find_parts() -> list[str]:
    """The parts of the book: the folders that hold chapters or an opening."""
    found = {path.parent.name for path in BOOK.glob("*/index.md")}
    return sorted(found | {notebook.part for notebook in find_notebooks()})


def cells(notebook: nbformat.NotebookNode) -> list[tuple]:
    """What the two files of a pair must agree on: kind, text and tags of each cell, in order."""
    return [
        (cell.cell_type, cell.source.strip(), tuple(sorted(_tags(cell))), _rendering(cell))
        for cell in notebook.cells
    ]


def sync(notebook: Notebook) -> str | None:
    """Bring a pair together when its files differ: the newer one wins; says what was done."""
    source, stored = ROOT / notebook.source, ROOT / notebook.stored
    if source.exists() and stored.exists():
        ours, theirs = notebook.read_source(), notebook.read_stored()
        if cells(ours) == cells(theirs):
            return None
    newer_is_source = source.exists() and (
        not stored.exists() or source.stat().st_mtime >= stored.stat().st_mtime
    )
    if newer_is_source:
        fresh = notebook.read_source()
        if stored.exists():
            fresh = jupytext.combine.combine_inputs_with_outputs(fresh, notebook.read_stored())
        write(fresh, stored)
        return f"{notebook.stored} follows {notebook.source}"
    write(notebook.read_stored(), source, FORMAT)
    return f"{notebook.source} follows {notebook.stored}"


def write(notebook: nbformat.NotebookNode, path: Path, fmt: str = "ipynb") -> None:
    """Write a notebook whole or not at all, in the form that review and git like best."""
    notebook.metadata.setdefault(
        "kernelspec", {"display_name": "Python 3", "language": "python", "name": "python3"}
    )
    for cell in notebook.cells:
        if not cell.metadata.get("tags", True):  # papermill leaves empty lists
            del cell.metadata["tags"]
    _name_cells(notebook)
    text = jupytext.writes(notebook, fmt=fmt)
    if fmt == FORMAT:
        text = re.sub(r"\n *jupytext_version: .*", "", text)
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)


def _name_cells(notebook: nbformat.NotebookNode) -> None:
    """Name each cell after its text: random names would change with every run."""
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        if "id" not in cell:  # formats before 4.5 have no names
            continue
        name = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:8]
        cell.id = f"{name}-{seen[name]}" if seen[name] else name
        seen[name] += 1


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _rendering(cell: nbformat.NotebookNode) -> str:
    return repr(sorted(cell.metadata.get("mystnb", {}).items()))


def _files_of(modules: set[str]) -> list[str]:
    return sorted(str(sources.source_file(m).relative_to(ROOT)) for m in modules)
