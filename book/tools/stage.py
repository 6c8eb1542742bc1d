"""Stage the book for Jupyter Book: pages, executed or stored notebooks, ledger, runs, settings."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
import yaml

from feedforward import claims
from feedforward.files import atomic_write
from feedforward.profiles import EXPERIMENTS
from feedforward.records import Record, devices_of, load_records
from notebooks import BOOK, ROOT, find_notebooks
from steps import BUILD, StepFailed, step

STAGE = BUILD / "stage"
#: what the book shows or needs of files that live elsewhere in the checkout
BORROWED = {"changes.md": "CHANGELOG.md", "data.md": "data/README.md", "_toc.yml": "_toc.yml"}
#: of the page of runs, each with its rule in Markdown
RUN_COLUMNS = {
    "profile": "---",
    "seconds": "--:",
    "hardware": "---",
    "versions": "---",
    "date": "---",
    "commit": "---",
}


def main() -> None:
    """Parse the command line and stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("executed", nargs="*", type=Path)
    options = parser.parse_args()
    with step("stage the pages"):
        try:
            staged = stage(options.profile, options.executed)
        except ValueError as error:
            raise StepFailed(str(error)) from error
        with atomic_write(options.output, "w") as file:
            json.dump(staged, file, indent=1)


def stage(profile: str, executed: list[Path]) -> dict[str, str]:
    """Fill _build/stage, touching only what changed, so that Sphinx renders only that again."""
    fresh = {path.parent.name + "/" + path.stem: path for path in executed}
    notebooks = find_notebooks()
    shown = {n.name: fresh.get(n.name, ROOT / n.stored) for n in notebooks}
    pairs = {ROOT / file for n in notebooks for file in (n.source, n.stored)}
    contents = (ROOT / "_toc.yml").read_text()
    in_order = sorted(shown, key=contents.find)
    runs = {name: nbformat.read(shown[name], as_version=4) for name in in_order}

    content: dict[str, bytes] = {}
    for path in sorted(BOOK.rglob("*")):
        relative = path.relative_to(BOOK)
        if path.is_file() and path not in pairs and relative.parts[0] != "tools":
            content[relative.as_posix()] = path.read_bytes()
    for name, notebook in runs.items():
        content[f"{name}.ipynb"] = nbformat.writes(hide_plumbing(notebook)).encode()
    generated = {
        "ledger": claims.ledger_markdown,
        "ledger-summary": claims.ledger_summary,
        "runs": lambda: runs_table(runs),
        "recorded": lambda: recorded_table(
            record for experiment in EXPERIMENTS for record in load_records(experiment)
        ),
    }
    for name, page in content.items():
        if name.endswith(".md"):
            for marker, make in generated.items():
                mark = f"<!-- generated: {marker} -->".encode()
                if mark in page:
                    page = page.replace(mark, make().encode())
            content[name] = page
    for name, path in BORROWED.items():
        content[name] = (ROOT / path).read_bytes()
    content["_config.yml"] = settings((ROOT / "_config.yml").read_text()).encode()
    _write(content)
    return {name: str(path) for name, path in shown.items()}


def hide_plumbing(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Fold what is not the point of a page: the parameters and the setup cell."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if {"parameters", "setup"} & set(tags) and "hide-input" not in tags:
            cell.metadata["tags"] = [*tags, "hide-input"]
    return notebook


def runs_table(runs: dict[str, nbformat.NotebookNode]) -> str:
    """The page of runs: one row a notebook, from the facts noted when it was executed.

    What would be the same in every row of a wide column is said once, above the table.
    """
    rows = {name: _run_row(book.metadata.get("feedforward")) for name, book in runs.items()}
    executed = [row for row in rows.values() if row]
    shared = {
        column: executed[0][column]
        for column in ("hardware", "versions")
        if executed and len({row[column] for row in executed}) == 1
    }
    columns = {name: rule for name, rule in RUN_COLUMNS.items() if name not in shared}
    lines = [f"Every chapter: {'; '.join(shared.values())}.", ""] if shared else []
    lines += [f"| chapter | {' | '.join(columns)} |", f"|---|{'|'.join(columns.values())}|"]
    for name, row in rows.items():
        shown = row or dict.fromkeys(columns, "") | {"profile": "not executed yet"}
        lines.append(f"| [](/{name}) | {' | '.join(shown[column] for column in columns)} |")
    return "\n".join(lines)


def _run_row(run: dict | None) -> dict[str, str] | None:
    if not run:
        return None
    commit = f"`{run['commit'][:7]}`" if run["commit"] else "none"
    return {
        "profile": run["profile"],
        "seconds": f"{run['seconds']:.1f}",
        "hardware": f"{run['device']}, {run['threads']} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "date": run["date"][:16].replace("T", " "),
        "commit": commit + (" (changed)" if run["dirty"] else ""),
    }


def recorded_table(records: Iterable[Record]) -> str:
    """What was recorded: one row for each experiment and profile, in the order of the records."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.experiment, record.profile), []).append(record)
    head = "| experiment | profile | arms | runs | hours | hardware | from | to |"
    rows = [head, "|---|---|--:|--:|--:|---|---|---|"]
    for (experiment, profile), runs in found.items():
        arms = len({run.variant for run in runs})
        # hyphens that no line breaks at
        dates = sorted(run.provenance.date[:10].replace("-", "\u2011") for run in runs)
        cells = [f"`{experiment}`", profile, arms, len(runs), _hours(runs), devices_of(runs)]
        rows.append("| " + " | ".join(map(str, [*cells, dates[0], dates[-1]])) + " |")
    every = [run for runs in found.values() for run in runs]
    rows.append(f"| all | | | {len(every)} | {_hours(every)} | | | |")
    return "\n".join(rows)


def _hours(runs: list[Record]) -> str:
    hours = sum(run.provenance.seconds for run in runs) / 3600
    return f"{hours:.1f}" if hours >= 0.05 else "< 0.1"


def settings(text: str) -> str:
    """_config.yml as Jupyter Book wants it: buttons only where a repository's address is set."""
    config = yaml.safe_load(text)
    repository = config.get("repository") or {}
    address = (repository.get("url") or "").rstrip("/")
    theme = config["sphinx"]["config"]["html_theme_options"]
    if address:
        theme |= {
            "repository_url": address,
            "repository_branch": repository.get("branch") or "main",
            "path_to_docs": "book",
            "use_repository_button": True,
            "use_edit_page_button": True,
            "use_issues_button": True,
            "launch_buttons": {
                "notebook_interface": "jupyterlab",
                "binderhub_url": "https://mybinder.org",
                "colab_url": "https://colab.research.google.com",
            },
        }
    else:
        config.pop("repository", None)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _write(content: dict[str, bytes]) -> None:
    for path in sorted(STAGE.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(STAGE).as_posix() not in content:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)
    for name, data in content.items():
        target = STAGE / name
        if not target.exists() or target.read_bytes() != data:
            with atomic_write(target) as file:
                file.write(data)


if __name__ == "__main__":
    sys.exit(main())
