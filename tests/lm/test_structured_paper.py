"""The settings for one GPU and for the paper: what they hold, and the same code run tiny."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feedforward.layers.cost import PAPER_SHAPES, count
from feedforward.lm import structured
from feedforward.lm.accounting import memory
from feedforward.lm.experiment import LanguageModelConfig, run, training_flops
from feedforward.lm.model import DecoderConfig
from feedforward.lm.structured import PAPER_TRAINING, grid
from feedforward.records import load_records
from feedforward.training import TrainingConfig

GPU = grid("structured-ffn", "gpu")
PAPER = grid("structured-ffn", "paper")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "results"))
    folder = tmp_path / "texts"
    folder.mkdir()
    words = ["whale", "ship", "sea", "the", "a", "and", "saw", "sank", "old", "white"]
    rng = np.random.default_rng(0)
    text = "\n\n".join(" ".join(rng.choice(words, 20)) for _ in range(120))
    (folder / "text.txt").write_text(text)
    return folder


# --- paper --------------------------------------------------------------------------------------


def test_the_paper_has_every_arm_in_every_size():
    arms = {
        "dense",
        *(f"{kind}-63" for kind in ("lowrank", "blockdense", "blockshuffle")),
        *(
            f"{kind}-32{form}"
            for kind in ("lowrank", "blockdense", "blockshuffle")
            for form in ("", "-guided", "-equal-flops")
        ),
    }
    wide = {"gqa", "wide-structured", "wide-structured-guided"}
    sizes = {"s": arms, "m": arms | wide, "l": arms | wide, "xl": arms}
    assert set(PAPER) == {f"{arm}-{size}" for size, own in sizes.items() for arm in own}


@pytest.mark.parametrize("variant", PAPER)
def test_a_run_of_the_paper_has_its_model_and_its_training(variant):
    config, size = PAPER[variant], variant.rpartition("-")[2]
    arm = variant.removesuffix(f"-{size}").removesuffix("-guided").removesuffix("-equal-flops")
    name = {"dense": "", "wide-structured": "-ws"}.get(arm, f"-{arm}")
    assert count(config.model) == count(PAPER_SHAPES[f"{size}{name}"])
    assert config.model.activation == "gelu_tanh"
    tokens, lr = PAPER_TRAINING[size]
    training = config.training
    assert (training.lr, training.betas, training.weight_decay) == (lr, (0.9, 0.999), 0.1)
    assert (training.warmup, training.final_lr, training.clip) == (0.1, 0.1, 1.0)
    assert (training.decay_all, training.schedule, training.precision) == (True, "cosine", "bf16")
    assert config.tokens_per_step == 512 * 1024
    if variant in (f"{arm}-{size}", f"{arm}-guided-{size}") and arm != "wide-structured":
        # what is seen for the first time is the budget of the size
        assert config.fresh_steps * 512 * 1024 == pytest.approx(tokens, rel=1e-3)
    if config.guidance or "equal-flops" in variant or arm == "wide-structured":
        reference = "gqa" if arm == "wide-structured" else "dense"
        same = training_flops(PAPER[f"{reference}-{size}"])
        assert training_flops(config) == pytest.approx(same, rel=1e-3)


def test_guided_shares_and_budgets_are_the_papers():
    def share(kind, size):
        config = PAPER[f"{kind}-32-guided-{size}"]
        return round(config.guidance.steps / config.fresh_steps, 2)

    sizes = tuple(PAPER_TRAINING)
    assert [share("lowrank", size) for size in sizes] == [0.30, 0.38, 0.41, 0.43]
    assert [share("blockshuffle", size) for size in sizes] == [0.30, 0.38, 0.41, 0.43]
    assert [share("blockdense", size) for size in sizes] == [0.30, 0.40, 0.41, 0.45]
    more = [PAPER[f"lowrank-32-equal-flops-{size}"].tokens / 1e9 for size in sizes]
    assert more == pytest.approx([3.0, 10.2, 23.2, 41.5], rel=0.02)


@pytest.mark.parametrize("runs", [GPU, PAPER], ids=["gpu", "paper"])
def test_runs_that_are_compared_have_one_text_and_see_none_of_it_twice(runs):
    texts = {}
    for variant, config in runs.items():
        assert config.source.startswith("hub:")
        assert config.fresh_steps * config.tokens_per_step <= config.text_tokens
        size = variant.rpartition("-")[2] if runs is PAPER else ""
        texts.setdefault(size, set()).add((config.source, config.text_tokens))
    assert all(len(own) == 1 for own in texts.values())


def test_a_run_of_eight_processes_is_not_begun_by_one(folder):
    config = replace(PAPER["dense-s"], source=str(folder))
    with pytest.raises(ValueError, match=r"8 processes.*torchrun --nproc-per-node 8"):
        run(config, progress=False, device="cpu")


def test_the_papers_runs_fit_into_the_memory_of_its_gpus():
    assert max(map(memory, PAPER.values())) < 70 * 2**30


# --- gpu ----------------------------------------------------------------------------------------


def test_one_gpu_has_the_arms_of_the_processor_under_the_same_names():
    cpu = {name for name in grid("structured-ffn", "cpu") if not re.search(r"-w\d", name)}
    assert len(cpu) == 21
    assert cpu <= GPU.keys()
    sizes = [GPU[f"dense{width}"] for width in ("-w256", "", "-w512", "-w768")]
    millions = [count(config.model).parameters / 1e6 for config in sizes]
    assert millions == sorted(millions)
    assert 5 < millions[0] < 6
    assert 85 < millions[-1] < 115
    assert [config.training.lr for config in sizes] == pytest.approx([18e-4, 12e-4, 9e-4, 6e-4])


def test_one_gpu_is_enough_and_may_be_taken_away_at_any_time():
    for config in GPU.values():
        assert config.training.checkpoint_every_seconds == 60
        assert config.training.precision == "bf16"
        assert config.processes == 1
        assert memory(config) < 20 * 2**30


@pytest.mark.parametrize("arm", ["lowrank-63", "wide-structured-guided"])
def test_the_code_of_the_gpu_runs_tiny(folder, arm):
    tiny = replace(
        structured._GPU,
        run={"batch": 2, "curve_tokens": 64, "final_tokens": 64, "source": str(folder)},
        model={"vocabulary": 280, "context": 16},
        depths={32: (2, 4)},
    )
    size = structured._width(tiny, 32, 0.01)
    runs = {c.variant: c for c in [*structured._compared(size), *structured._wide(size)]}
    record = run(runs[arm], progress=False, device="cpu")
    # two micro-batches of two sequences a step
    assert record.metrics["tokens"] == runs[arm].training.steps * 2 * 2 * 16
    assert record.metrics["training FLOPs"] == training_flops(runs[arm])
    assert record.metrics["validation loss"] > 0


# --- torchrun -----------------------------------------------------------------------------------

PROGRAM = """
import sys
from dataclasses import replace
from feedforward import cli, profiles
from feedforward.lm.experiment import run
sys.path.insert(0, {tests!r})
from test_structured_paper import shared
sys.modules["demo"] = demo = type(sys)("demo")
demo.run = run
demo.grid = lambda part, profile: {{c.variant: c for c in map(shared, [{source!r}] * 2, (2, 4))}}
profiles.EXPERIMENTS["demo"] = "demo"
cli.main(["run", "demo", "--profile", "cpu", "--seeds", "0", "--record"])
"""


def shared(source: str, steps: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        variant=f"steps-{steps}",
        model=DecoderConfig(vocabulary=280, width=16, layers=2, heads=2, context=16),
        training=TrainingConfig(steps=steps, lr=1e-2, precision="fp32", evaluate_every=2),
        batch=2,
        source=source,
        curve_tokens=64,
        final_tokens=64,
        experiment="demo",
        processes=2,
    )


@pytest.mark.slow
def test_two_processes_of_torchrun_make_each_run_once(folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent), source=str(folder)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "[1/2] demo/cpu/steps-2-s0",
        "[2/2] demo/cpu/steps-4-s0",
    ]
    records = load_records("demo")
    assert [record.metrics["tokens"] for record in records] == [2 * 64, 4 * 64]
    # the same steps in one process, of twice as many micro-batches
    config = shared(str(folder), 4)
    training = replace(config.training, accumulate=2)
    alone = run(replace(config, processes=1, training=training), progress=False, device="cpu")
    for curve in ("loss", "validation loss"):
        assert records[1].curves[curve]["value"] == pytest.approx(
            alone.curves[curve]["value"], rel=1e-4
        )
