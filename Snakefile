"""data -> runs -> notebooks -> stage -> html

    snakemake book --config profile=smoke part=all      what `make book` asks for
    snakemake html --config execute=False               the stored outputs, rendered
    snakemake runs --config profile=cpu part=foundations    recorded runs into results/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "book" / "tools"))
from notebooks import Notebook, find_notebooks
from feedforward import profiles

PYTHON = sys.executable
PROFILE = config.get("profile", "smoke")
PART = config.get("part", "all")
EXECUTE = str(config.get("execute", True)) != "False"

NOTEBOOKS = {notebook.name: notebook for notebook in find_notebooks()}
CHOSEN = [n for n in NOTEBOOKS.values() if EXECUTE and PART in ("all", n.part)]
STATIC = [str(p) for p in sorted(Path("book").rglob("*")) if p.is_file()
          and "tools" not in p.parts and not NOTEBOOKS.get(str(p.relative_to("book").with_suffix("")))]
RESULTS = sorted(map(str, Path("results").rglob("*.json")))


def executed(notebook):
    return f"_build/executed/{PROFILE}/{notebook.name}.ipynb"


def planned_records(wildcards):
    return [
        f"results/{name}/{PROFILE}/{variant}-s{seed}.json"
        for name in profiles.experiments_of(PART)
        for variant in profiles.load_experiment(name).grid(name, PROFILE)
        for seed in profiles.seeds_of(name, PROFILE)
    ]


wildcard_constraints:
    notebook=r"[\w-]+/\d\d-[\w-]+",


localrules:
    book,
    html,
    references,
    stage,
    render,


rule book:
    input:
        "_build/data.json",
        "_build/html.json",


rule html:
    input:
        "_build/html.json",


rule references:
    input:
        "_build/data.json",
        expand("_build/references/{notebook}.json", notebook=[n.name for n in CHOSEN]),


rule runs:
    input:
        planned_records,


rule data:
    input:
        registry="data/registry.toml",
        code=lambda w: Notebook.modules_behind("feedforward.embedded"),
    output:
        "_build/data.json",
    # First and alone. No chapter waits for this file: each names the registry and the code that it
    # reads texts with, so that a change there concerns the chapters that read texts, and no other.
    priority: 10
    threads: 2
    shell:
        "{PYTHON:q} book/tools/prepare.py {output:q}"


rule record:
    output:
        "results/{part}/{profile}/{variant}-s{seed}.json",
    shell:
        "{PYTHON:q} -m feedforward.cli run {wildcards.part} --profile {wildcards.profile}"
        " --variants {wildcards.variant} --seeds {wildcards.seed} --record"


rule execute:
    input:
        source=lambda w: NOTEBOOKS[w.notebook].source,
        code=lambda w: NOTEBOOKS[w.notebook].modules,
        results=lambda w: NOTEBOOKS[w.notebook].results,
        registry=lambda w: NOTEBOOKS[w.notebook].registry,
        tool="book/tools/execute.py",
    output:
        "_build/executed/{profile}/{notebook}.ipynb",
    threads: 2
    resources:
        runtime=60,
        mem_mb=8000,
    shell:
        "{PYTHON:q} book/tools/execute.py {wildcards.notebook:q} --profile {wildcards.profile:q} --output {output:q}"


rule reference:
    input:
        "_build/executed/smoke/{notebook}.ipynb",
    output:
        "_build/references/{notebook}.json",
    shell:
        "{PYTHON:q} book/tools/execute.py {wildcards.notebook:q} --store {input:q} --output {output:q}"


rule stage:
    input:
        executed=[executed(notebook) for notebook in CHOSEN],
        stored=[n.stored for n in NOTEBOOKS.values() if n not in CHOSEN],
        pages=STATIC,
        results=RESULTS,
        code=Notebook.modules_behind("feedforward.claims"),
        config=["_config.yml", "_toc.yml", "CHANGELOG.md", "data/README.md"],
        tool="book/tools/stage.py",
    params:
        profile=PROFILE if EXECUTE else "stored",
        part=PART,
    output:
        "_build/stage.json",
    shell:
        "{PYTHON:q} book/tools/stage.py --profile {params.profile:q} --output {output:q} -- {input.executed:q}"


rule render:
    input:
        "_build/stage.json",
        tool="book/tools/render.py",
        links="book/tools/chapter_links.py",
        library=sorted(map(str, Path("lib").rglob("*.py"))),
    output:
        "_build/html.json",
    shell:
        "{PYTHON:q} book/tools/render.py --output {output:q}"
