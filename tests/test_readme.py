"""The code of the README and of the book's first page runs as it stands."""

import re
from pathlib import Path

from feedforward import LowRank
from feedforward.claims import ledger_summary

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_example_runs(capsys):
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) >= 2
    names = {}
    for example in examples:
        exec(example, names)
    assert names["y"].shape == (2, 16, 768)
    everything, active = map(int, capsys.readouterr().out.split())
    assert active < everything


def test_the_first_page_runs():
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "book" / "intro.md").read_text(), flags=re.DOTALL
    )
    names = {}
    exec(example, names)
    dense = names["GPT2LMHeadModel"](names["config"])
    sizes = [model.num_parameters() for model in (names["thin"], dense, names["sparse"])]
    assert sizes == sorted(set(sizes))


def test_the_share_that_it_prints_is_right():
    share = LowRank.weight_count(768, 3072, rank=192) / (768 * 3072)
    assert f"{100 * share:.0f} % of its weights" in README


def test_the_summary_is_the_ledgers():
    shown = README.partition("claims --summary -->\n")[2].partition("<!-- end")[0]
    assert shown == ledger_summary(), (
        "put what `feedforward claims --summary` prints into README.md"
    )


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", README)
    assert len(pictures) == 3
    assert all((ROOT / picture).is_file() for picture in pictures)
