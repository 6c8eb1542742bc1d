import sys
import types

import pytest
import torch

from feedforward import profiles
from feedforward.profiles import (
    EXPERIMENTS,
    PROFILES,
    check_parameters,
    get_profile,
    load_experiment,
    resolve_device,
    seeds_of,
)


def test_the_four_profiles():
    assert list(PROFILES) == ["smoke", "cpu", "gpu", "paper"]
    assert [p.name for p in PROFILES.values() if not p.evidence] == ["smoke"]
    assert all(get_profile(name).name == name for name in PROFILES)
    assert all(len(PROFILES[name].seeds) >= 3 for name in ("cpu", "gpu"))
    assert all(
        len(seeds_of(part, name)) >= len(PROFILES[name].seeds)
        for part in EXPERIMENTS
        for name in PROFILES
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smok", "there is no profile 'smok'; did you mean 'smoke'"),
        ("huge", "allowed: 'smoke', 'cpu', 'gpu', 'paper'"),
        (3, "profile is 3; give one of 'smoke'"),
        (["cpu"], "profile is"),
        (None, "profile is None"),
    ],
)
def test_an_unknown_profile_names_the_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        get_profile(name)


@pytest.mark.parametrize("part", ["fundations", "", None, ["foundations"]])
def test_an_unknown_part_names_those_there_are(part):
    with pytest.raises(ValueError, match=r"there is no part .* 'foundations'"):
        load_experiment(part)


def test_an_experiment_offers_grid_and_run(monkeypatch):
    module = types.ModuleType("demo_experiment")
    module.grid = lambda part, profile: {}
    monkeypatch.setitem(sys.modules, "demo_experiment", module)
    monkeypatch.setitem(EXPERIMENTS, "demo", "demo_experiment")
    with pytest.raises(TypeError, match="demo_experiment must offer a function run"):
        load_experiment("demo")
    module.run = lambda config, *, progress=True: None
    assert load_experiment("demo") is module


def machine(monkeypatch, *, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_devices_of_a_machine_without_gpu(monkeypatch):
    machine(monkeypatch)
    assert resolve_device() == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "mps", "tpu", "", 0, None):
        with pytest.raises(ValueError, match=r"device is .*; this machine has 'cpu'"):
            resolve_device(name)


def test_devices_of_a_machine_with_gpus(monkeypatch):
    machine(monkeypatch, cuda=2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="has 'cpu', 'cuda', 'cuda:0', 'cuda:1', and"):
        resolve_device("cuda:2")
    machine(monkeypatch, mps=True)
    assert resolve_device("auto") == torch.device("mps")


def test_a_parameters_cell(monkeypatch):
    machine(monkeypatch)
    assert check_parameters("smoke", 0) == (PROFILES["smoke"], 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="device is 'cuda'"):
        check_parameters("gpu", 0, "auto")
    assert check_parameters("gpu", 0, "cpu")[2] == torch.device("cpu")
    machine(monkeypatch, cuda=1)
    # a profile made for the processor stays there: its reference outputs come from one
    assert check_parameters("smoke", 0, "auto")[2] == torch.device("cpu")
    assert check_parameters("gpu", 0, "auto")[2] == torch.device("cuda")


@pytest.mark.parametrize("seed", ["0", 0.0, True, None, -1, 2**32])
def test_a_seed_of_a_wrong_type_or_size(seed):
    with pytest.raises(ValueError, match=r"seed is .*; give a whole number from 0 to 4294967295"):
        check_parameters("smoke", seed)


def test_every_listed_experiment_is_a_module_of_the_library():
    assert all(name.startswith("feedforward.") for name in EXPERIMENTS.values())
    assert profiles.unknown("x", "abc", []) == "there is no x 'abc'; allowed: "
