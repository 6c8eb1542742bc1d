"""Each chapter is a pair of files that say the same, with outputs that nbval can compare."""

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))

import notebooks  # noqa: E402

PAIRS = notebooks.find_notebooks()


@pytest.mark.parametrize("notebook", PAIRS, ids=lambda n: n.name)
class TestPair:
    def test_cells_agree(self, notebook):
        ours, theirs = notebook.read_source(), notebook.read_stored()
        assert notebooks.cells(ours) == notebooks.cells(theirs)

    def test_one_parameters_cell(self, notebook):
        cells = notebook.read_source().cells
        tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) == 1
        values = {}
        exec(tagged[0].source, {}, values)
        assert values == {"profile": "smoke", "seed": 0, "device": "auto"}

    def test_outputs_are_stored(self, notebook):
        stored = json.loads((ROOT / notebook.stored).read_text())
        code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code)
        outputs = [output for cell in code for output in cell["outputs"]]
        assert len(outputs) >= 5
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert stored["metadata"]["feedforward"]["profile"] == "smoke"

    def test_stays_light(self, notebook):
        assert (ROOT / notebook.stored).stat().st_size < 400_000

    def test_code_fits_the_page(self, notebook):
        code = [c.source for c in notebook.read_source().cells if c.cell_type == "code"]
        wide = [line for text in code for line in text.splitlines() if len(line) > 72]
        assert not wide

    def test_no_absolute_paths(self, notebook):
        text = (ROOT / notebook.stored).read_text()
        assert str(ROOT) not in text
        assert "/home/" not in text


def test_cells_keep_their_names(tmp_path):
    """Random ones would make a difference of every cell, whatever a run changed."""

    def written(*texts):
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
        notebooks.write(made, tmp_path / "made.ipynb")
        return [cell.id for cell in nbformat.read(tmp_path / "made.ipynb", 4).cells]

    first, second = written("x = 1", "x"), written("x = 1", "y = 2", "x", "x")
    assert (first[0], first[1]) == (second[0], second[2])
    assert len(set(second)) == 4


@pytest.mark.parametrize(
    "page", sorted((ROOT / "book").rglob("*.md")), ids=lambda p: str(p.relative_to(ROOT / "book"))
)
def test_directives_end_where_they_should(page):
    """A fence behind other words closes nothing, and Sphinx does not warn of it."""
    open_fences = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert not re.search(r"\S.* :{3,}$", line), f"{number}: give ::: a line of its own"
        if begun := re.match(r"(:{3,})\{", line):
            open_fences.append((begun[1], number))
        elif re.fullmatch(r":{3,}\s*", line):
            assert open_fences, f"{number}: nothing to close"
            fence, opened = open_fences.pop()
            assert line.strip() == fence, f"{number}: closes {fence} of line {opened}"
    assert not open_fences


def test_there_are_chapters():
    assert len(PAIRS) >= 3


def test_a_changed_cell_is_seen(tmp_path, monkeypatch):
    notebook = PAIRS[0]
    changed = notebook.read_stored()
    next(c for c in changed.cells if c.cell_type == "code").source += "\nprint('more')"
    assert notebooks.cells(changed) != notebooks.cells(notebook.read_source())
