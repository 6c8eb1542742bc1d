"""Render the staged book to HTML with Jupyter Book, warnings as errors, and swap it in whole."""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from feedforward.files import atomic_write
from steps import BUILD, StepFailed, step

STAGE = BUILD / "stage"


def main() -> None:
    """Parse the command line and render."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with step("render the HTML"):
        pages = render()
        with atomic_write(options.output, "w") as file:
            json.dump({"pages": pages}, file)


def render() -> int:
    """Build _build/html from _build/stage; the earlier book stays until the new one is whole.

    Raises:
        StepFailed: Sphinx warned or failed; its log is kept.
    """
    work, log = BUILD / "sphinx", BUILD / "sphinx.log"
    _forget_pages_that_are_gone(work)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(STAGE), "--path-output", str(work)]
    command += ["--config", str(STAGE / "_config.yml"), "--toc", str(STAGE / "_toc.yml")]
    command += ["-W", "--keep-going"]
    with open(log, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        lines = re.sub(r"\x1b\[[\d;]*m", "", log.read_text()).splitlines()
        told = [s for s in lines if re.search(r"WARNING|ERROR|exception:", s)] or lines[-15:]
        raise StepFailed("\n".join([*told[:20], f"  log: {log}"]))
    made = work / "_build" / "html"
    _add_mathjax(made)
    return _publish(made, BUILD / "html")


def _forget_pages_that_are_gone(work: Path) -> None:
    """Start from nothing when the table of contents or the settings changed.

    Sphinx leaves the pages of removed files where they are, and would publish them for ever.
    """
    known = work / "settings"
    settings = "".join((STAGE / name).read_text() for name in ("_config.yml", "_toc.yml"))
    if not known.exists() or known.read_text() != settings:
        shutil.rmtree(work, ignore_errors=True)
        with atomic_write(known, "w") as file:
            file.write(settings)


def _add_mathjax(html: Path) -> None:
    """Bring the one file of MathJax that the pages load, so that they open without a network."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(package.origin).parent / "static" / "mathjax" / "tex-svg.js"
    target = html / "_static" / "mathjax" / source.name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _publish(made: Path, target: Path) -> int:
    fresh, old = target.with_name("html.new"), target.with_name("html.old")
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(made, fresh, ignore=shutil.ignore_patterns(".buildinfo*", ".doctrees"))
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return len(list(target.rglob("*.html")))


if __name__ == "__main__":
    sys.exit(main())
