import dataclasses
import json
import multiprocessing
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import pytest

from feedforward import records
from feedforward.records import (
    Provenance,
    Record,
    RecordError,
    added,
    cached,
    config_key,
    devices_of,
    is_run_of,
    load_records,
    plain_config,
    recorded,
    result_path,
    run_directory,
)


@dataclass(frozen=True)
class Demo:
    variant: str = "dense"
    seed: int = 0
    lr: float = 1e-3
    layers: tuple[int, ...] = (1, 2)
    experiment: str = "demo"


HERE = Provenance(
    commit="c0ffee" * 6 + "c0ff",
    dirty=False,
    lock="0123456789ab",
    versions={"torch": "2.13.0"},
    device="a processor",
    threads=1,
    seconds=1.5,
    peak_memory=1024,
    date="2026-01-02T03:04:05+00:00",
    python="3.11.7",
)


def record_of(config=Demo(), **changes):
    values = {
        "metrics": {"loss": 1.25, "load": [0.5, 0.5]},
        "curves": {"loss": {"step": [1, 2], "value": [2.0, 1.25]}},
        "provenance": HERE,
        "profile": "cpu",
    }
    return Record.of(config, **values | changes)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "the results"))
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "the cache"))


def keep(record):
    path = result_path(record.experiment, record.profile, record.variant, record.seed)
    record.save(path)
    return path


def test_a_record_comes_back_as_it_was(tmp_path):
    record = record_of(metrics={"loss": np.float32(1.25), "count": np.int64(3), "per": {"a": 1}})
    record.save(tmp_path / "a folder" / "r.json")
    again = Record.load(tmp_path / "a folder" / "r.json")
    assert again == record
    assert again.config["layers"] == [1, 2]
    assert again.metrics == {"loss": 1.25, "count": 3, "per": {"a": 1}}
    assert len((tmp_path / "a folder" / "r.json").read_text().splitlines()) == 12


def test_the_key_is_that_of_the_configuration():
    assert record_of().key == config_key(Demo()) == config_key(record_of().config, "demo")
    different = [Demo(lr=2e-3), Demo(seed=1), Demo(variant="moe"), Demo(experiment="other")]
    assert len({config_key(config) for config in [Demo(), *different]}) == 5
    assert config_key(Demo(lr=1)) == config_key(Demo(lr=1.0))
    # a key is forever: committed records are found by it
    assert config_key({"a": 1, "b": [1.5, None, "x"]}, "demo") == "8ae1122678aa8f16"
    with pytest.raises(ValueError, match="needs the experiment's name"):
        config_key({"lr": 1})


@dataclass(frozen=True)
class Inner:
    rank: int = 4
    init: str | None = added(None)


@dataclass(frozen=True)
class Grown(Demo):
    """What `Demo` became when it got two fields more, of which one has such a field too."""

    warmup: float = added(0.0)
    inner: Inner | None = added(None)


def test_an_added_field_leaves_the_key_alone_at_its_default():
    assert plain_config(Grown()) == plain_config(Demo())
    assert config_key(Grown()) == config_key(Demo()) == config_key(Grown(warmup=0))
    keys = {config_key(config) for config in (Grown(), Grown(warmup=0.5), Grown(inner=Inner()))}
    assert len(keys) == 3
    assert plain_config(Grown(warmup=0.5)) == plain_config(Demo()) | {"warmup": 0.5}


def test_an_added_field_of_a_nested_configuration():
    @dataclass(frozen=True)
    class Before:
        rank: int = 4

    old, new = Grown(inner=Before()), Grown(inner=Inner())
    assert plain_config(new)["inner"] == {"rank": 4}
    assert config_key(new) == config_key(old)
    changed = Grown(inner=Inner(init="spectral"))
    assert plain_config(changed)["inner"] == {"rank": 4, "init": "spectral"}
    assert config_key(changed) != config_key(new)
    # in a list or a dict too, where every configuration is plain JSON in the end
    several = Demo(layers=(Inner(), {"a": Inner(init="x")}))
    expected = [{"rank": 4}, {"a": {"rank": 4, "init": "x"}}]
    assert plain_config(several)["layers"] == expected


def test_a_run_recorded_before_a_field_was_added_is_found():
    keep(record_of(Demo()))
    assert recorded(Grown()) == record_of(Demo()) == record_of(Grown())
    assert recorded(Grown(warmup=0.5)) is None
    keep(record_of(Grown(warmup=0.5)))
    assert recorded(Grown(warmup=0.5)).config["warmup"] == 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_runs_of_the_foundations_are_still_found(seed, monkeypatch):
    """The book stands on them: a field that changed their keys would lose them."""
    from feedforward.profiles import load_experiment

    monkeypatch.delenv("FEEDFORWARD_RESULTS")
    arms = load_experiment("foundations").grid("foundations", "cpu")
    records_there = {record.key: record for record in load_records("foundations", profile="cpu")}
    for name, arm in arms.items():
        arm = dataclasses.replace(arm, seed=seed)
        found = records_there[config_key(arm)]
        assert (found.variant, found.seed) == (name, seed)
        assert found.config == plain_config(arm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"loss": float("nan")}}, "metrics.loss is nan; a record holds finite"),
        ({"metrics": {"loads": [1.0, {"x": object()}]}}, r"metrics.loads\[1\].x is <object"),
        ({"curves": {"loss": {"step": [1], "value": []}}}, "lists of different lengths"),
        ({"profile": "../cpu"}, "profile is '../cpu'; it names a file"),
        ({"config": Demo(variant="a/b")}, "variant is 'a/b'"),
        ({"config": Demo(seed="0")}, "seed is '0'; give a whole number"),
    ],
)
def test_what_is_no_record_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        record_of(**changes)


def damage(path, how):
    text = path.read_text()
    entries = json.loads(text)
    if how == "truncated":
        text = text[: len(text) // 2]
    elif how == "empty":
        text = ""
    elif how == "no object":
        text = "[1, 2]"
    elif how == "binary":
        path.write_bytes(b"\xff\xfe\x00")
        return
    elif how == "other schema":
        text = json.dumps(entries | {"schema": 99})
    elif how == "changed config":
        text = json.dumps(entries | {"config": entries["config"] | {"lr": 5}})
    elif how == "field missing":
        del entries["metrics"]
        text = json.dumps(entries)
    elif how == "no provenance":
        text = json.dumps(entries | {"provenance": None})
    elif how == "unknown provenance":
        text = json.dumps(entries | {"provenance": entries["provenance"] | {"weather": "fine"}})
    elif how == "wrong type":
        changed = entries["provenance"] | {"seconds": "long"}
        text = json.dumps(entries | {"provenance": changed})
    elif how == "no curve":
        text = json.dumps(entries | {"curves": {"loss": 1}})
    path.write_text(text)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("truncated", "not whole JSON"),
        ("empty", "not whole JSON"),
        ("binary", "not whole JSON"),
        ("no object", "does not hold a JSON object"),
        ("other schema", "its schema is 99 and this library reads 1"),
        ("changed config", "its key is"),
        ("field missing", r"fields missing: \['metrics'\]"),
        ("no provenance", "its provenance is None and no JSON object"),
        ("unknown provenance", r"unknown: \['weather'\]"),
        ("no curve", "curve 'loss' is no dict of lists"),
        ("wrong type", "its seconds is 'long'"),
    ],
)
def test_a_damaged_record_is_named_with_its_mend(how, why):
    path = keep(record_of())
    damage(path, how)
    with pytest.raises(RecordError, match=why) as caught:
        Record.load(path)
    assert str(path) in str(caught.value)
    assert "git checkout" in str(caught.value)
    with pytest.raises(RecordError):
        load_records("demo")


def test_records_are_found_in_order():
    for seed in (10, 2):
        for variant in ("moe", "dense", "dense-s1"):
            keep(record_of(Demo(variant, seed)))
    keep(record_of(Demo(), profile="gpu"))
    found = [(r.profile, r.variant, r.seed) for r in load_records("demo")]
    assert found == sorted(found)
    assert len(found) == 7
    assert [r.seed for r in load_records("demo", profile="cpu", variant="dense")] == [2, 10]
    assert load_records("nothing") == []
    assert recorded(Demo("moe", 10)) == record_of(Demo("moe", 10))
    assert recorded(Demo("moe", 11)) is None


def test_a_record_out_of_its_place_is_an_error():
    path = keep(record_of())
    path.rename(path.with_name("dense-s7.json"))
    with pytest.raises(RecordError, match=r"its content belongs to .*dense-s0.json"):
        load_records("demo")


class Runs:
    """Counts how often it is run."""

    def __init__(self):
        self.count = 0

    def __call__(self, config, **options):
        self.count += 1
        return record_of(config, profile="custom", metrics={"count": self.count})


@pytest.fixture
def counted(monkeypatch):
    runs = Runs()
    monkeypatch.setattr(records, "_run_fingerprint", lambda run: "f" * 12)
    return runs


def test_a_run_is_made_once(counted):
    first = cached(counted, Demo(), profile="smoke")
    assert first.profile == "smoke"
    assert cached(counted, Demo(), profile="smoke") == first
    assert counted.count == 1
    assert cached(counted, Demo(seed=1), profile="smoke").metrics == {"count": 2}
    assert cached(counted, Demo(), profile="smoke", refresh=True).metrics == {"count": 3}
    assert cached(counted, Demo(), profile="cpu").metrics == {"count": 3}


def test_a_recorded_run_comes_before_the_cache(counted):
    cached(counted, Demo(), profile="cpu")
    keep(record_of())
    assert cached(counted, Demo(), profile="cpu") == record_of()


def test_a_damaged_cache_entry_is_run_again(counted, tmp_path):
    cached(counted, Demo(), profile="cpu")
    (path,) = (tmp_path / "the cache").rglob("*.json")
    damage(path, "truncated")
    with pytest.warns(UserWarning, match="running again"):
        assert cached(counted, Demo(), profile="cpu").metrics == {"count": 2}


def test_a_run_that_fails_leaves_nothing_and_can_be_asked_again(counted):
    def fail(config):
        raise RuntimeError("broken")

    fail.__module__ = counted.__module__
    with pytest.raises(RuntimeError):
        cached(fail, Demo(), profile="cpu")
    assert cached(counted, Demo(), profile="cpu").metrics == {"count": 1}


def test_a_run_must_return_the_record_of_its_config(counted):
    def other(config):
        return record_of(Demo(seed=9))

    with pytest.raises(ValueError, match="record of another configuration"):
        cached(other, Demo(), profile="cpu")


def test_refresh_starts_without_old_checkpoints(counted):
    folder = run_directory(counted, Demo())
    (folder / "step-1").mkdir(parents=True)
    cached(counted, Demo(), profile="cpu", refresh=True)
    assert not folder.exists()


def slow_run(config, *, log):
    with open(log, "a") as file:
        file.write("run\n")
    import time

    time.sleep(0.5)
    return record_of(config)


def ask(log):
    assert cached(slow_run, Demo(), profile="cpu", log=log).metrics["loss"] == 1.25


def test_two_processes_run_once(tmp_path):
    log = str(tmp_path / "log")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask, args=(log,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "run\n"


# -- provenance ------------------------------------------------------------------------------------


def test_devices_of_records_are_named_once_without_trade_marks():
    names = ("Intel(R) Xeon(R) Processor, no bf16", "AMD EPYC, bf16 by AVX-512", "NVIDIA H100")
    made = [record_of(provenance=dataclasses.replace(HERE, device=n)) for n in (*names, names[0])]
    assert devices_of(made) == "Intel Xeon (no bf16) and AMD EPYC (bf16 by AVX-512) and NVIDIA H100"


def test_provenance_of_this_machine():
    here = Provenance.here(seconds=2.0, device="cpu")
    assert here.seconds == 2.0
    assert here.versions["torch"]
    assert here.peak_memory > 10_000_000
    assert here.threads >= 1
    assert here.date.endswith("+00:00")
    assert "bf16" in here.device


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "a checkout"
    (root / "lib").mkdir(parents=True)
    (root / "lib" / "code.py").write_text("x = 1\n")
    (root / "requirements.lock").write_text("numpy==2\n")
    monkeypatch.setattr(records, "checkout", lambda: root)
    return root


def git(root, *arguments):
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_provenance_knows_commit_and_changes(checkout):
    assert Provenance.here(seconds=0).commit is None  # no repository yet
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "start")
    clean = Provenance.here(seconds=0)
    assert len(clean.commit) == 40
    assert clean.dirty is False
    assert len(clean.lock) == 12
    (checkout / "results").mkdir()
    (checkout / "results" / "new.json").write_text("{}")
    assert Provenance.here(seconds=0).dirty is False  # a new record changes no code
    (checkout / "lib" / "code.py").write_text("x = 2\n")
    assert Provenance.here(seconds=0).dirty is True


def test_provenance_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    here = Provenance.here(seconds=0)
    assert (here.commit, here.dirty) == (None, None)
    assert len(here.lock) == 12


def test_provenance_outside_a_checkout(monkeypatch):
    monkeypatch.setattr(records, "checkout", lambda: None)
    here = Provenance.here(seconds=0)
    assert (here.commit, here.dirty, here.lock) == (None, None, None)


# -- the code behind a run -------------------------------------------------------------------------


def test_run_directory_depends_on_code_and_configuration(library, monkeypatch):
    def run(config):
        pass

    run.__module__ = "feedforward.part.experiment"
    here = run_directory(run, Demo())
    assert run_directory(run, Demo(seed=1)) != here
    (library / "tools.py").write_text("import cmath")
    assert run_directory(run, Demo()) != here
    # a function of the reader's own stands on its own source and on what that imports
    own = run_directory(slow_run, Demo())
    (library / "alone.py").write_text("import math")
    assert run_directory(slow_run, Demo()) == own


def test_run_directory_depends_on_files_that_the_configuration_names():
    read = {}

    @dataclass(frozen=True)
    class Reading(Demo):
        def inputs(self):
            return dict(read)

    def folder(seed=0, **checksums):
        read.clear()
        read.update(checksums)
        return run_directory(slow_run, Reading(seed=seed))

    assert folder() == run_directory(slow_run, Demo())
    folders = [folder(), folder(data="a"), folder(data="b"), folder(encoder="a"), folder(1)]
    folders += [folder(data="a", encoder="a"), folder(1, data="a")]
    assert len(set(folders)) == 7
    assert folder(data="a") == folders[1]
    assert config_key(Reading()) == config_key(Demo())  # what is recorded is found by it


def test_a_record_of_other_files_is_another_run_s():
    read = {}

    @dataclass(frozen=True)
    class Reading(Demo):
        def inputs(self):
            return dict(read)

    own = record_of(Reading(), metrics={"loss": 1.0, "data": "ab12"})
    keep(own)
    for given, found in (({"data": "ab12cd34"}, own), ({"data": "ffffffff"}, None), ({}, own)):
        read.clear()
        read.update(given)
        assert recorded(Reading()) == found
        assert is_run_of(own, Reading()) == (found is own)
        assert not is_run_of(own, Reading(seed=1))
    read["encoder"] = "ab12"  # of which the record says nothing
    assert recorded(Reading()) is None


def test_records_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record_of().seed = 3
