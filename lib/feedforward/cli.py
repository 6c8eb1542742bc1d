"""The command line: ``feedforward run | list | claims | data | env``."""

import dataclasses
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

from feedforward.memory import reuse_memory
from feedforward.profiles import (
    EXPERIMENTS,
    PROFILES,
    Plan,
    get_profile,
    load_experiment,
    resolve_device,
    seeds_of,
    unknown,
)
from feedforward.records import (
    Record,
    agreed,
    cached,
    is_first_process,
    is_run_of,
    load_records,
    recorded,
    result_path,
)

# What a command needs beyond these loads inside it: the help is there at once.

LARGEST_SEED = 2**32 - 1
STATUSES = ("recorded", "outdated", "not recorded")


class ManyValues(TyperCommand):
    """A command whose list options take several values: ``--seeds 0 1 2``.

    Typer's own form, ``--seeds 0 --seeds 1``, works as well. The name of a part ends a list, so
    that options may stand before it, as the usage has it.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        lists = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        return super().parse_args(ctx, list(_repeat_options(args, lists)))


app = typer.Typer(
    help="Rethinking the feed-forward layer: run and inspect the book's experiments.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Part = Annotated[str, typer.Argument(help=f"A part of the book: {', '.join(EXPERIMENTS)}.")]
ProfileName = Annotated[str, typer.Option("--profile", help=f"{', '.join(PROFILES)}.")]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run that the command line may start: a variant of an experiment with a seed."""

    profile: str
    variant: str
    seed: int
    config: Any

    @property
    def name(self) -> str:
        """As its record's file is called, without suffix."""
        return f"{self.config.experiment}/{self.profile}/{self.variant}-s{self.seed}"

    @property
    def status(self) -> str:
        """One of ``STATUSES``; outdated is a record of another configuration or of other data."""
        path = result_path(self.config.experiment, self.profile, self.variant, self.seed)
        if not path.exists():
            return "not recorded"
        return "recorded" if is_run_of(Record.load(path), self.config) else "outdated"


@app.command(cls=ManyValues)
def run(
    part: Part,
    profile: ProfileName = "smoke",
    seeds: Annotated[
        list[int] | None,
        typer.Option(
            help="One or more; the experiment's own if not given.", min=0, max=LARGEST_SEED
        ),
    ] = None,
    variants: Annotated[
        list[str] | None, typer.Option(help="One or more; all if not given.")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="i/n: only the i-th of n equal shares of the runs.")
    ] = "1/1",
    record: Annotated[
        bool, typer.Option("--record", help="Keep them under results/, for the book.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would run, and what it costs.")
    ] = False,
) -> None:
    """Run the experiment of a part; what was run before is loaded, what was killed continues."""
    scale = get_profile(profile)
    if record and not scale.evidence:
        kept = [name for name, other in PROFILES.items() if other.evidence]
        raise ValueError(f"profile {profile!r} is never evidence: record one of {', '.join(kept)}")
    experiment = load_experiment(part)
    grid = experiment.grid(part, profile)
    jobs = _shard(_jobs(grid, profile, seeds or seeds_of(part, profile), variants), shard)
    heads = [f"[{number}/{len(jobs)}] {job.name}" for number, job in enumerate(jobs, start=1)]
    if dry_run:
        for head, job in zip(heads, jobs, strict=True):
            print(f"{head}  {job.status}")
        if hasattr(experiment, "plan"):
            configs = {job.variant: job.config for job in reversed(jobs)}
            _show(experiment.plan(profile, [configs[name] for name in grid if name in configs]))
        return
    device = resolve_device(scale.device)
    reuse_memory()
    for head, job in zip(heads, jobs, strict=True):
        if record and agreed(job.status) == "recorded":
            _say(f"{head}  recorded")
            continue
        _say(f"{head}  ...", file=sys.stderr)
        bar = sys.stderr.isatty()
        kept = ", recorded" if agreed(recorded(job.config)) else ""
        options = {"progress": bar, "device": device}
        result = cached(experiment.run, job.config, profile=profile, **options)
        result = dataclasses.replace(result, profile=profile)
        if record and is_first_process():
            result.save(result_path(result.experiment, profile, result.variant, result.seed))
        _say(f"{head}  {result.provenance.seconds:.1f} s{kept}  {_numbers(result)}")


@app.command("list")
def list_(
    part: Annotated[
        str | None, typer.Argument(help="A part of the book; all if not given.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help=f"{', '.join(PROFILES)}; all if not given.")
    ] = None,
) -> None:
    """List the experiments, their variants, and the seeds that are recorded."""
    names = [get_profile(profile).name] if profile else list(PROFILES)
    rows = []
    for each in [part] if part else EXPERIMENTS:
        experiment = load_experiment(each)
        for name in names:
            try:
                grid = experiment.grid(each, name)
            except ValueError:
                if part and profile:
                    raise
                continue  # no part has a setting for every profile
            found = {record.seed for record in load_records(each, profile=name)}
            seeds = sorted(found.union(seeds_of(each, name)))
            for variant in grid:
                jobs = _jobs(grid, name, seeds, [variant])
                rows.append((each, name, variant, *(_seeds(jobs, status) for status in STATUSES)))
    _table(("part", "profile", "variant", *STATUSES), rows)


@app.command()
def claims(
    paper: Annotated[str | None, typer.Option(help="Only this paper's: its short name.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only those with this verdict.")] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Only how many have which verdict, in Markdown.")
    ] = False,
) -> None:
    """Show the ledger: every claim, the paper's number, ours, and the verdict."""
    from feedforward import claims as ledger

    if paper is not None and paper not in ledger.PAPERS:
        raise ValueError(unknown("paper", paper, ledger.PAPERS))
    if verdict is not None and verdict not in ledger.VERDICTS:
        raise ValueError(unknown("verdict", verdict, ledger.VERDICTS))
    chosen = [
        one
        for one in ledger.current_verdicts()
        if paper in (None, one.claim.paper) and verdict in (None, one.verdict)
    ]
    if summary:
        print(ledger.ledger_summary(chosen), end="")
        return
    columns = ("claim", "verdict", "scale", "because", "ours", "the paper")
    rows = ledger.ledger_rows(chosen)
    _table(columns, [[row[column] for column in columns] for row in rows])


@app.command()
def data(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets; all if not given.")] = None,
) -> None:
    """Check what comes with the book against its checksums; prepare the texts and questions."""
    from feedforward.embedded import pieces, prepare

    known = pieces()
    for name in names or ():
        if name not in known:
            raise ValueError(unknown("data", name, known))
    chosen = list(dict.fromkeys(names or known))
    columns = ("name", "title", "source", "content", "bytes", "sha256", "licence")
    rows = []
    for number, name in enumerate(chosen, start=1):
        _say(f"[{number}/{len(chosen)}] {name}  ...", file=sys.stderr)
        piece = prepare(name)
        rows.append(
            (
                name,
                piece.title,
                piece.source,
                piece.content,
                f"{piece.bytes:,}",
                piece.sha256[:12],
                piece.licence,
            )
        )
    _table(columns, rows)


@app.command()
def env() -> None:
    """Show the machine, the versions, and where results and caches lie."""
    import torch

    from feedforward.files import cache_directory, results_directory
    from feedforward.records import Provenance, describe_device

    here = Provenance.here(seconds=0.0)
    fastest = resolve_device("auto")
    state = {True: " with changes", False: "", None: ""}[here.dirty]
    rows = [
        ("python", here.python),
        *((name, version or "not installed") for name, version in here.versions.items()),
        ("processor", f"{describe_device('cpu')}, {torch.get_num_threads()} threads"),
        ("device", f"{fastest}: {describe_device(fastest)}" if fastest.type != "cpu" else "cpu"),
        ("cache", str(cache_directory())),
        ("results", str(results_directory())),
        ("commit", f"{here.commit[:12]}{state}" if here.commit else "not in a git checkout"),
        ("lock", here.lock or "none"),
    ]
    _table(None, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake in what was asked for ends it with one line and status 2.

    Args:
        arguments: by default those of the process.
    """
    try:
        app(arguments, prog_name="feedforward")
    except Exception as error:
        expected = isinstance(error, ValueError | FloatingPointError | OSError)
        if not expected and not type(error).__module__.startswith("feedforward."):
            raise
        print(f"feedforward: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


# -- jobs and tables -------------------------------------------------------------------------------


def _repeat_options(args: Iterable[str], lists: set[str]) -> Iterator[str]:
    """``--seeds 0 1`` as ``--seeds 0 --seeds 1``, for the options named in `lists`."""
    current, first = None, False
    for arg in args:
        if arg.startswith("-"):
            name, has_value, _ = arg.partition("=")
            current, first = (name if name in lists else None), not has_value
        elif arg in EXPERIMENTS and not first:
            current = None
        elif current and not first:
            yield current
        else:
            first = False
        yield arg


def _jobs(
    grid: Mapping[str, Any], profile: str, seeds: Sequence[int], variants: Sequence[str] | None
) -> list[Job]:
    """The runs asked for, seed by seed, so that an early stop leaves whole comparisons."""
    for variant in variants or ():
        if variant not in grid:
            raise ValueError(unknown("variant", variant, grid))
    return [
        Job(profile, variant, seed, dataclasses.replace(grid[variant], seed=seed))
        for seed in dict.fromkeys(seeds)
        for variant in dict.fromkeys(variants or grid)
    ]


def _shard(jobs: list[Job], shard: str) -> list[Job]:
    own, _, count = shard.partition("/")
    if not (own.isdecimal() and count.isdecimal() and 1 <= int(own) <= int(count)):
        raise ValueError(f"shard is {shard!r}; write i/n with i from 1 to n, for instance 2/4")
    return jobs[int(own) - 1 :: int(count)]


def _say(line: str, file: TextIO | None = None) -> None:
    """Print a line at once; of the processes of torchrun one does."""
    if is_first_process():
        print(line, file=file, flush=True)


def _show(plan: Plan) -> None:
    """Print what runs would cost."""
    print()
    _table(plan.columns, plan.rows)
    for block in (plan.notes, plan.commands):
        print(end="\n" if block else "")
        for text in block:
            print(text if block is plan.commands else textwrap.fill(text, 98, **_HANGING))


_HANGING = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}


def _numbers(record: Record) -> str:
    scalars = {k: v for k, v in record.metrics.items() if isinstance(v, (int, float))}
    return "  ".join(
        f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in scalars.items()
    )


def _seeds(jobs: Iterable[Job], status: str) -> str:
    return " ".join(str(job.seed) for job in jobs if job.status == status)


def _table(columns: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns, in plain text that a pipe can take."""
    lines = [*([columns] if columns else []), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
