"""nbval compares: a reference with a changed number fails, the unchanged one passes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT / "book" / "foundations" / "01-feed-forward.ipynb"


def nbval(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-x"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        cwd=path.parent,
    )


@pytest.fixture
def beginning(tmp_path):
    """The first cells of a real chapter, up to the first text output that holds a number."""
    notebook = nbformat.read(CHAPTER, as_version=4)
    for end, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and re.search(r"\d\d", json.dumps(compared(cell))):
            notebook.cells = notebook.cells[:end]
            path = tmp_path / "beginning.ipynb"
            nbformat.write(notebook, path)
            return path
    pytest.fail("the chapter prints no number that nbval could compare")


def compared(cell) -> list:
    """The outputs of a cell that nbval compares as text."""
    if "nbval-ignore-output" in cell.metadata.get("tags", []):
        return []
    return [o.get("text") or o.get("data", {}).get("text/html") or "" for o in cell.outputs]


def test_the_reference_passes(beginning):
    result = nbval(beginning)
    assert result.returncode == 0, result.stdout[-2000:]


def test_a_changed_number_fails(beginning):
    notebook = nbformat.read(beginning, as_version=4)
    for output in notebook.cells[-1].outputs:
        for holder, key in ((output, "text"), (output.get("data", {}), "text/html")):
            if re.search(r"\d\d", holder.get(key, "")):
                holder[key] = re.sub(r"\d(\d)", r"9\1", holder[key].replace("9", "8"))
    nbformat.write(notebook, beginning)
    result = nbval(beginning)
    assert result.returncode == 1
    assert "mismatch" in result.stdout or "differ" in result.stdout
