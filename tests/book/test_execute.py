"""What a reader sees of an executed notebook: ``book/tools/execute.py``."""

import sys
from pathlib import Path

from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))

import execute  # noqa: E402


def printed(text: str, name: str = "stdout"):
    return new_output("stream", name=name, text=text)


def shown(*outputs):
    """The kinds and texts of a cell's outputs as they are stored."""
    cell = new_code_cell("pass", execution_count=1, outputs=list(outputs))
    (cell,) = execute.presentable(new_notebook(cells=[cell])).cells
    return [(output.output_type, output.get("text")) for output in cell.outputs]


def test_what_is_printed_in_pieces_is_one_output():
    # a warning between two pieces is left out, and does not part them
    pieces = printed("one\n"), printed("careful", "stderr"), printed("two\n"), printed("three\n")
    assert shown(*pieces) == [("stream", "one\ntwo\nthree\n")]


def test_a_figure_between_two_prints_stays_between_them():
    figure = new_output("display_data", data={"text/plain": "figure"})
    assert shown(printed("before"), figure, printed("after")) == [
        ("stream", "before"),
        ("display_data", None),
        ("stream", "after"),
    ]


def test_the_injected_parameters_take_the_place_of_the_defaults():
    source = 'profile = "smoke"\nseed = 0'
    parameters = new_code_cell(source, metadata={"tags": ["parameters"]})
    injected = new_code_cell(
        '# Parameters\nprofile = "cpu"', metadata={"tags": ["injected-parameters"]}
    )
    (cell,) = execute.presentable(new_notebook(cells=[parameters, injected])).cells
    assert cell.source == 'profile = "cpu"\nseed = 0'
