"""What staging makes of settings, notebooks and runs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))

import stage  # noqa: E402

CONFIG = (ROOT / "_config.yml").read_text()


def theme(settings: str) -> dict:
    return yaml.safe_load(settings)["sphinx"]["config"]["html_theme_options"]


def test_no_repository_no_buttons():
    made = stage.settings(CONFIG)
    assert "repository" not in yaml.safe_load(made)
    assert "launch_buttons" not in theme(made)
    assert not [name for name in theme(made) if name.startswith("use_edit")]


def test_a_repository_brings_launch_and_edit_buttons():
    assert 'url: ""' in CONFIG
    made = stage.settings(CONFIG.replace('url: ""', 'url: "https://git.example/book/"'))
    options = theme(made)
    assert options["repository_url"] == "https://git.example/book"
    assert options["use_edit_page_button"]
    assert options["launch_buttons"]["colab_url"].startswith("https://")
    # the options that the book sets by itself stay
    assert options["navbar_center"] == []


def test_the_parameters_and_the_setup_are_folded_and_nothing_else():
    cells = [
        nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import torch", metadata={"tags": ["setup"]}),
        nbformat.v4.new_code_cell("1 + 1"),
    ]
    staged = stage.hide_plumbing(nbformat.v4.new_notebook(cells=cells))
    hidden = ["hide-input" in cell.metadata.get("tags", []) for cell in staged.cells]
    assert hidden == [True, True, False]


RUN = {
    "profile": "smoke",
    "seconds": 12.34,
    "device": "a processor",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "commit": "abcdef0123456789",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}


def executed(**facts):
    return nbformat.v4.new_notebook(metadata={"feedforward": RUN | facts})


@pytest.mark.parametrize(
    ("dirty", "shown"), [(False, "`abcdef0` |"), (True, "`abcdef0` (changed)")]
)
def test_the_table_of_runs_says_what_a_reader_asks(dirty, shown):
    table = stage.runs_table(
        {"part/01-one": executed(dirty=dirty), "part/02-two": nbformat.v4.new_notebook()}
    )
    shared, _, _head, _rule, one, two = table.splitlines()
    assert shared == "Every chapter: a processor, 2 threads; torch 2.13.0."
    for text in ("[](/part/01-one)", "smoke", "12.3", "2026-01-02 03:04", shown):
        assert text in one
    assert "not executed yet" in two


def test_the_table_of_runs_keeps_a_column_whose_rows_differ():
    table = stage.runs_table({"one": executed(), "two": executed(device="another")})
    shared, _, head, _rule, one, two = table.splitlines()
    assert shared == "Every chapter: torch 2.13.0."
    assert "| hardware |" in head
    assert "a processor, 2 threads" in one
    assert "another, 2 threads" in two


def test_the_table_of_recorded_runs_adds_up():
    def record(experiment, variant, seed, seconds, device, date):
        provenance = SimpleNamespace(seconds=seconds, device=device, date=date)
        return SimpleNamespace(
            experiment=experiment, profile="cpu", variant=variant, seed=seed, provenance=provenance
        )

    _head, _rule, one, two, every = stage.recorded_table(
        [
            record("one", "dense", 0, 3600.0, "a processor, no bf16", "2026-01-03T00:00:00+00:00"),
            record("one", "dense", 1, 1800.0, "another, no bf16", "2026-01-02T00:00:00+00:00"),
            record("one", "moe", 0, 1800.0, "another, no bf16", "2026-01-04T00:00:00+00:00"),
            record("two", "dense", 0, 360.0, "another, no bf16", "2026-01-05T00:00:00+00:00"),
        ]
    ).splitlines()
    devices = "a processor (no bf16) and another (no bf16)"
    first, last = (date.replace("-", "\u2011") for date in ("2026-01-02", "2026-01-04"))
    assert one == f"| `one` | cpu | 2 | 3 | 2.0 | {devices} | {first} | {last} |"
    assert two.startswith("| `two` | cpu | 1 | 1 | 0.1 | another (no bf16) |")
    assert every == "| all | | | 4 | 2.1 | | | |"
