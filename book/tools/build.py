"""Build the book: one build at a time, one line a step, and nothing lost when it is killed.

Snakemake (see Snakefile) decides what has to run; this script guards it with a lock that dies
with the process, follows its parent into death, and says at the end how long each step took.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from feedforward.profiles import get_profile, unknown
from notebooks import find_notebooks, find_parts, sync

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "_build"
STEPS = BUILD / "steps.jsonl"


def main() -> int:
    """Parse the command line and build; the exit status is that of the engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=["book", "html", "references"])
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--part", default="all")
    parser.add_argument("--cores", default="2")
    parser.add_argument("--parent", type=int, help="stop when this process is gone")
    options = parser.parse_args()
    try:
        get_profile(options.profile)
        if options.part not in ("all", *find_parts()):
            raise ValueError(unknown("part", options.part, ["all", *find_parts()]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "build.lock", "a+") as lock:
        _acquire(lock)
        STEPS.unlink(missing_ok=True)
        if not (BUILD / "html" / "index.html").exists():
            (BUILD / "html.json").unlink(missing_ok=True)
        for notebook in find_notebooks():
            if done := sync(notebook):
                print(done)
        started = time.monotonic()
        status = _snakemake(options, lock)
        _summary(options, status, time.monotonic() - started)
    return status


def _acquire(lock) -> None:
    """Hold the lock; the kernel gives it back when the holder dies, so none is left to clear."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "?"
        print(f"another build is running (process {holder}): waiting for its end", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _snakemake(options: argparse.Namespace, lock) -> int:
    command = [sys.executable, "-m", "snakemake", options.target, "--cores", options.cores]
    # our own lock replaces Snakemake's, which would survive a kill
    command += ["--nolock", "--rerun-incomplete"]
    command += ["--config", f"profile={options.profile}", f"part={options.part}"]
    command += [f"execute={options.target != 'html'}"]
    log = open(BUILD / "snakemake.log", "w")  # noqa: SIM115 - open as long as the child
    engine = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=log,
        stderr=log,
        pass_fds=[lock.fileno()],
        start_new_session=True,
        env=os.environ
        | {"FEEDFORWARD_BUILD": str(os.getpid()), "FEEDFORWARD_TERMINAL": _terminal()},
    )

    def stop(*_):
        os.killpg(engine.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    if options.parent:
        threading.Thread(target=_follow, args=(options.parent, stop), daemon=True).start()
    try:
        status = engine.wait()
    except KeyboardInterrupt:
        stop()
        engine.wait()
        print("interrupted: finished steps are kept, `make book` goes on from there")
        return 130
    finally:
        log.close()
    if status:
        _explain()
    return status


def _terminal() -> str:
    """Where a step's own lines go: the file that stands behind our standard error."""
    return f"/proc/{os.getpid()}/fd/2" if os.path.isdir("/proc/self/fd") else "/dev/stderr"


def _follow(parent: int, stop) -> None:
    """End the engine when `parent` (make) is gone, so that a killed build leaves nobody at work."""
    while os.getppid() == parent:
        time.sleep(0.5)
    stop()


def _explain() -> None:
    """Say why the engine failed, unless a step has said it already."""
    steps = _steps()
    if any(step["status"] == "failed" for step in steps):
        return
    print((BUILD / "snakemake.log").read_text()[-3000:], file=sys.stderr)


def _steps() -> list[dict]:
    return [json.loads(line) for line in STEPS.read_text().splitlines()] if STEPS.exists() else []


def _summary(options: argparse.Namespace, status: int, seconds: float) -> None:
    steps = _steps()
    print(f"\n{'step':<52}{'seconds':>8}")
    for step in steps:
        mark = "" if step["status"] == "done" else f"  {step['status']}"
        print(f"{step['step']:<52}{step['seconds']:>8.1f}{mark}")
    if not steps:
        print(f"{'nothing to do: everything is up to date':<52}")
    print(f"{'in all':<52}{seconds:>8.1f}")
    page = BUILD / "html" / "index.html"
    if status:
        failed = [step["step"] for step in steps if step["status"] == "failed"]
        kept = "; the earlier book is still at " + str(page) if page.exists() else ""
        print(f"\nthe build failed ({', '.join(failed) or 'see _build/snakemake.log'}){kept}")
    elif options.target == "references":
        print("\nthe reference outputs are stored in book/; read the difference before a commit")
    else:
        print(f"\nthe book: {page}")


if __name__ == "__main__":
    sys.exit(main())
