"""Figures in one style: readable in the light and the dark theme, on a phone, and without colour.

A line with a band is what was recorded; dots are what ran on the reader's machine. Every arm of a
comparison has its own colour and marker through the whole book.
"""

import html
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from feedforward.records import Record, devices_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("book.mplstyle")

INK = "#7a7a7a"
#: Told apart by readers with red-green blindness too: CIELAB distances of 25 and more.
PALETTE = ("#0095f9", "#e4720e", "#7c9961", "#7c5598", "#c52023", "#444afc")
_BLUE, _ORANGE, _GREEN, _PURPLE, _RED, _INDIGO = PALETTE

#: Width of a figure in inches. Shown 350 pixels wide on a phone, its letters stay legible.
WIDTH = 4.8
#: An SVG picture above this many bytes is shown as PNG.
LARGEST_SVG = 60_000


@dataclass(frozen=True)
class Arm:
    """How one arm of a comparison is drawn everywhere in the book."""

    color: str
    marker: str


ARMS = {
    "dense": Arm(INK, "o"),
    "baseline": Arm(INK, "o"),
    "lowrank": Arm(_BLUE, "s"),
    "blockdense": Arm(_ORANGE, "D"),
    "blockshuffle": Arm(_GREEN, "^"),
    "premerged": Arm(_PURPLE, "v"),
    "wide-structured": Arm(_INDIGO, "P"),
    "gqa": Arm(_RED, "X"),
    "gqa-small": Arm(_RED, "x"),
    "moe": Arm(_PURPLE, "s"),
    "switch": Arm(_RED, "^"),
    "mixture": Arm(_INDIGO, "X"),
    "vanilla-moe": Arm(_PURPLE, "s"),
    "adamoe": Arm(_INDIGO, "D"),
    "csmoe": Arm(_ORANGE, "v"),
    "single-expert": Arm(_GREEN, "P"),
    "collapsed": Arm(_RED, "X"),
    "tuned": Arm(_BLUE, "D"),
    "eda": Arm(_GREEN, "v"),
    "back-translation": Arm(_ORANGE, "P"),
}

# What was done to an arm, in the words of a variant's name -> the dash of its line; of several the
# last counts. What places a run on an axis (-w64, -fp32, -xl, -lr0.016, -overtrained) and the usual
# 32 % leave the line as it is.
_DASHES: dict[str, Any] = {
    "63": "--",
    "small": "--",
    "unbalanced": "--",
    "matched": "--",
    "guided": "-.",
    "equal-flops": ":",
    "halfmixed": (0, (6.4, 1.6, 1, 1.6, 1, 1.6)),
    "released-guide": (0, (2, 3.5)),
    "orthonormal": (0, (9, 2)),
    "gaussian": (0, (1, 3.5)),
}


def style() -> None:
    """Set the book's style for every figure that follows; seaborn takes its colours from it."""
    plt.style.use(STYLE)


def arm(variant: str) -> Arm:
    """The colour and marker of a variant: of the longest arm's name that it begins with.

    >>> arm("lowrank-32-guided") == arm("lowrank")
    True

    Raises:
        ValueError: if no arm has this name.
    """
    names = [name for name in ARMS if f"{variant}-".startswith(f"{name}-")]
    if not names:
        raise ValueError(
            f"no arm is named {variant!r}; a variant begins with one of {', '.join(ARMS)}: "
            "name it so, or give the new arm a colour and a marker in plotting.ARMS"
        )
    return ARMS[max(names, key=len)]


def line_style(variant: str) -> dict[str, Any]:
    """The keywords that draw a variant's line: the colour of its arm, the dash of its treatment.

    So the variants of one comparison differ; runs of one variant at several widths, learning rates
    or lengths look alike, since these are places on an axis.

    >>> line_style("lowrank-63")
    {'color': '#0095f9', 'linestyle': '--'}
    >>> line_style("lowrank-32-guided-lr0.016") == line_style("lowrank-32-guided")
    True

    Raises:
        ValueError: if no arm has this name.
    """
    named = {f"{variant}-".rfind(f"-{words}-"): dash for words, dash in _DASHES.items()}
    place = max(named)
    return {"color": arm(variant).color, "linestyle": named[place] if place >= 0 else "-"}


def figure(
    rows: int = 1, columns: int = 1, *, height: float = 3.0, **options: Any
) -> tuple["Figure", Any]:
    """A figure of the book's width with its axes, as ``plt.subplots`` returns them.

    Args:
        rows: of axes.
        columns: of axes; more than one only where the axes need no numbers.
        height: of one row, in inches.
        options: go to ``plt.subplots``.
    """
    style()
    return plt.subplots(rows, columns, figsize=(WIDTH, height * rows), **options)


def show(figure: "Figure", *, varies: bool = False) -> None:
    """Display a figure in a notebook: as SVG where that is small, else as PNG.

    Args:
        figure: is closed.
        varies: whether it shows what this machine measured. Then it is a PNG, which the regression
            of the notebooks does not compare.
    """
    from IPython.display import display

    content: dict[str, Any] = {"text/plain": "<Figure>"}
    vector = io.BytesIO()
    if not varies:
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
    if 0 < vector.tell() <= LARGEST_SVG:
        content["image/svg+xml"] = vector.getvalue().decode()
    else:
        content["image/png"] = _small_png(figure)
    plt.close(figure)
    display(content, raw=True)


def _small_png(figure: "Figure") -> bytes:
    """A figure as PNG in 256 colours, a third of the size of the full one and no worse to read."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=200)
    picture = Image.open(full).quantize(256, method=Image.Quantize.FASTOCTREE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def curve_with_band(
    ax: "Axes",
    records: Iterable[Record],
    curve: str,
    *,
    x: str = "step",
    y: str = "value",
    label: str | None = None,
) -> None:
    """Draw the mean curve of one variant over its seeds, with a 95 % t interval from three on.

    Args:
        ax: to draw into.
        records: of one variant, one a seed.
        curve: the name of the curve in the records.
        x: the curve's list for the horizontal axis.
        y: the curve's list for the vertical axis.
        label: in the legend; by default the variant.

    Raises:
        ValueError: if there are no records or of several variants, if one lacks the curve, or if
            they have no step in common.
    """
    records = list(records)
    variants = sorted({record.variant for record in records})
    if len(variants) != 1:
        raise ValueError(f"a curve needs records of one variant; given are those of {variants}")
    curves = [dict(zip(*_points(record, curve, x, y), strict=True)) for record in records]
    common = sorted(set.intersection(*(set(points) for points in curves)))
    if not common:
        raise ValueError(f"the records of {variants[0]} have no {x} of {curve!r} in common")
    values = np.array([[points[at] for at in common] for points in curves])
    mean = values.mean(axis=0)
    drawn = line_style(variants[0])
    ax.plot(common, mean, label=label or variants[0], **drawn)
    if len(curves) >= 3:
        from scipy.special import stdtrit

        half = stdtrit(len(curves) - 1, 0.975) * values.std(axis=0, ddof=1) / len(curves) ** 0.5
        ax.fill_between(common, mean - half, mean + half, color=drawn["color"], alpha=0.2, lw=0)


def recorded_and_live(
    ax: "Axes",
    recorded: Iterable[Record],
    live: Record | Iterable[Record] | None,
    curve: str,
    *,
    x: str = "step",
    y: str = "value",
    labels: Mapping[str, str] | None = None,
) -> None:
    """Draw what was recorded as lines with bands and what ran here as dots, one colour an arm.

    Args:
        ax: to draw into.
        recorded: records of any number of variants and seeds.
        live: the reader's record or records; None for none.
        curve: the name of the curve in the records.
        x: the curve's list for the horizontal axis.
        y: the curve's list for the vertical axis.
        labels: what the legend calls a variant; by default its name.
    """
    labels = labels or {}
    recorded = list(recorded)
    drawn = dict.fromkeys(record.variant for record in recorded)
    for variant in drawn:
        same = [record for record in recorded if record.variant == variant]
        curve_with_band(ax, same, curve, x=x, y=y, label=labels.get(variant))
    for record in [live] if isinstance(live, Record) else live or ():
        name = record.variant
        label = None if name in drawn else f"{labels.get(name, name)} (live)"
        drawn[name] = None
        look = arm(name)
        across, up = _points(record, curve, x, y)
        ax.plot(across, up, look.marker, color=look.color, ms=4.5, label=label, zorder=3)
    if drawn:
        ax.legend()


def matrix_picture(ax: "Axes", matrix: Any, *, title: str = "") -> None:
    """Draw a matrix: blue above zero, orange below, stronger where larger, nothing at zero.

    Args:
        ax: to draw into; its ticks and grid go.
        matrix: a tensor or array of shape (rows, columns).
        title: above it.

    Raises:
        ValueError: if it is not a matrix of finite numbers.
    """
    if hasattr(matrix, "detach"):
        matrix = matrix.detach().float().cpu()
    values = np.asarray(matrix, dtype=float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"a picture needs a matrix of finite numbers; given is one of shape {values.shape}"
        )
    picture = np.zeros((*values.shape, 4))
    picture[values > 0, :3] = to_rgb(_BLUE)
    picture[values < 0, :3] = to_rgb(_ORANGE)
    largest = np.abs(values).max()
    if largest:
        # the square root keeps small entries visible beside large ones
        picture[..., 3] = np.sqrt(np.abs(values) / largest)
    ax.imshow(picture, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(True)


@dataclass(frozen=True)
class RoutingMap:
    """Tokens in the colours of their experts, as text that wraps on any screen.

    Each token carries the numbers of its experts too, so colour is never the only sign.
    """

    tokens: tuple[str, ...]
    experts: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        return " ".join(
            f"{token}[{','.join(map(str, chosen))}]"
            for token, chosen in zip(self.tokens, self.experts, strict=True)
        )

    def _repr_html_(self) -> str:
        pieces = []
        for token, chosen in zip(self.tokens, self.experts, strict=True):
            color = PALETTE[chosen[0] % len(PALETTE)] if chosen else INK
            look = f"border-bottom:3px solid {color};background:{color}2e"
            number = f"<sub>{','.join(map(str, chosen)) or '–'}</sub>"
            pieces.append(
                f'<span style="{look};padding:0 .15em;border-radius:2px;white-space:pre">'
                f"{html.escape(token)}{number}</span>"
            )
        return f'<p class="routing-map" style="line-height:2.1">{" ".join(pieces)}</p>'


def routing_map(tokens: Sequence[str], experts: Any) -> RoutingMap:
    """Which expert each token of a text went to, in colours.

    Args:
        tokens: T texts.
        experts: the chosen experts, shape (T,) or (T, k), best first; a negative number means that
            the token was dropped.

    >>> routing_map(["the", "cat"], [[0, 2], [1, -1]])
    the[0,2] cat[1]

    Raises:
        ValueError: if the lengths differ.
    """
    chosen = np.asarray(experts.cpu() if hasattr(experts, "cpu") else experts)
    if chosen.ndim not in (1, 2) or len(chosen) != len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens need as many rows of experts; given is the shape {chosen.shape}"
        )
    rows = chosen.reshape(len(tokens), -1).tolist()
    return RoutingMap(
        tuple(map(str, tokens)), tuple(tuple(e for e in row if e >= 0) for row in rows)
    )


@dataclass(frozen=True)
class RoutingTabs:
    """Texts and layers to choose between, each token in the colour of its expert; no script.

    Radio buttons and rules of CSS do it, so that it works in a page without a server. Where a
    program takes away the rules all texts are left, without colours.
    """

    texts: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]]
    marked: Mapping[str, slice]

    def __repr__(self) -> str:
        return f"routing of {', '.join(self.texts)} through {', '.join(self.layers)}"

    def _repr_html_(self) -> str:
        name = f"routing-{zlib.crc32(repr((self.texts, self.layers)).encode()):08x}"
        return "".join(
            [
                f'<div class="routing-tabs" id="{name}"><style>{self._rules(name)}</style>',
                _choices(name, "layer", self.layers),
                _choices(name, "text", self.texts),
                *(self._key(number, layer) for number, layer in enumerate(self.layers)),
                *(self._text(number, title) for number, title in enumerate(self.texts)),
                "</div>",
            ]
        )

    def _rules(self, name: str) -> str:
        rules = [
            f"#{name} fieldset{{border:0;margin:0 0 .4em;padding:0}}"
            f"#{name} legend{{font-size:.9em;margin:0;padding:0;float:none}}"
            f"#{name} label{{display:inline-block;margin:0 .9em .2em 0}}"
            f"#{name} p{{line-height:2.1;overflow-wrap:anywhere;margin:.5em 0}}"
            f"#{name} span{{padding:0 .15em;border-radius:2px}}"
            f"#{name} mark{{background:none;color:inherit;border:2px solid;border-radius:4px;"
            "padding:.25em .1em;margin:0 .15em;"
            "-webkit-box-decoration-break:clone;box-decoration-break:clone}"
            f"#{name} span::after{{font-size:.7em;vertical-align:sub;opacity:.85}}"
        ]
        for number in range(len(self.texts)):
            rules.append(
                f"#{name}:not(:has(#{name}-text-{number}:checked)) .text-{number}{{display:none}}"
            )
        for number, chosen in enumerate(self.layers.values()):
            shown = f"#{name}:has(#{name}-layer-{number}:checked)"
            rules.append(
                f"#{name}:not(:has(#{name}-layer-{number}:checked)) .layer-{number}{{display:none}}"
                f"{shown} [data-{number}]{{border-bottom:3px solid {INK}}}"
                f"{shown} [data-{number}]::after{{content:attr(data-{number})}}"
            )
            for expert in sorted({row[0] for rows in chosen.values() for row in rows if row}):
                color = PALETTE[expert % len(PALETTE)]
                # the second round of colours has another line
                line = ("solid", "double", "dotted")[expert // len(PALETTE) % 3]
                first = f'{shown} [data-{number}="{expert}"],{shown} [data-{number}^="{expert},"]'
                rules.append(f"{first}{{border-bottom:3px {line} {color};background:{color}2e}}")
        return "".join(rules)

    def _key(self, number: int, layer: str) -> str:
        first = [row[0] for rows in self.layers[layer].values() for row in rows if row]
        shares = (
            f'<span data-{number}="{expert}">expert</span>&nbsp;'
            f"{first.count(expert) / len(first):.0%}"
            for expert in sorted(set(first))
        )
        answer = "; <mark>framed</mark>: the answer" if self.marked else ""
        return f'<p class="layer-{number}">First choices: {", ".join(shares)}{answer}</p>'

    def _text(self, number: int, title: str) -> str:
        rows = [chosen[title] for chosen in self.layers.values()]
        pieces = []
        for token, *chosen in zip(self.texts[title], *rows, strict=True):
            names = (",".join(map(str, row)) or "–" for row in chosen)
            data = "".join(f' data-{layer}="{row}"' for layer, row in enumerate(names))
            pieces.append(f"<span{data}>{html.escape(token)}</span>")
        if title in self.marked and (inside := pieces[self.marked[title]]):
            pieces[self.marked[title]] = [f"<mark>{' '.join(inside)}</mark>"]
        return f'<p class="text-{number}">{" ".join(pieces)}</p>'


def _choices(name: str, kind: str, titles: Iterable[str]) -> str:
    """Radio buttons, the first of them chosen."""
    buttons = (
        f'<label><input type="radio" name="{name}-{kind}" id="{name}-{kind}-{number}"'
        f"{' checked' * (number == 0)}> {html.escape(title)}</label>"
        for number, title in enumerate(titles)
    )
    return f"<fieldset><legend>{kind}</legend>{''.join(buttons)}</fieldset>"


def routing_tabs(
    texts: Mapping[str, Sequence[str]],
    experts: Mapping[str, Mapping[str, Any]],
    *,
    marked: Mapping[str, slice] | None = None,
) -> RoutingTabs:
    """Several texts through several layers, each token in the colour of its expert.

    Args:
        texts: title -> T tokens.
        experts: layer -> title -> the chosen experts of its tokens, as `routing_map` takes them.
        marked: title -> tokens to frame.

    >>> tabs = routing_tabs({"one": ["the", "cat"]}, {"layer 2": {"one": [0, 1]}})
    >>> tabs
    routing of one through layer 2

    Raises:
        ValueError: if there is nothing to show, a layer lacks a text, or the lengths differ.
    """
    if (
        not texts
        or not experts
        or any(chosen.keys() != texts.keys() for chosen in experts.values())
    ):
        raise ValueError(
            f"tabs need a text, a layer, and every layer's experts for all of {list(texts)}"
        )
    layers = {
        layer: {title: routing_map(texts[title], chosen[title]).experts for title in texts}
        for layer, chosen in experts.items()
    }
    shown = {title: tuple(map(str, tokens)) for title, tokens in texts.items()}
    return RoutingTabs(shown, layers, dict(marked or {}))


def caption(recorded: Record | Iterable[Record] = (), live: Record | Iterable[Record] = ()) -> str:
    """One or two sentences that say where a figure's numbers come from, made from provenance.

    Args:
        recorded: the records behind the lines.
        live: the records behind the dots.
    """
    given = [[one] if isinstance(one, Record) else list(one) for one in (recorded, live)]
    # a figure of one kind need not say which marks are which
    names = ("Line: recorded", "Dots: live") if all(given) else ("Recorded", "Live")
    return " ".join(
        f"{name}, {_origin(records)}."
        for name, records in zip(names, given, strict=True)
        if records
    )


def _origin(records: list[Record]) -> str:
    """Scale, seeds, steps, hardware and date of records, in words."""
    profiles = "/".join(sorted({record.profile for record in records}))
    words = [f"profile {profiles}", _seeds(records)]
    for unit, those in _steps(records).items():
        ends = dict.fromkeys((min(those), max(those)))
        words.append(f"{'–'.join(f'{n:,}' for n in ends)} {unit}")
    words.append(devices_of(records))
    threads = sorted({record.provenance.threads for record in records})
    if len(threads) == 1:
        words.append(f"{threads[0]} thread{'s' * (threads[0] != 1)}")
    days = sorted({record.provenance.date[:10] for record in records})
    words.append(" to ".join(dict.fromkeys((days[0], days[-1]))))
    return ", ".join(words)


def _steps(records: list[Record]) -> dict[str, set[int]]:
    """How many steps, by what they are of: of training all stages are added up."""
    found: dict[str, set[int]] = {}
    for config in (record.config for record in records):
        stages = [config.get("training") or config]
        if config.get("stages"):
            stages = [stage["training"] for stage in config["stages"]]
        elif config.get("parent"):  # a robot's policy, and what became of it
            stages = [config["parent"], (config.get("tuning") or {}).get("training") or {}]
        # whose plans were timed, it is not trained
        unit = "Euler steps" if "rounds" in config else "steps"
        if total := sum(int(stage.get("steps") or 0) for stage in stages):
            found.setdefault(unit, set()).add(total)
    return found


def _seeds(records: list[Record]) -> str:
    """Which seed, or how many: from the arm with the fewest to that with the most."""
    seeds: dict[str, set[int]] = {}
    for record in records:
        seeds.setdefault(record.variant, set()).add(record.seed)
    if len(every := set.union(*seeds.values())) == 1:
        return f"seed {every.pop()}"
    counts = [len(own) for own in seeds.values()]
    return " to ".join(map(str, dict.fromkeys((min(counts), max(counts))))) + " seeds"


def _points(record: Record, curve: str, x: str, y: str) -> tuple[list[float], list[float]]:
    if curve not in record.curves:
        raise ValueError(
            f"the record of {record.variant}, seed {record.seed}, has no curve {curve!r}; "
            f"it has {sorted(record.curves)}"
        )
    points = record.curves[curve]
    return points[x], points[y]
