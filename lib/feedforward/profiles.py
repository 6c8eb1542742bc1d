"""Profiles: the scales that every experiment is run at, and the checks of a notebook's parameters.

The same experiment runs in seconds to prove the pipeline and for days to meet the paper's setting;
the profile's name says which. The book explains them in its chapter on how to read it.
"""

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    import torch


@dataclass(frozen=True)
class Profile:
    """A scale to run at.

    Args:
        name: as parameters cells and the command line give it.
        purpose: in one sentence.
        device: that ``"auto"`` stands for: ``"cpu"`` or ``"cuda"``.
        seeds: of its recorded runs.
        evidence: whether its records may support a claim.
    """

    name: str
    purpose: str
    device: str
    seeds: tuple[int, ...]
    evidence: bool


@dataclass(frozen=True)
class Plan:
    """What runs would cost, as a dry run prints it below their names.

    Args:
        columns: headings of a table.
        rows: its cells, one or more rows a run.
        notes: how its numbers were found.
        commands: that start the runs, where ``feedforward run`` alone does not.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            purpose="proves the pipeline and exact identities in seconds, never a claim",
            device="cpu",
            seeds=(0,),
            evidence=False,
        ),
        Profile(
            name="cpu",
            purpose="trains small models on two processor cores, in minutes to half an hour a run",
            device="cpu",
            seeds=(0, 1, 2),
            evidence=True,
        ),
        Profile(
            name="gpu",
            purpose="trains on one GPU, in pieces of under ten minutes that can be resumed",
            device="cuda",
            seeds=(0, 1, 2),
            evidence=True,
        ),
        Profile(
            name="paper",
            purpose="the paper's own setting, started by torchrun on many GPUs",
            device="cuda",
            seeds=(0,),
            evidence=True,
        ),
    )
}

#: The book's parts with an experiment, and the module that holds it. The module offers
#: ``grid(part, profile) -> {variant: config}`` and
#: ``run(config, *, progress=True, device="auto") -> Record``, and may offer
#: ``plan(profile, configs) -> Plan``.
EXPERIMENTS = {
    "foundations": "feedforward.lm.experiment",
    "structured-ffn": "feedforward.lm.structured",
    "structured-ffn-stability": "feedforward.lm.structured",
    "structured-ffn-speed": "feedforward.lm.speed",
    "structured-ffn-images": "feedforward.images",
    "robust-qa": "feedforward.qa.experiment",
    "adamoe": "feedforward.robot.experiment",
    "adamoe-images": "feedforward.robot.experiment",
    "adamoe-libero": "feedforward.robot.experiment",
    "adamoe-aloha": "feedforward.robot.experiment",
    "adamoe-speed": "feedforward.robot.speed",
}


# where an experiment has other seeds than its profile: what it compares differs by less
_MORE_SEEDS = {("structured-ffn-images", "cpu"): 5, ("adamoe", "cpu"): 5, ("robust-qa", "gpu"): 5}


def seeds_of(experiment: str, profile: str) -> tuple[int, ...]:
    """The seeds that an experiment is run with at a profile where none are given.

    >>> seeds_of("adamoe", "smoke"), seeds_of("adamoe", "cpu")
    ((0,), (0, 1, 2, 3, 4))

    Raises:
        ValueError: if there is no such profile, with the nearest name.
    """
    more = _MORE_SEEDS.get((experiment, profile))
    return get_profile(profile).seeds if more is None else tuple(range(more))


def experiments_of(part: str) -> list[str]:
    """The experiments behind a part of the book: its own, and those whose names begin with it.

    >>> experiments_of("foundations")
    ['foundations']
    """
    return [name for name in EXPERIMENTS if f"{name}-".startswith(f"{part}-")]


def get_profile(name: str) -> Profile:
    """The profile of this name.

    >>> get_profile("smoke").evidence
    False

    Raises:
        ValueError: if there is none, with the nearest name.
    """
    if not isinstance(name, str):
        raise ValueError(f"profile is {name!r}; give one of {_join(PROFILES)} as a text")
    if name not in PROFILES:
        raise ValueError(unknown("profile", name, PROFILES))
    return PROFILES[name]


def load_experiment(part: str) -> "ModuleType":
    """The module that holds the experiment of a part of the book.

    Args:
        part: one of ``EXPERIMENTS``, for instance ``"foundations"``.

    Raises:
        ValueError: if no part of this name has an experiment, with the nearest name.
        TypeError: if the module lacks ``grid`` or ``run``.
    """
    if not isinstance(part, str) or part not in EXPERIMENTS:
        raise ValueError(unknown("part", part, EXPERIMENTS))
    module = importlib.import_module(EXPERIMENTS[part])
    for name in ("grid", "run"):
        if not callable(getattr(module, name, None)):
            raise TypeError(f"{module.__name__} must offer a function {name}")
    return module


def resolve_device(name: str = "auto") -> "torch.device":
    """The device of this name, checked to be there.

    Args:
        name: ``"auto"`` (the fastest there is), ``"cpu"``, ``"cuda"``, ``"cuda:0"`` or ``"mps"``.

    Raises:
        ValueError: if this machine does not have it, with what it has.
    """
    import torch

    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    here = ["cpu", *(["cuda"] if cuda else []), *cuda, *mps]
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if not isinstance(name, str) or name not in here:
        raise ValueError(
            f"device is {name!r}; this machine has {_join(here)}, and 'auto' takes the fastest"
        )
    return torch.device(name)


def check_parameters(
    profile: Any, seed: Any, device: Any = "auto"
) -> tuple[Profile, int, "torch.device"]:
    """Check the values of a notebook's parameters cell before anything is computed with them.

    Args:
        profile: a profile's name.
        seed: a whole number from 0 to 2**32 - 1, what every random generator here takes.
        device: a device's name; ``"auto"`` is the device that the profile is made for.

    Returns:
        The profile, the seed and the device.

    Raises:
        ValueError: if a value has a wrong type or is not among those allowed.
    """
    profile = get_profile(profile)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}; give a whole number from 0 to {2**32 - 1}")
    return profile, seed, resolve_device(profile.device if device == "auto" else device)


def unknown(kind: str, name: Any, allowed: Iterable[str]) -> str:
    """The message for a name that is not allowed: what was given, the nearest ones, all of them.

    >>> unknown("profile", "smoek", ["smoke", "cpu"])
    "there is no profile 'smoek'; did you mean 'smoke'? Allowed: 'smoke', 'cpu'"
    """
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name), allowed)
    hint = f"; did you mean {_join(near, ' or ')}? Allowed" if near else "; allowed"
    return f"there is no {kind} {name!r}{hint}: {_join(allowed)}"


def _join(names: Iterable[str], separator: str = ", ") -> str:
    return separator.join(map(repr, names))
