"""What every step of the build shares: its line on the terminal, its time, its watch."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "_build"


class StepFailed(Exception):
    """A step that could not be done, with the message a reader needs."""


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Announce the step, time it, note it for the summary; end with it when the build is gone."""
    _watch_build()
    say(f"{name} ...")
    started, status = time.monotonic(), "failed"
    try:
        yield
        status = "done"
    except StepFailed as error:
        say(f"{name} FAILED\n{error}")
        raise SystemExit(1) from None
    finally:
        seconds = time.monotonic() - started
        line = {"step": name, "seconds": round(seconds, 1), "status": status}
        BUILD.mkdir(exist_ok=True)
        with open(BUILD / "steps.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if status == "done":
            say(f"{name} {seconds:.1f} s")


def say(text: str) -> None:
    """Print to the terminal of whoever started the build (Snakemake's own output goes to a log)."""
    with terminal() as out:
        print(text, file=out, flush=True)


@contextlib.contextmanager
def terminal() -> Iterator:
    """The build's terminal, or this process's standard error when the step runs by itself."""
    path = os.environ.get("FEEDFORWARD_TERMINAL")
    try:
        with open(path or "", "a", buffering=1) as out:
            yield out
    except OSError:
        yield sys.stderr


def _watch_build() -> None:
    build = os.environ.get("FEEDFORWARD_BUILD")
    if build:
        threading.Thread(target=_follow, args=(int(build),), daemon=True).start()


def _follow(build: int) -> None:
    """Leave when the build that started this step has died; the kernel of a notebook follows."""
    while True:
        try:
            os.kill(build, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(0.5)
