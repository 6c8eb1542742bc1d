"""What the chapters' cells print is the same on any machine, and a wrong number is an error."""

import ast
import random

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from feedforward import notebook
from feedforward.augment.spans import ProtectedText
from feedforward.notebook import OutsideBand, check, diff, setup, show_source, table
from feedforward.records import Provenance, Record


@pytest.fixture
def shown(monkeypatch):
    contents = []
    monkeypatch.setattr(IPython.display, "display", lambda content, raw: contents.append(content))
    return contents


# --- setup ----------------------------------------------------------------------------------------


def test_setup_prints_one_stable_line(capsys):
    context = setup("smoke", 3)
    assert capsys.readouterr().out == (
        "Profile smoke: proves the pipeline and exact identities in seconds, never a claim. "
        "Seed 3, cpu.\n"
    )
    assert (context.profile.name, context.seed, context.device) == ("smoke", 3, torch.device("cpu"))
    assert "thread" in context.hardware


def test_setup_seeds_every_generator():
    def draw():
        setup("smoke", 5)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()


def test_setup_sets_the_style():
    plt.rcdefaults()
    setup("smoke", 0)
    assert plt.rcParams["figure.facecolor"] == "none"


@pytest.mark.parametrize(
    "parameters", [("smoek", 0), ("smoke", "0"), ("smoke", -1), ("smoke", 0, "tpu"), (3, 0)]
)
def test_wrong_parameters_are_refused_before_anything_is_computed(parameters, capsys):
    with pytest.raises(ValueError, match=r"profile|seed|device"):
        setup(*parameters)
    assert capsys.readouterr().out == ""


# --- the source -----------------------------------------------------------------------------------


class Sample:
    """A class whose docstring is not shown."""

    def double(self, x):
        """Neither is this one.

        It has several lines.
        """

        # a comment stays
        return 2 * x  # to the end

    def empty(self):
        """The only statement of a body stays."""


def test_source_is_shown_without_docstrings(shown):
    show_source(Sample)
    (content,) = shown
    code = content["text/markdown"].split("```python\n")[1].split("\n```")[0]
    assert code == (
        "class Sample:\n"
        "    def double(self, x):\n"
        "        # a comment stays\n"
        "        return 2 * x  # to the end\n"
        "\n"
        "    def empty(self):\n"
        '        """The only statement of a body stays."""'
    )
    assert content["text/plain"].endswith(code)


def test_chosen_lines_are_dedented(shown):
    show_source(Sample.double, start="# a comment", end="return")
    assert "python\n# a comment stays\nreturn 2 * x  # to the end\n```" in shown[0]["text/markdown"]


def test_source_of_the_library_is_current_and_named(shown):
    from feedforward.layers.routing import load_balancing_loss

    show_source(load_balancing_loss)
    text = shown[0]["text/markdown"]
    name = "`feedforward.layers.routing.load_balancing_loss` in `feedforward/layers/routing.py`"
    assert text.startswith(name)
    code = text.split("```python\n")[1].split("\n```")[0]
    (function,) = ast.parse(code).body
    assert ast.get_docstring(function) is None


def test_output_does_not_move_with_the_lines_above(shown):
    """Line numbers would change with every edit above, and the stored outputs with them."""
    show_source(Sample)
    assert str(Sample.double.__code__.co_firstlineno) not in shown[0]["text/plain"]


def test_source_of_a_module(shown):
    from feedforward import files

    show_source(files, start="def sha256", end="return")
    assert "def sha256" in shown[0]["text/plain"]
    assert "hexadecimal digits" not in shown[0]["text/plain"]


@pytest.mark.parametrize("thing", [len, 3, torch.nn.functional.conv1d])
def test_what_has_no_source_is_refused(thing):
    with pytest.raises(ValueError, match="no Python source"):
        show_source(thing)


def test_lines_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="contains 'no such line'"):
        show_source(Sample, start="no such line")
    with pytest.raises(ValueError, match="contains 'class Sample' after the start"):
        show_source(Sample, start="def empty", end="class Sample")


# --- check ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.6, 0.65, 0.7, np.float32(0.61), torch.tensor(0.65)])
def test_inside_the_band_only_the_band_is_printed(capsys, value):
    check("share", value, 0.6, 0.7, "of all")
    assert capsys.readouterr().out == "share: within 0.6 to 0.7 of all\n"


@pytest.mark.parametrize("value", [0.59, 0.71, float("nan"), float("inf"), -0.65])
def test_outside_the_band_is_an_error(capsys, value):
    with pytest.raises(OutsideBand, match="share is"):
        check("share", value, 0.6, 0.7)
    assert capsys.readouterr().out == ""


def test_one_sided_bands(capsys):
    check("speed", 5, low=2)
    check("loss", -1, high=0)
    assert capsys.readouterr().out == "speed: at least 2\nloss: at most 0\n"
    for outside in ({"low": 6}, {"high": 4}):
        with pytest.raises(OutsideBand):
            check("speed", 5, **outside)
    with pytest.raises(OutsideBand):
        check("speed", float("nan"), low=0)


def test_bands_must_be_bands():
    with pytest.raises(ValueError, match="no end"):
        check("share", 1.0)
    with pytest.raises(ValueError, match="empty"):
        check("share", 1.0, 2, 1)


# --- tables ---------------------------------------------------------------------------------------

ROWS = [
    {"layer": "dense <a>", "parameters": 2_359_296, "share": 1 / 3},
    {"layer": "low-rank", "parameters": np.int64(737_280), "share": 0.5},
]


def test_table_shows_text_and_html():
    shown = table(ROWS, caption="Cost & share", formats={"parameters": ",", "share": ".0%"})
    assert repr(shown) == (
        "Cost & share\n"
        "layer      parameters  share\n"
        "dense <a>   2,359,296    33%\n"
        "low-rank      737,280    50%"
    )
    html = shown._repr_html_()
    assert '<table class="dataframe">' in html
    assert "<caption>Cost &amp; share</caption>" in html
    assert "dense &lt;a&gt;" in html
    assert html.count("text-align:right") == 2 * 3
    assert "<style" not in html
    assert "background" not in html


def test_table_keeps_numbers_and_their_signs_on_one_line():
    shown = table([{"share": 0.5, "error": "-0.16 ± 0.04", "of": "63 %"}], formats={"share": ".0%"})
    html = shown._repr_html_()
    assert ">50\N{NO-BREAK SPACE}%<" in html
    assert ">63\N{NO-BREAK SPACE}%<" in html
    assert ">−0.16\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.04<" in html


def test_table_of_a_data_frame_is_the_same():
    assert repr(table(pd.DataFrame(ROWS))) == repr(table(ROWS))
    assert "0.3333" in repr(table(ROWS))


@pytest.mark.parametrize("rows", [[], [{}], [{"a": 1}, {"b": 1}], pd.DataFrame()])
def test_tables_need_rows_with_the_same_columns(rows):
    with pytest.raises(ValueError, match="same columns"):
        table(rows)


def test_formats_need_their_columns():
    with pytest.raises(ValueError, match=r"formats names \['loss'\]"):
        table(ROWS, formats={"loss": ".2f"})


def test_diff_marks_what_went_came_and_is_protected():
    before = ProtectedText("The <old> cat (1893-1990) sat,\nand sat.", ((20, 24),))
    after = before.edit([(5, 8, "aged"), (26, 29, "will sit")])
    shown = diff(before, after)
    assert repr(shown) == (
        "The <[-old-] {+aged+}> cat (1893-«1990») [-sat-] {+will sit+},\nand sat."
    )
    text = shown._repr_html_()
    assert "&lt;<del" in text
    assert ">aged</ins>&gt;" in text
    assert text.count("<del") == text.count("<ins") == 2
    assert text.count("<b ") == 1
    assert ">1990</b>)" in text
    assert not {"color:#000", "color:black", "color:#fff"} & set(text.split(";"))


def test_diff_of_a_text_with_itself_is_the_text():
    text = "  Peter's  dog,\nno-one's.\n"
    assert repr(diff(text, text)) == text.rstrip()


def test_words_that_went_leave_their_spaces():
    assert repr(diff("Rock Springs", "Springs")) == "[-Rock-] Springs"
    assert repr(diff("a big, old dog.", "a dog.")) == "a [-big, old-] dog."
    assert repr(diff("a dog, big.", "a dog.")) == "a dog[-, big-]."


def test_a_protected_word_is_the_same_only_as_a_protected_one():
    protected = ProtectedText("in May", ((3, 6),))
    assert repr(diff(protected, "in May")) == "in [-May-] {+May+}"
    assert repr(diff(protected, protected)) == "in «May»"
    assert repr(diff("", "new")) == "{+new+}"
    assert repr(diff("old", "")) == "[-old-]"


def test_caption_shows_provenance(shown):
    here = Provenance(
        commit=None, dirty=None, lock=None, versions={}, device="a <test> processor", threads=1,
        seconds=1.0, peak_memory=None, date="2025-03-04T05:06:07+00:00", python="3.11",
    )  # fmt: skip
    notebook.caption(live=Record("demo", "moe", "smoke", 0, {}, {}, {}, here))
    assert "a &lt;test&gt; processor" in shown[0]["text/html"]
    assert shown[0]["text/plain"].startswith("Live, profile smoke, seed 0")
