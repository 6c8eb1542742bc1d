"""The build goes on after a kill, does nothing twice, and says what went wrong.

The tests share one small book and run in the order in which they stand.
"""

import json
import os
import signal
import time

import pytest


def executed(output: str) -> list[str]:
    """Names of the chapters that a build says it has executed."""
    lines = [line for line in output.splitlines() if line.startswith("execute ")]
    return sorted(line.split()[1].split("/")[1] for line in lines if line.endswith(" s"))


def test_builds_without_git_in_a_path_with_spaces_with_a_home_nobody_can_write(small_book):
    status, output = small_book.first_build
    assert status == 0, output
    assert executed(output) == ["01-first", "02-second"]
    assert small_book.page.exists()
    assert str(small_book.page) in output
    made = small_book.root / "_build" / "executed" / "smoke" / "foundations" / "01-first.ipynb"
    assert json.loads(made.read_text())["cells"][-1]["outputs"][0]["text"] == ["None\n"]


def test_nothing_changed_does_nothing(small_book):
    status, output = small_book.build()
    assert status == 0
    assert "nothing to do" in output


@pytest.mark.parametrize(
    ("module", "chapters"),
    [
        ("layers/structured.py", ["01-first"]),
        ("layers/routing.py", ["02-second"]),
        ("layers/guided.py", []),
        ("records.py", ["01-first"]),
        ("files.py", ["01-first"]),
    ],
)
def test_a_changed_module_concerns_exactly_its_users(small_book, module, chapters):
    path = small_book.root / "lib" / "feedforward" / module
    before = path.read_text()
    path.write_text(before + "\n_CHANGED = True\n")
    assert small_book.planned() == chapters
    path.write_text(before)
    assert small_book.planned() == []


def test_an_edited_notebook_counts_as_much_as_an_edited_source(small_book):
    stored = small_book.root / "book" / "foundations" / "01-first.ipynb"
    notebook = json.loads(stored.read_text())
    notebook["cells"][-1]["source"] = "print(1 + 3)"
    stored.write_text(json.dumps(notebook))
    later = time.time() + 2
    os.utime(stored, (later, later))
    status, output = small_book.build()
    assert status == 0
    assert "01-first.md follows" in output
    assert "print(1 + 3)" in stored.with_suffix(".md").read_text()
    assert executed(output) == ["01-first"]


def test_a_killed_build_goes_on_and_repeats_nothing(small_book):
    small_book.chapter("01-first", "print('quick')")
    small_book.chapter("02-second", "import time; time.sleep(20); print('slow')")
    log = small_book.root / "_build" / "snakemake.log"
    for of_the_build_before in (log, log.with_name("steps.jsonl")):
        of_the_build_before.write_text("")
    # both start at once; killed when the first is done and the second still at work
    process = small_book.start("book", "--cores", "4")
    wait_for(lambda: "execute foundations/01-first (smoke)" in steps_of(small_book), 60)
    # and the engine has heard of it
    wait_for(lambda: "Finished jobid" in log.read_text(), 10)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    status, output = small_book.build()
    assert status == 0, output
    assert executed(output) == ["02-second"]


def steps_of(book) -> list[str]:
    steps = book.root / "_build" / "steps.jsonl"
    lines = steps.read_text().splitlines() if steps.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def test_two_builds_at_once(small_book):
    small_book.chapter("02-second", "print('both')")
    first, second = small_book.start("book"), small_book.start("book")
    outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert sorted(map(executed, outputs)) == [[], ["02-second"]]
    assert any("another build is running" in output for output in outputs)


def test_a_cell_that_raises(small_book):
    before = small_book.page.read_text()
    small_book.chapter("02-second", "x = 6\nraise ValueError('seven is wrong')")
    status, output = small_book.build()
    assert status != 0
    assert "foundations/02-second.md: cell 2" in output
    assert "ValueError: seven is wrong" in output
    assert "the earlier book is still at" in output
    assert small_book.page.read_text() == before
    kept = small_book.root / "_build" / "executing" / "smoke" / "foundations"
    assert "seven is wrong" in (kept / "02-second.log").read_text()
    assert "raise ValueError" in (kept / "02-second.partial.ipynb").read_text()
    small_book.chapter("02-second", "print('both')")


def test_a_warning_in_a_page_fails_the_build_and_keeps_the_book(small_book):
    before = small_book.page.read_text()
    intro = small_book.root / "book" / "intro.md"
    intro.write_text("# A small book\n\nSee {ref}`nowhere`.\n")
    status, output = small_book.build("html")
    assert status != 0
    assert "nowhere" in output
    assert small_book.page.read_text() == before
    intro.write_text("# A small book\n")


def test_unknown_profile_and_part(small_book):
    status, output = small_book.build("book", "--profile", "smokee")
    assert status == 2
    assert "smoke" in output
    assert "gpu" in output
    status, output = small_book.build("book", "--part", "foundation")
    assert status == 2
    assert "foundations" in output
    assert "Traceback" not in output
