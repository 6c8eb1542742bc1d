"""Execute one notebook by papermill, or store an executed one as the reference for nbval."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm  # noqa: F401 - read before TQDM_DISABLE is set for the kernels

from feedforward.files import atomic_write
from feedforward.records import Provenance
from notebooks import Notebook, write
from steps import BUILD, StepFailed, step, terminal


def main() -> None:
    """Parse the command line and do one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", help="part/NN-name")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--store", type=Path, help="an executed notebook to keep as the reference")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    notebook = Notebook(options.notebook)
    if options.store:
        with step(f"store {notebook.name}"):
            store(notebook, options.store)
            with atomic_write(options.output, "w") as file:
                json.dump({"stored": notebook.stored}, file)
    else:
        with step(f"execute {notebook.name} ({options.profile})"):
            execute(notebook, options.profile, options.output)


def execute(notebook: Notebook, profile: str, output: Path) -> None:
    """Run every cell from the MyST source and write the result to `output`, whole or not at all.

    Raises:
        StepFailed: a cell raised; the message names it, the partial notebook and the log are kept.
    """
    scratch = BUILD / "executing" / profile / notebook.name
    partial, log = scratch.with_suffix(".partial.ipynb"), scratch.with_suffix(".log")
    source = scratch.with_suffix(".source.ipynb")
    write(notebook.read_source(), source)
    # only what differs is injected: a plain run shows the notebook's own parameters cell
    parameters = {} if profile == "smoke" else {"profile": profile}
    # inside the kernels a progress bar would end up in the stored outputs
    os.environ["TQDM_DISABLE"] = "1"
    started = time.monotonic()
    try:
        with open(log, "w") as log_file, terminal() as screen:
            executed = papermill.execute_notebook(
                str(source),
                str(partial),
                parameters,
                kernel_name="python3",
                cwd=str(notebook_folder(notebook)),
                progress_bar={
                    "desc": notebook.name,
                    "file": screen,
                    "leave": False,
                    "disable": not screen.isatty(),
                },
                stdout_file=log_file,
                stderr_file=log_file,
            )
    except PapermillExecutionError as error:
        with open(log, "a") as log_file:
            log_file.write(str(error))
        raise StepFailed(_explain(notebook, error, partial, log)) from error
    provenance = Provenance.here(seconds=time.monotonic() - started)
    executed = presentable(executed)
    executed.metadata["feedforward"] = run_of(provenance, profile)
    with atomic_write(output, "w", encoding="utf-8") as file:
        nbformat.write(executed, file)
    for left in (source, partial):
        left.unlink(missing_ok=True)


def notebook_folder(notebook: Notebook) -> Path:
    """The folder in which its code runs: the same for papermill, nbval and a reader."""
    return Path(notebook.source).resolve().parent


def presentable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed notebook as a reader should see it: one parameters cell, no stray warnings."""
    kept = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            values = [line for line in cell.source.splitlines() if not line.startswith("# Param")]
            names = {line.split("=")[0].strip() for line in values}
            before = kept[-1].source.splitlines()
            lines = [line for line in before if line.split("=")[0].strip() not in names]
            kept[-1].source = "\n".join([*values, *lines])
            continue
        for noise in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(noise, None)
        if cell.cell_type == "code":
            cell.outputs = _joined(o for o in cell.outputs if o.get("name") != "stderr")
        kept.append(cell)
    notebook.cells = kept
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    return notebook


def _joined(outputs: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs with what was printed in one go in one: a kernel sends it in pieces."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = kept[-1] if kept else None
        if last and last.output_type == output.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            kept.append(output)
    return kept


def run_of(provenance: Provenance, profile: str) -> dict:
    """What the page of runs says of one execution."""
    return {
        "profile": profile,
        "seconds": round(provenance.seconds, 1),
        "device": provenance.device,
        "threads": provenance.threads,
        "versions": dict(provenance.versions),
        "commit": provenance.commit,
        "dirty": provenance.dirty,
        "date": provenance.date or datetime.now(UTC).isoformat(timespec="seconds"),
    }


def store(notebook: Notebook, executed: Path) -> None:
    """Keep the outputs of `executed` in the book as what nbval compares with.

    Raises:
        StepFailed: a code cell was not executed, or the file would be too heavy for the book.
    """
    node = nbformat.read(executed, as_version=4)
    code = [cell for cell in node.cells if cell.cell_type == "code"]
    if not all(cell.execution_count for cell in code):
        raise StepFailed(f"{executed}: a code cell was not executed; nothing is stored")
    size = len(nbformat.writes(node))
    if size > 400_000:
        raise StepFailed(
            f"{executed}: {size:,} bytes; a stored notebook stays under 400,000. "
            "Draw smaller pictures (SVG only where it is small) or print less."
        )
    write(node, Path(notebook.stored))


def _explain(notebook: Notebook, error: PapermillExecutionError, partial: Path, log: Path) -> str:
    source = "\n".join("    " + line for line in error.source.splitlines()[:12])
    return (
        f"{notebook.source}: cell {error.cell_index} (code cell {error.exec_count}) raised "
        f"{error.ename}: {error.evalue}\n{source}\n"
        f"  up to there: {partial}\n  log: {log}"
    )


if __name__ == "__main__":
    sys.exit(main())
