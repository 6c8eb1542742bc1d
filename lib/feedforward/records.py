"""Records of runs: what was run, what came out, on which machine, found again by its config's hash.

A record is keyed by the hash of its configuration, so asking for a run that was made loads it.
Recorded runs, which the book stands on, lie in ``results/<experiment>/<profile>/`` and are
committed; live runs lie in the user's cache, keyed by the library's code as well, so that none is
ever stale. The book explains records, profiles and claims in its chapter on how to read it.
"""

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import numbers
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar, get_origin, get_type_hints

from feedforward.files import atomic_write, cache_directory, checkout, results_directory, sha256
from feedforward.sources import fingerprint, modules_of_source, without_docstrings

SCHEMA = 1

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_TRADE_MARKS = re.compile(r"\((R|TM)\)| Processor\b")  # in the names of processors
_LIBRARIES = ("torch", "transformers", "numpy", "feedforward")


class RecordError(ValueError):
    """A record that cannot be read: truncated, corrupt, of another version, or out of its place."""


class Config(Protocol):
    """What an experiment's configuration offers: a frozen dataclass that names itself.

    Every choice that changes the numbers is a field of it, because its fields are the record's key.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    experiment: str
    variant: str
    seed: int


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from: the code, the libraries and the machine behind its numbers.

    Args:
        commit: the checkout's commit, None outside a checkout or without git.
        dirty: whether the code differed from that commit, None where no commit is known.
        lock: the first 12 hexadecimal digits of the SHA-256 of ``requirements.lock``, or None.
        versions: of torch, transformers, numpy and this library.
        device: the processor and its bfloat16 ability, or the GPU, in words.
        threads: that torch used.
        seconds: of wall time.
        peak_memory: in bytes: of the process on a processor, of the allocator on a GPU; None where
            the system does not tell.
        date: at the end of the run, ISO 8601 in UTC.
        python: its version.
    """

    commit: str | None
    dirty: bool | None
    lock: str | None
    versions: dict[str, str | None]
    device: str
    threads: int
    seconds: float
    peak_memory: int | None
    date: str
    python: str

    @classmethod
    def here(cls, *, seconds: float, device: Any = "cpu") -> Self:
        """The provenance of a run that just ended in this process.

        Args:
            seconds: of wall time that the run took.
            device: a ``torch.device`` or its name.
        """
        import torch

        root = checkout()
        lock = root / "requirements.lock" if root else None
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", "lib", "data", "requirements.lock")
        return cls(
            commit=commit or None,
            dirty=None if not commit or changes is None else bool(changes),
            lock=sha256(lock)[:12] if lock and lock.is_file() else None,
            versions={name: _version(name) for name in _LIBRARIES},
            device=describe_device(device),
            threads=torch.get_num_threads(),
            seconds=round(seconds, 2),
            peak_memory=_peak_memory(torch.device(device)),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            python=platform.python_version(),
        )


@dataclass(frozen=True)
class Record:
    """One run: its configuration, its numbers, and where they come from.

    Args:
        experiment: the part of the book that it belongs to, for instance ``"foundations"``.
        variant: the arm of the comparison, for instance ``"moe"``.
        profile: the scale it was run at.
        seed: of the run.
        config: the configuration as plain JSON; its hash is the record's ``key``.
        metrics: the final numbers by name: finite floats, or lists and dicts of them.
        curves: by name, lists of equal length, for instance ``{"step": [...], "value": [...]}``.
        provenance: the code and the machine behind the numbers.

    Raises:
        ValueError: if a name cannot be a file's name, a number is not finite, or the lists of a
            curve differ in length.
    """

    experiment: str
    variant: str
    profile: str
    seed: int
    config: dict[str, Any]
    metrics: dict[str, Any]
    curves: dict[str, dict[str, list[float]]]
    provenance: Provenance
    key: str = field(init=False)

    def __post_init__(self):
        for name in ("experiment", "variant", "profile"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _NAME.fullmatch(value):
                raise ValueError(
                    f"{name} is {value!r}; it names a file: use letters, digits and . _ + -"
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; give a whole number")
        for name in ("config", "metrics", "curves"):
            object.__setattr__(self, name, _plain(getattr(self, name), name))
        for name, curve in self.curves.items():
            if not isinstance(curve, dict) or not all(isinstance(v, list) for v in curve.values()):
                raise ValueError(f"curve {name!r} is no dict of lists, like step and value")
            lengths = {axis: len(values) for axis, values in curve.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"curve {name!r} has lists of different lengths: {lengths}")
        object.__setattr__(self, "key", config_key(self.config, self.experiment))

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        metrics: dict[str, Any],
        curves: dict[str, dict[str, list[float]]] | None = None,
        provenance: Provenance,
        profile: str = "custom",
    ) -> Self:
        """The record of a run of `config`, which names its experiment, variant and seed."""
        return cls(
            experiment=config.experiment,
            variant=config.variant,
            profile=profile,
            seed=config.seed,
            config=plain_config(config),
            metrics=metrics,
            curves=curves or {},
            provenance=provenance,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the record as JSON: one line a field, whole or not at all."""
        entries = {"schema": SCHEMA} | dataclasses.asdict(self)
        lines = (f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in entries.items())
        with atomic_write(path, "w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a record that :meth:`save` wrote.

        Raises:
            RecordError: if the file is truncated, corrupt, of another schema version, or if its key
                is not the hash of its configuration.
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise _unreadable(path, f"it is not whole JSON ({error})") from error
        if not isinstance(entries, dict):
            raise _unreadable(path, "it does not hold a JSON object")
        if (schema := entries.pop("schema", None)) != SCHEMA:
            raise _unreadable(path, f"its schema is {schema!r} and this library reads {SCHEMA}")
        key = entries.pop("key", None)
        try:
            provenance = Provenance(**_checked(Provenance, entries.get("provenance")))
            record = cls(**_checked(cls, entries | {"provenance": provenance}))
        except ValueError as error:
            raise _unreadable(path, str(error)) from error
        if record.key != key:
            raise _unreadable(path, f"its key is {key!r} and its config's is {record.key!r}")
        return record


def added(default: Any) -> Any:
    """A field that a configuration class got after runs of it had been recorded.

    While it has its default it is left out of the configuration's identity, so that those runs
    keep their keys:

    >>> @dataclass(frozen=True)
    ... class Demo:
    ...     lr: float
    ...     warmup: float = added(0.0)
    >>> plain_config(Demo(0.1)), plain_config(Demo(0.1, 0.5))
    ({'lr': 0.1}, {'lr': 0.1, 'warmup': 0.5})
    """
    return field(default=default, metadata={"added": True})


def plain_config(config: Config) -> dict[str, Any]:
    """The fields of a configuration as plain JSON, as a record keeps them."""
    return _plain(_entries(config), "config")


def _entries(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _entries(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_entries(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    return {
        f.name: _entries(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if not (f.metadata.get("added") and getattr(value, f.name) == f.default)
    }


def config_key(config: Config | dict[str, Any], experiment: str | None = None) -> str:
    """The key of a run: 16 hexadecimal digits of the hash of its experiment and configuration.

    Args:
        config: an experiment's configuration, or its fields as a dict.
        experiment: its name; a configuration knows it, a dict does not.

    The order of the fields is no matter, nor is 1 for 1.0:

    >>> config_key({"lr": 1, "layers": [2]}, "demo")
    '388c440215782e41'
    >>> config_key({"layers": (2,), "lr": 1.0}, "demo")
    '388c440215782e41'
    """
    if dataclasses.is_dataclass(config):
        config, experiment = plain_config(config), experiment or config.experiment
    elif experiment is None:
        raise ValueError("config_key of a dict needs the experiment's name as its second argument")
    identity = _canonical(_plain({"experiment": experiment, "config": config}, "config"))
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_path(experiment: str, profile: str, variant: str, seed: int) -> Path:
    """Where a recorded run lies: ``results/<experiment>/<profile>/<variant>-s<seed>.json``."""
    return results_directory() / experiment / profile / f"{variant}-s{seed}.json"


def load_records(
    experiment: str, *, profile: str | None = None, variant: str | None = None
) -> list[Record]:
    """The recorded runs of an experiment, sorted by profile, variant and seed.

    Args:
        experiment: its name, the folder under ``results/``.
        profile: only the runs at this scale.
        variant: only the runs of this arm.

    Raises:
        RecordError: if one of the files cannot be read, or does not lie where its content belongs.
    """
    found = []
    for path in results_directory().glob(f"{experiment}/{profile or '*'}/{variant or '*'}-s*.json"):
        record = Record.load(path)
        home = result_path(record.experiment, record.profile, record.variant, record.seed)
        if path != home:
            raise _unreadable(path, f"its content belongs to {home}")
        if variant in (None, record.variant):
            found.append(record)
    return sorted(found, key=lambda record: (record.profile, record.variant, record.seed))


def is_run_of(record: Record, config: Config) -> bool:
    """Whether `record` is of exactly this configuration, and of the files that it only names.

    Those files are told by the method ``inputs()`` of the configuration, see `run_directory`: the
    metrics of the same names begin its checksums. A configuration whose files are not at hand has
    no inputs, and can load what was recorded with them.
    """
    if record.key != config_key(config):
        return False
    inputs = getattr(config, "inputs", dict)()
    told = {name: record.metrics.get(name) for name in inputs}
    return all(told[name] and value.startswith(told[name]) for name, value in inputs.items())


def recorded(config: Config) -> Record | None:
    """The recorded run that `is_run_of` this configuration, at any profile, or None."""
    key = config_key(config)
    same = (record for record in load_records(config.experiment) if record.key == key)
    return next((record for record in same if is_run_of(record, config)), None)


def cached(
    run: Callable[..., Record],
    config: Config,
    *,
    profile: str,
    refresh: bool = False,
    **options: Any,
) -> Record:
    """The record of ``run(config)``: the recorded one, else the cached one, else run now and kept.

    Two processes that ask for the same run do it once: the second waits and loads. The wait ends
    with the first process, however that ends.

    Args:
        run: an experiment's function, ``run(config, **options) -> Record``.
        config: its configuration.
        profile: the name that the record of a live run carries.
        refresh: run even if there is a record.
        options: go to `run` and do not change its numbers, for instance ``progress=False``.
    """
    if not refresh and (record := agreed(recorded(config))):
        return record
    folder = run_directory(run, config)
    path = folder.with_name(folder.name + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(path.with_suffix(".lock")):
        if not refresh and (record := agreed(_load_cached(path))):
            return dataclasses.replace(record, profile=profile)
        if refresh and is_first_process():
            shutil.rmtree(folder, ignore_errors=True)
        record = dataclasses.replace(run(config, **options), profile=profile)
        if record.key != config_key(config):
            raise ValueError(
                f"{run.__module__}.{run.__qualname__} returned the record of another configuration "
                f"(key {record.key}, asked for {config_key(config)}): build it by Record.of(config)"
            )
        if is_first_process():
            record.save(path)
    return record


def is_first_process() -> bool:
    """Whether this process writes: it is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def agreed(value: T) -> T:
    """The first process's `value`, in all the processes that torchrun started; alone just `value`.

    What they decide from files they must decide alike: each may see the files at another time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())  # the processes find one another
    return broadcast_object_list([value])[0]


def run_lock(path: Path) -> contextlib.AbstractContextManager:
    """A lock against other runs; the processes of one torchrun hold it together."""
    from filelock import FileLock

    return FileLock(path) if is_first_process() else contextlib.nullcontext()


def run_directory(run: Callable[..., Record], config: Config) -> Path:
    """The folder in the cache for the checkpoints and weights of one run of `config`.

    It changes with the code that the run stands on: a run never continues from a checkpoint that
    other code wrote. It changes also with files of the reader's own, which a configuration only
    names: one that may name some has a method ``inputs()``, which gives their checksums by name.
    """
    key = config_key(config)
    if inputs := getattr(config, "inputs", dict)():
        key = config_key({"key": key, "inputs": inputs}, config.experiment)
    return cache_directory("runs", config.experiment, f"{key}-{_run_fingerprint(run)}")


def describe_device(device: Any = "cpu") -> str:
    """A device in words, with its bfloat16 ability, for provenance and captions.

    Args:
        device: a ``torch.device`` or its name.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.processor() or 'Apple'} GPU"
    facts = _processor()
    model = facts.get("model name") or platform.processor() or platform.machine()
    model = _TRADE_MARKS.sub("", model)
    return f"{model}, {f'bf16 by {bf16}' if (bf16 := _processor_bf16()) else 'no bf16'}"


def devices_of(records: Iterable[Record]) -> str:
    """The devices that records were made on, each once, for captions and the ledger.

    As in "AMD EPYC (bf16 by AVX-512) and Intel Xeon (no bf16)".
    """
    named = (_TRADE_MARKS.sub("", record.provenance.device).partition(", ") for record in records)
    words = (f"{name} ({ability})" if ability else name for name, _, ability in named)
    return " and ".join(dict.fromkeys(words))


def has_fast_bf16(device: Any = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _processor_bf16() is not None


# -- reading and checking --------------------------------------------------------------------------


def _plain(value: Any, where: str) -> Any:
    """`value` as it comes back from JSON; what JSON has no form for is refused by its place."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):  # numpy's scalars too
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise ValueError(
        f"{where} is {value!r}; a record holds finite numbers, texts, lists and dicts of them"
    )


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _checked(kind: type, entries: Any) -> dict[str, Any]:
    """The entries of a JSON object, if they are just the fields of `kind`, each of its type."""
    if not isinstance(entries, dict):
        raise ValueError(f"its {kind.__name__.lower()} is {entries!r} and no JSON object")
    expected = {f.name for f in dataclasses.fields(kind) if f.init}
    missing, unknown = expected - entries.keys(), entries.keys() - expected
    if missing or unknown:
        raise ValueError(f"fields missing: {sorted(missing)}, unknown: {sorted(unknown)}")
    hints = get_type_hints(kind)
    for name, value in entries.items():
        allowed = get_origin(hints[name]) if get_origin(hints[name]) is dict else hints[name]
        if not isinstance(value, int | float if allowed is float else allowed):
            raise ValueError(f"its {name} is {value!r}")
    return entries


def _unreadable(path: str | os.PathLike, why: str) -> RecordError:
    command = f"git checkout -- {shlex.quote(str(path))}"
    return RecordError(
        f"{path} is not a readable record: {why}. Restore it ({command}), "
        "or delete it and run it again."
    )


def _load_cached(path: Path) -> Record | None:
    try:
        return Record.load(path) if path.exists() else None
    except RecordError as error:
        warnings.warn(f"{error} It is in the cache: running again.", stacklevel=3)
        return None


def _run_fingerprint(run: Callable[..., Record]) -> str:
    module = run.__module__
    if module.partition(".")[0] == __package__:
        return fingerprint(module)
    source = textwrap.dedent(inspect.getsource(run))
    own = hashlib.sha256(ast.dump(without_docstrings(ast.parse(source))).encode()).hexdigest()
    library = fingerprint(*modules_of_source(source))
    return hashlib.sha256(f"{own} {library}".encode()).hexdigest()[:12]


# -- the machine -----------------------------------------------------------------------------------


def _git(root: Path | None, *arguments: str) -> str | None:
    if root is None:
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _peak_memory(device: Any) -> int | None:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def _processor() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (s.partition(":") for s in lines)}


def _processor_bf16() -> str | None:
    facts = _processor()
    flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "NEON"}
    return next((name for flag, name in names.items() if flag in flags), None)
