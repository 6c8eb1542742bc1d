"""`make test`: style, floors, unit tests and doctests, notebooks against their references, pages.

Every stage runs, whatever the others say; the last line counts tests.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from notebooks import find_notebooks

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "_build" / "tests"
PYTEST = [sys.executable, "-m", "pytest", "-q", "--no-header"]


def main() -> int:
    """Run every stage in order and sum up."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    for old in REPORTS.glob("*.xml"):
        old.unlink()
    python = [sys.executable, "-m"]
    notebooks = [notebook.stored for notebook in find_notebooks()]
    stages = {
        "style (ruff)": [*python, "ruff", "check", "."],
        "format (ruff)": [*python, "ruff", "format", "--check", "."],
        "floors (import-linter)": [str(Path(sys.executable).parent / "lint-imports")],
        "unit tests and doctests": [*pytest("unit"), "-n", "2", "--doctest-modules"]
        + ["lib", "tests", "--ignore", "tests/book"],
        "notebooks (nbval)": [*pytest("notebooks"), "--nbval", "--nbval-current-env"]
        + ["--nbval-cell-timeout", "600", "-p", "no:cacheprovider", *notebooks],
        "pages from the stored outputs": [sys.executable, "book/tools/build.py", "html"],
        "book: pairs, environment, ledger, pages, faults": [*pytest("book"), "tests/book"],
    }
    # progress bars would be compared as output
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    results = {}
    for name, command in stages.items():
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        # two workers with one thread each: small matrices are slower on two threads than on one
        threads = {"OMP_NUM_THREADS": "1"} if "-n" in command else {}
        status = subprocess.run(command, cwd=ROOT, env=environment | threads).returncode
        results[name] = (status, time.monotonic() - started)
    print()
    for name, (status, seconds) in results.items():
        print(f"{name:<52}{seconds:>8.1f} s  {'ok' if status == 0 else 'FAILED'}")
    passed, failed, skipped = count()
    broken = sum(status != 0 for status, _ in results.values())
    if broken and not failed:
        failed = broken
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if broken else 0


def pytest(report: str) -> list[str]:
    """The command of a pytest stage that writes its counts to _build/tests."""
    return [*PYTEST, f"--junitxml={REPORTS / report}.xml"]


def count() -> tuple[int, int, int]:
    """Passed, failed and skipped tests over all stages."""
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for report in REPORTS.glob("*.xml"):
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            for key in total:
                total[key] += int(suite.get(key, 0))
    failed = total["failures"] + total["errors"]
    return total["tests"] - failed - total["skipped"], failed, total["skipped"]


if __name__ == "__main__":
    sys.exit(main())
