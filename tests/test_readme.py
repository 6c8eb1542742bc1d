"""The README's code runs as it stands."""

import re
from pathlib import Path

from feedforward import LowRank

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_every_example_runs(capsys):
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) >= 2
    names = {}
    for example in examples:
        exec(example, names)
    assert names["y"].shape == (2, 16, 768)
    everything, active = map(int, capsys.readouterr().out.split())
    assert active < everything


def test_the_share_that_it_prints_is_right():
    share = LowRank.weight_count(768, 3072, rank=192) / (768 * 3072)
    assert f"{100 * share:.0f} % of its weights" in README
