"""A small book of its own for the tests of the build: two chapters, the real tools."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COPIED = [
    *("Snakefile", "_config.yml", "pyproject.toml", "requirements.lock", "profiles", "lib"),
    *("data/registry.toml", "book/tools", "book/_static", "book/claims.yml"),
]

CHAPTER = """\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# {title}

```{{code-cell}}
:tags: [parameters]
profile = "smoke"
seed = 0
device = "auto"
```

```{{code-cell}}
{code}
```
"""


FIRST = """\
from feedforward import LowRank
from feedforward.records import Provenance
print(Provenance.here(seconds=0.0).commit)"""


class SmallBook:
    """A checkout with the project's build chain around two tiny chapters."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True)
        for name in COPIED:
            source, target = ROOT / name, root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        (root / "CHANGELOG.md").write_text("# Changes\n")
        (root / "data" / "README.md").write_text("# Data\n")
        (root / "book" / "intro.md").write_text("# A small book\n")
        (root / "book" / "references.bib").write_text("")
        self.chapter("01-first", FIRST)
        self.chapter("02-second", "from feedforward import TopKRouter\nprint(2 + 2)")
        toc = "format: jb-book\nroot: intro\nchapters:\n"
        toc += "".join(f"  - file: foundations/{n}\n" for n in ("01-first", "02-second"))
        (root / "_toc.yml").write_text(toc)

    def chapter(self, name: str, code: str) -> None:
        """Write (or change) a chapter's MyST source."""
        path = self.root / "book" / "foundations" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CHAPTER.format(title=name, code=code))

    def environment(self, **more: str) -> dict[str, str]:
        """The surroundings of a build that uses this checkout's library and a shared data cache."""
        cache = os.environ.get("FEEDFORWARD_CACHE", str(ROOT / ".cache" / "feedforward"))
        own = {"PYTHONPATH": str(self.root / "lib"), "FEEDFORWARD_CACHE": cache}
        return {**os.environ, **own, **more}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start a build and return at once."""
        command = [sys.executable, str(self.root / "book" / "tools" / "build.py"), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment(**environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def build(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a build to its end; its exit status and everything it printed."""
        process = self.start(*(arguments or ("book",)), **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def planned(self) -> list[str]:
        """Names of the chapters that the next build would execute."""
        command = [sys.executable, "-m", "snakemake", "book", "--dry-run", "--nolock"]
        plan = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment(),
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        return sorted(set(re.findall(r"notebook=foundations/([\w-]+)", plan)))

    @property
    def page(self) -> Path:
        return self.root / "_build" / "html" / "index.html"


@pytest.fixture(scope="session")
def small_book(tmp_path_factory):
    """One small book, built once in the worst surroundings; the tests change and rebuild it.

    A path with spaces, no git on the PATH, and a home that not even root can write in.
    """
    folder = tmp_path_factory.mktemp("small")
    book = SmallBook(folder / "a book with spaces")
    home = folder / "home"
    home.write_text("a file where a folder should be")
    bare = folder / "bin"
    bare.mkdir()
    for tool in ("bash", "sh", "env", "cat", "uname"):
        (bare / tool).symlink_to(shutil.which(tool))
    names = "XDG_CACHE_HOME", "MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"
    caches = {name: str(folder / name) for name in (*names, "JUPYTER_RUNTIME_DIR")}
    book.first_build = book.build("book", HOME=str(home), PATH=str(bare), **caches)
    return book
