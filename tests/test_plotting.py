"""Figures can be read in both themes, on a phone, and by readers who see few colours."""

import contextlib
import itertools
import re
from dataclasses import replace

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb, to_rgba

from feedforward import plotting
from feedforward.profiles import PROFILES, experiments_of, load_experiment
from feedforward.records import Provenance, Record

WHITE, DARK = "#ffffff", "#121212"


def linear(color):
    value = np.array(to_rgb(color))
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def luminance(color):
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def record(variant, seed, values, *, steps=None, live=False):
    steps = steps or list(range(0, 10 * len(values), 10))
    here = Provenance(
        commit=None, dirty=None, lock=None, versions={}, device="a test processor", threads=2,
        seconds=1.0, peak_memory=None, date="2025-03-04T05:06:07+00:00", python="3.11",
    )  # fmt: skip
    return Record(
        "demo", variant, "smoke" if live else "cpu", seed, {"training": {"steps": 640}}, {},
        {"loss": {"step": steps, "value": values}}, here,
    )  # fmt: skip


@pytest.fixture
def ax():
    _, ax = plotting.figure()
    yield ax
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    contents = []
    monkeypatch.setattr(
        IPython.display, "display", lambda content, raw: contents.append((content, raw))
    )
    return contents


# --- the style ------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", [plotting.INK, *plotting.PALETTE])
def test_colours_stand_out_in_both_themes(color):
    assert contrast(color, WHITE) >= 3
    assert contrast(color, DARK) >= 3


def test_the_style_inks_everything_with_a_colour_that_stands_out():
    plotting.style()
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        assert contrast(f"#{plt.rcParams[name].lstrip('#')}", DARK) >= 3, name
        assert contrast(f"#{plt.rcParams[name].lstrip('#')}", WHITE) >= 3, name
    cycle = [entry["color"] for entry in plt.rcParams["axes.prop_cycle"]]
    assert [to_rgb(c) for c in cycle] == [to_rgb(c) for c in (plotting.INK, *plotting.PALETTE)]


def test_seaborn_draws_in_the_style():
    import seaborn

    plotting.style()
    assert seaborn.color_palette()[1] == to_rgb(plotting.PALETTE[0])


def test_backgrounds_are_transparent(ax):
    assert to_rgba(plt.rcParams["savefig.facecolor"])[3] == 0
    assert ax.figure.get_facecolor()[3] == 0
    assert to_rgba(ax.get_facecolor())[3] == 0


# Machado, Oliveira and Fernandes 2009, complete deuteranopia and protanopia, in linear light
_BLIND = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "full sight": np.eye(3).tolist(),
}  # fmt: skip


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = (xyz @ rgb) / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", _BLIND)
def test_colours_differ_for_every_reader(sight):
    seen = [
        lab(np.clip(np.array(_BLIND[sight]) @ linear(color), 0, 1))
        for color in (plotting.INK, *plotting.PALETTE)
    ]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_letters_stay_legible_on_a_phone():
    plotting.style()
    assert plt.rcParams["figure.figsize"][0] == plotting.WIDTH
    pixels_an_inch = 350 / plotting.WIDTH
    for name in ("font.size", "axes.labelsize", "xtick.labelsize", "legend.fontsize"):
        assert plt.rcParams[name] / 72 * pixels_an_inch >= 9, name


@pytest.mark.parametrize(
    "together",
    [
        ("dense", "lowrank", "blockshuffle", "blockdense", "premerged"),
        ("dense", "moe", "switch"),
        ("dense", "vanilla-moe", "adamoe", "csmoe", "single-expert"),
        ("baseline", "tuned", "moe", "switch", "eda", "back-translation"),
        ("gqa", "wide-structured", "dense"),
    ],
)
def test_arms_of_one_figure_differ_in_colour_and_marker(together):
    arms = [plotting.arm(name) for name in together]
    assert len({arm.color for arm in arms}) == len({arm.marker for arm in arms}) == len(arms)


def test_variants_take_the_look_of_their_arm():
    assert plotting.arm("moe-eda") == plotting.arm("moe")
    assert plotting.arm("wide-structured-overtrained").marker == "P"
    assert plotting.line_style("lowrank-32") != plotting.line_style("lowrank-63")
    for unknown in ("moebius", "low", ""):
        with pytest.raises(ValueError, match="no arm is named"):
            plotting.arm(unknown)


@pytest.mark.parametrize("part", ["foundations", "structured-ffn", "structured-ffn-images"])
def test_the_variants_of_a_part_differ_in_their_lines(part):
    names = set()
    for experiment in experiments_of(part):
        for profile in PROFILES:
            with contextlib.suppress(ValueError):  # not every experiment has every profile
                names |= set(load_experiment(experiment).grid(experiment, profile))
    place = re.compile(r"(-w\d+|-fp32|-(s|m|l|xl)|-lr[\d.e-]+|-overtrained)+$")
    looks = {}
    for variant in {place.sub("", name) for name in names}:
        look = plotting.line_style(variant)
        looks.setdefault((look["color"], str(look["linestyle"])), set()).add(variant)
    assert [variants for variants in looks.values() if len(variants) > 1] == []
    assert len(looks) > 4
    for name in names:  # where a run stands does not change its line
        assert plotting.line_style(name) == plotting.line_style(place.sub("", name))


def test_the_last_treatment_of_a_name_counts():
    def dash(variant):
        return plotting.line_style(variant)["linestyle"]

    assert dash("lowrank-63-guided") == dash("lowrank-32-guided") != dash("lowrank-63")
    assert dash("lowrank-32") == dash("wide-structured") == dash("gqa-overtrained") == "-"
    assert dash("gqa-small-overtrained") == dash("gqa-small") != dash("gqa")
    # a word inside another one is none
    assert dash("lowrank-32-unguided") == "-"


def test_every_dash_can_be_drawn(ax):
    for words in plotting._DASHES:
        ax.plot([0, 1], [0, 1], **plotting.line_style(f"lowrank-32-{words}"))
    ax.figure.canvas.draw()
    assert len({str(line._unscaled_dash_pattern) for line in ax.lines}) > 6


# --- curves ---------------------------------------------------------------------------------------


def test_band_is_the_t_interval_of_three_seeds(ax):
    values = [[1.0, 4.0], [2.0, 5.0], [3.0, 9.0]]
    records = [record("moe", seed, row) for seed, row in enumerate(values)]
    plotting.curve_with_band(ax, records, "loss", label="experts")
    (line,) = ax.lines
    assert line.get_label() == "experts"
    assert list(line.get_ydata()) == [2.0, 6.0]
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices[:, 1]
    half = 4.302653 / 3**0.5  # t of two degrees of freedom times s / sqrt(n), s = 1
    assert edges.min() == pytest.approx(min(2 - half, 6 - half * 7**0.5))
    assert edges.max() == pytest.approx(6 + half * 7**0.5)


def test_two_seeds_have_no_band(ax):
    plotting.curve_with_band(ax, [record("moe", s, [1.0, 2.0 + s]) for s in range(2)], "loss")
    assert not ax.collections


def test_only_common_steps_are_averaged(ax):
    records = [record("moe", 0, [1.0, 2.0, 3.0]), record("moe", 1, [5.0, 4.0], steps=[0, 20])]
    plotting.curve_with_band(ax, records, "loss")
    assert list(ax.lines[0].get_xdata()) == [0, 20]
    assert list(ax.lines[0].get_ydata()) == [3.0, 3.5]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "records of one variant"),
        ([record("moe", 0, [1.0]), record("dense", 0, [1.0])], "records of one variant"),
        ([record("moe", 0, [1.0]), record("moe", 1, [1.0], steps=[7])], "in common"),
    ],
)
def test_records_that_make_no_curve(ax, records, message):
    with pytest.raises(ValueError, match=message):
        plotting.curve_with_band(ax, records, "loss")


def test_a_missing_curve_names_those_there_are(ax):
    with pytest.raises(ValueError, match=r"no curve 'accuracy'; it has \['loss'\]"):
        plotting.curve_with_band(ax, [record("moe", 0, [1.0])], "accuracy")


def test_recorded_is_a_line_and_live_are_dots(ax):
    recorded = [record(v, s, [3.0, 2.0 + s]) for v in ("dense", "moe") for s in range(3)]
    live = [record("moe", 0, [3.1, 2.2], live=True), record("switch", 0, [3.0, 2.9], live=True)]
    plotting.recorded_and_live(ax, recorded, live, "loss", labels={"moe": "experts"})
    lines = [line for line in ax.lines if line.get_linestyle() != "None"]
    dots = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert [line.get_color() for line in lines] == [plotting.INK, plotting.arm("moe").color]
    assert [line.get_color() for line in dots] == [
        plotting.arm("moe").color, plotting.arm("switch").color
    ]  # fmt: skip
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["dense", "experts", "switch (live)"]


def test_live_alone_and_nothing_at_all(ax):
    plotting.recorded_and_live(ax, [], record("moe", 0, [1.0], live=True), "loss")
    assert len(ax.lines) == 1
    _, empty = plotting.figure()
    plotting.recorded_and_live(empty, [], None, "loss")
    assert not empty.lines


# --- pictures -------------------------------------------------------------------------------------


def test_matrix_picture_shows_sign_size_and_zero(ax):
    matrix = torch.tensor([[4.0, -1.0], [0.0, 1.0]], requires_grad=True)
    plotting.matrix_picture(ax, matrix, title="W")
    picture = ax.images[0].get_array()
    assert picture[..., 3].tolist() == [[1.0, 0.5], [0.0, 0.5]]
    assert picture[0, 0, 2] > picture[0, 0, 0]  # positive: blue
    assert picture[0, 1, 0] > picture[0, 1, 2]  # negative: orange
    assert ax.get_title(loc="left") == "W" or ax.get_title() == "W"


@pytest.mark.parametrize("matrix", [[1.0, 2.0], [[]], [[float("nan")]], torch.zeros(2, 2, 2)])
def test_what_is_no_matrix_makes_no_picture(ax, matrix):
    with pytest.raises(ValueError, match="matrix of finite numbers"):
        plotting.matrix_picture(ax, matrix)


def test_zeros_make_an_empty_picture(ax):
    plotting.matrix_picture(ax, np.zeros((2, 3)))
    assert not ax.images[0].get_array()[..., 3].any()


def test_routing_map_does_not_rest_on_colour():
    shown = plotting.routing_map(["<s>", "a b"], torch.tensor([[3, 0], [-1, -1]]))
    assert repr(shown) == "<s>[3,0] a b[]"
    text = shown._repr_html_()
    assert "&lt;s&gt;<sub>3,0</sub>" in text
    assert "a b<sub>–</sub>" in text
    assert plotting.PALETTE[3] in text
    assert not {"color:#000", "color:black", "color:#fff"} & set(text.split(";"))


def test_more_experts_than_colours_start_over():
    tokens = [str(e) for e in range(20)]
    assert f">{tokens[19]}<sub>19</sub>" in plotting.routing_map(tokens, range(20))._repr_html_()


@pytest.mark.parametrize("experts", [[0], [[0], [1], [2]], np.zeros((2, 1, 1), int)])
def test_routing_map_needs_a_row_a_token(experts):
    with pytest.raises(ValueError, match="2 tokens need as many rows"):
        plotting.routing_map(["a", "b"], experts)


def test_routing_tabs_colour_the_tokens_of_the_layer_that_is_chosen():
    tabs = plotting.routing_tabs(
        {"first": ["<s>", "a", "b"], "second": ["c"]},
        {
            "layer 2": {"first": [[7, 0], [1, 0], [-1, -1]], "second": [[1, 0]]},
            "head": {"first": [2, 2, 2], "second": [0]},
        },
        marked={"first": slice(1, 3)},
    )
    text = tabs._repr_html_()
    assert '<span data-0="7,0" data-1="2">&lt;s&gt;</span>' in text
    assert (
        '<mark><span data-0="1,0" data-1="2">a</span> <span data-0="–" data-1="2">b</span></mark>'
    ) in text
    # one button of each kind is chosen at the start, and each has an element that it is about
    assert text.count(" checked>") == 2
    name = re.search(r'id="(routing-\w+)"', text)[1]
    assert set(re.findall(rf"#({name}-\w+-\d):checked", text)) == set(
        re.findall(rf'id="({name}-\w+-\d)"', text)
    )
    # expert 7 has the colour of 1 and another line
    color = plotting.PALETTE[1]
    for expert, line in ((1, "solid"), (7, "double")):
        assert re.search(rf'\^="{expert},"\]{{border-bottom:3px {line} {color}', text)
    assert 'data-0="1">expert</span>&nbsp;67%' in text
    assert "<script" not in text


@pytest.mark.parametrize(
    ("texts", "experts"),
    [
        ({}, {"head": {}}),
        ({"one": ["a"]}, {}),
        ({"one": ["a"]}, {"head": {}}),
        ({"one": ["a"]}, {"head": {"one": [0, 1]}}),
    ],
)
def test_routing_tabs_need_every_layer_for_every_text(texts, experts):
    with pytest.raises(ValueError, match="need"):
        plotting.routing_tabs(texts, experts)


# --- showing --------------------------------------------------------------------------------------


def draw(points):
    figure, ax = plotting.figure(height=1.5)
    ax.plot(np.linspace(0, 1, points), np.random.default_rng(0).normal(size=points))
    return figure


def test_small_figures_are_svg_and_the_same_every_time(shown):
    for _ in range(2):
        plotting.show(draw(10))
    (first, raw), (second, _) = shown
    assert raw
    assert first == second
    assert set(first) == {"text/plain", "image/svg+xml"}
    assert len(first["image/svg+xml"]) <= plotting.LARGEST_SVG
    assert not plt.get_fignums()


@pytest.mark.parametrize(("points", "varies"), [(20_000, False), (10, True)])
def test_large_and_varying_figures_are_png(shown, points, varies):
    plotting.show(draw(points), varies=varies)
    ((content, _),) = shown
    assert set(content) == {"text/plain", "image/png"}
    assert content["text/plain"] == "<Figure>"
    assert content["image/png"][:4] == b"\x89PNG"


def test_figures_keep_the_width_of_the_page():
    for rows, columns in ((1, 1), (3, 1), (1, 3)):
        figure, _ = plotting.figure(rows, columns, height=2.0)
        assert figure.get_size_inches().tolist() == [plotting.WIDTH, 2.0 * rows]
        plt.close(figure)


def test_caption_says_where_numbers_come_from():
    recorded = [record("moe", seed, [1.0]) for seed in range(3)]
    text = plotting.caption(recorded, record("moe", 7, [1.0], live=True))
    assert text == (
        "Line: recorded, profile cpu, 3 seeds, 640 steps, a test processor, 2 threads, 2025-03-04. "
        "Dots: live, profile smoke, seed 7, 640 steps, a test processor, 2 threads, 2025-03-04."
    )
    assert plotting.caption() == ""


def test_caption_counts_the_steps_of_all_stages():
    def run(config):
        return replace(record("adamoe", 0, [1.0]), config=config)

    tuned = run({"parent": {"steps": 2500}, "tuning": {"training": {"steps": 700}}})
    assert ", 3,200 steps, a test" in plotting.caption(tuned)
    parent = run({"parent": {"steps": 2500}, "tuning": None})
    assert ", 2,500–3,200 steps, a test" in plotting.caption([tuned, parent])
    both = run({"stages": [{"training": {"steps": 200}}, {"training": {"steps": 70}}]})
    assert ", 270 steps, a test" in plotting.caption(both)
    assert " steps" not in plotting.caption(run({"stages": []}))


def test_caption_calls_the_steps_of_plans_that_were_timed_by_their_name():
    timed = replace(record("adamoe", 0, [1.0]), config={"steps": 10, "rounds": 30})
    assert ", 10 Euler steps, a test" in plotting.caption(timed)


def test_caption_does_not_lend_the_seeds_of_one_arm_to_another():
    three = [record("moe", seed, [1.0]) for seed in range(3)]
    five = [record("dense", seed, [1.0]) for seed in range(5)]
    assert "3 to 5 seeds" in plotting.caption([*three, *five])
    assert ", 5 seeds" in plotting.caption(five)
