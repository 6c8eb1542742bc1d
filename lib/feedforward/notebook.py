"""What the chapters' cells call: set up, show the library's source, check numbers, print tables.

Every text that these functions print is the same on any machine, so that the regression of the
notebooks can compare it; what varies with the machine is shown by :func:`caption` alone.
"""

import ast
import difflib
import html
import inspect
import itertools
import logging
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedforward import plotting
from feedforward.claims import with_minus
from feedforward.memory import reuse_memory
from feedforward.profiles import Profile, check_parameters, unknown
from feedforward.records import Record, describe_device
from feedforward.training import seed_everything

if TYPE_CHECKING:
    import torch


class OutsideBand(AssertionError):
    """A measured value lies outside the band that the notebook declares for it."""


@dataclass(frozen=True)
class Context:
    """What a notebook runs with: its checked parameters.

    Args:
        profile: the scale.
        seed: that every random generator was seeded with.
        device: to compute on.
    """

    profile: Profile
    seed: int
    device: "torch.device"

    @property
    def hardware(self) -> str:
        """The device and the threads in words; it varies with the machine."""
        import torch

        threads = torch.get_num_threads()
        return f"{describe_device(self.device)}, {threads} thread{'s' * (threads != 1)}"


def setup(profile: str, seed: int, device: str = "auto") -> Context:
    """Check the parameters cell, seed everything, set the figures' style, and say so in one line.

    Explained in ``book/how-to-read``.

    Args:
        profile: a profile's name.
        seed: a whole number from 0 to 2**32 - 1.
        device: a device's name; ``"auto"`` is the one that the profile is made for.

    Raises:
        ValueError: if a parameter has a wrong type or value.
    """
    import torch

    context = Context(*check_parameters(profile, seed, device))
    # a container may offer fewer processors than the machine has
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
    reuse_memory()
    _quieten()
    seed_everything(seed)
    plotting.style()
    purpose = context.profile.purpose
    print(f"Profile {profile}: {purpose}. Seed {seed}, {context.device.type}.")
    return context


def show_source(thing: Any, *, start: str | None = None, end: str | None = None) -> None:
    """Show the library's current source of something, highlighted, without its docstrings.

    Args:
        thing: a function, method, class or module.
        start: show from the first line that contains this text on; by default from the top.
        end: show up to the next line that contains this text; by default to the end.

    Raises:
        ValueError: if there is no Python source of it, or no line contains `start` or `end`.
    """
    from IPython.display import display

    name, file, lines = _source(thing)
    first = _find(lines, start, 0, name) if start is not None else 0
    last = _find(lines, end, first, name) if end is not None else len(lines) - 1
    code = textwrap.dedent("\n".join(lines[first : last + 1])).strip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    title = f"`{name}` in `{file}`"
    content = {
        "text/markdown": f"{title}\n\n{fence}python\n{code}\n{fence}\n",
        "text/plain": f"{name} in {file}\n\n{code}",
    }
    display(content, raw=True)


def check(
    name: str, value: Any, low: float | None = None, high: float | None = None, unit: str = ""
) -> None:
    """Raise if a value lies outside its band, and print the band, never the value.

    So the text is the same on every processor, while a change of the result is still an error.

    >>> check("share of the FFN", 0.66, 0.6, 0.7)
    share of the FFN: within 0.6 to 0.7
    >>> check("perplexity", 31.4, high=40)
    perplexity: at most 40

    Args:
        name: of the value, as a reader knows it.
        value: a number, or a tensor or array of one number.
        low: the least allowed value; None for no limit.
        high: the largest allowed value; None for no limit.
        unit: printed after the band.

    Raises:
        OutsideBand: if the value is outside, or not a number.
        ValueError: if the band is empty or missing.
    """
    if low is None and high is None:
        raise ValueError(f"the band of {name!r} has no end; give low, high or both")
    floor, ceiling = -math.inf if low is None else low, math.inf if high is None else high
    if not floor <= ceiling:
        raise ValueError(f"the band of {name!r} is empty: low {low!r} is above high {high!r}")
    if high is None:
        band = f"at least {low:g}"
    elif low is None:
        band = f"at most {high:g}"
    else:
        band = f"within {low:g} to {high:g}"
    band = f"{band} {unit}".rstrip()
    number = float(value.detach() if hasattr(value, "detach") else value)
    if not floor <= number <= ceiling:
        raise OutsideBand(
            f"{name} is {number:g}, declared {band}. The code, a library or the data changed the "
            "result: find out which before widening the band."
        )
    print(f"{name}: {band}")


@dataclass(frozen=True)
class Table:
    """A table that shows as HTML in the colours of the page, and as text elsewhere."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    caption: str = ""

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        texts = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, self.numeric, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*([self.caption] if self.caption else []), *texts])

    def _repr_html_(self) -> str:
        # the class keeps the theme from painting a light box around it in the dark
        parts = ['<table class="dataframe">']
        if self.caption:
            parts.append(f"<caption>{html.escape(self.caption)}</caption>")
        parts.append(f"<thead>{self._row(self.columns, 'th')}</thead><tbody>")
        parts += [self._row(row, "td") for row in self.rows]
        return "\n".join([*parts, "</tbody></table>"])

    def _row(self, cells: Iterable[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        sides = ' style="text-align:left"', ' style="text-align:right"'
        marked = (
            f"<{tag}{scope}{sides[right]}>{html.escape(_typeset(cell))}</{tag}>"
            for cell, right in zip(cells, self.numeric, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"


def _typeset(cell: str) -> str:
    """The cell with minus signs, and with numbers that keep to their signs where lines break."""
    spaced = re.sub(r"(?<=\d) ?%", "\N{NO-BREAK SPACE}%", with_minus(cell))
    return spaced.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def table(rows: Any, *, caption: str = "", formats: Mapping[str, str] | None = None) -> Table:
    """A plain table of rows, readable in both themes and on a phone.

    >>> table([{"layer": "dense", "parameters": 2359296}], formats={"parameters": ","})
    layer  parameters
    dense   2,359,296

    Args:
        rows: a list of dicts with the same keys, or a pandas DataFrame (its index is left out).
        caption: above the table.
        formats: column -> how to format its numbers, as in ``format(number, ".2f")``; by default
            whole numbers as they are and others with four digits.

    Raises:
        ValueError: if there are no rows, the rows have different keys, or a format has no column.
    """
    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    rows, formats = list(rows), dict(formats or {})
    if not rows or not rows[0] or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("a table needs one row or more, all with the same columns")
    columns = list(rows[0])
    if unknown := formats.keys() - set(columns):
        raise ValueError(f"formats names {sorted(unknown)}; the columns are {columns}")
    numeric = [all(_is_number(row[column]) for row in rows) for column in columns]
    return Table(
        columns=tuple(map(str, columns)),
        rows=tuple(tuple(_cell(row[c], formats.get(c)) for c in columns) for row in rows),
        numeric=tuple(numeric),
        caption=caption,
    )


@dataclass(frozen=True)
class Diff:
    """Two texts in one, with what went, what came, and what is protected.

    Each kind has a sign beside its colour: struck through, underlined, bold.
    """

    pieces: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        signs = {"same": "", "del": "[-%s-]", "ins": "{+%s+}", "b": "«%s»"}
        return "".join(signs[kind] % text if signs[kind] else text for kind, text in self.pieces)

    def _repr_html_(self) -> str:
        colors = {"del": plotting.PALETTE[4], "ins": plotting.PALETTE[2], "b": plotting.PALETTE[0]}
        shown = (
            f'<{kind} style="background:{colors[kind]}2e;border-radius:2px">{html.escape(text)}'
            f"</{kind}>"
            if kind in colors
            else html.escape(text)
            for kind, text in self.pieces
        )
        return f'<p class="text-diff" style="line-height:1.8">{"".join(shown)}</p>'


def diff(before: Any, after: Any) -> Diff:
    """What became of a text, word by word, in colours that suit both themes.

    >>> from feedforward.augment.spans import ProtectedText
    >>> rome = ProtectedText("A big dog in Rome.", ((13, 17),))
    >>> diff(rome, rome.edit([(2, 5, "large, old")]))
    A [-big-] {+large, old+} dog in «Rome».

    Args:
        before: a text, or an object with ``text`` and protected ``spans``, whose words are the same
            only as protected ones.
        after: what was made of it.
    """
    old, new = _words(before), _words(after)
    matcher = difflib.SequenceMatcher(None, [w[1:] for w in old], [w[1:] for w in new], False)
    pieces: list[tuple[str, str]] = []

    def add(kind: str, words: Iterable[tuple[str, str, bool]]) -> None:
        for space, word, protected in words:
            now = "b" if kind == "same" and protected else kind
            if pieces and pieces[-1][0] == now:
                pieces[-1] = now, pieces[-1][1] + space + word
            else:
                # the space stays outside the mark; two marks never touch
                gap = space or " " * (now != "same" and bool(pieces) and pieces[-1][0] == "del")
                pieces.extend([("same", gap)] if gap else [])
                pieces.append((now, word))

    kind_before = ""
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            # what went took the space that stood before the first word
            between = old[a][0] if kind_before == "delete" else ""
            add("same", [(new[c][0] or between, *new[c][1:]), *new[c + 1 : d]])
        else:
            add("del", old[a:b])
            add("ins", new[c:d])
        kind_before = kind
    return Diff(tuple(pieces))


def _words(given: Any) -> list[tuple[str, str, bool]]:
    """Words and marks of a text, each with the space before it and whether it is protected."""
    text, spans = getattr(given, "text", given), getattr(given, "spans", ())
    edges = sorted({0, len(text), *itertools.chain.from_iterable(spans)})
    words, space = [], ""
    for start, end in itertools.pairwise(edges):
        protected = any(low <= start and end <= high for low, high in spans)
        for token in re.findall(r"\s+|\w+(?:['’.-]\w+)*|[^\w\s]", text[start:end]):
            if token.isspace():
                space += token
            else:
                words.append((space, token, protected))
                space = ""
    return words


def caption(recorded: Record | Iterable[Record] = (), live: Record | Iterable[Record] = ()) -> None:
    """Show where a figure's numbers come from; it varies with the machine.

    Args:
        recorded: the records behind the lines.
        live: the records behind the dots.
    """
    from IPython.display import display

    text = plotting.caption(recorded, live)
    content = {"text/html": f'<p class="run-caption">{html.escape(text)}</p>', "text/plain": text}
    display(content, raw=True)


def verdicts(*claims: str) -> Table:
    """Rows of the ledger: claims with the paper's number, ours, and the computed verdict.

    Args:
        claims: their ids, for instance ``"ffn-4"``.

    Raises:
        ValueError: if a claim is unknown.
    """
    from feedforward.claims import current_verdicts, ledger_rows

    rows = {row["claim"]: row for row in ledger_rows(current_verdicts())}
    if missing := [claim for claim in claims if claim not in rows]:
        raise ValueError(unknown("claim", missing[0], rows))
    columns = ("claim", "the paper", "ours", "verdict", "because")
    return table([{column: rows[claim][column] for column in columns} for claim in claims])


def _quieten() -> None:
    """No progress bars of downloads, no advice from transformers, no warning about forks."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="IProgress not found")


def _source(thing: Any) -> tuple[str, str, list[str]]:
    """The qualified name, the file below the import path, and the lines without docstrings."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    module = thing if inspect.ismodule(thing) else inspect.getmodule(thing)
    try:
        lines, _ = inspect.getsourcelines(thing)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"there is no Python source of {thing!r}; give a function, method, class or module"
        ) from error
    qualified = getattr(thing, "__qualname__", "")
    name = ".".join(filter(None, [module.__name__, qualified]))
    file = Path(*module.__name__.split("."))
    own = Path(inspect.getsourcefile(module))
    file = file / own.name if own.name == "__init__.py" else file.with_suffix(".py")
    code = textwrap.dedent("".join(lines))
    return name, file.as_posix(), _without_docstrings(code)


def _without_docstrings(code: str) -> list[str]:
    lines = code.splitlines()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None and len(node.body) > 1:
            text = node.body[0]
            # the blank lines after it go too
            end = next(i for i in range(text.end_lineno, len(lines) + 1) if _code_at(lines, i))
            lines[text.lineno - 1 : end] = [None] * (end - text.lineno + 1)
    return [line for line in lines if line is not None]


def _code_at(lines: list[str | None], index: int) -> bool:
    return index == len(lines) or bool(lines[index] and lines[index].strip())


def _find(lines: list[str], text: str, begin: int, name: str) -> int:
    for number in range(begin, len(lines)):
        if text in lines[number]:
            return number
    raise ValueError(f"no line of {name} contains {text!r}" + " after the start" * bool(begin))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any, spec: str | None) -> str:
    if spec is not None and _is_number(value):
        return format(value, spec)
    return f"{value:.4g}" if _is_number(value) and not isinstance(value, Integral) else str(value)
