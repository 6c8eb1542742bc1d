import pytest

from feedforward.sources import fingerprint, modules_of_source, source_closure


def short(modules):
    return {module.removeprefix("feedforward.") for module in modules}


def test_the_closure_follows_every_kind_of_import(library):
    behind = {"part", "part.experiment", "training", "layers", "layers.base", "tools"}
    assert short(source_closure("feedforward.part.experiment")) == behind
    assert short(source_closure("feedforward.alone", "feedforward.tools")) == {"alone", "tools"}
    with pytest.raises(ValueError, match=r"'feedforward.gone' is not a module of feedforward"):
        source_closure("feedforward.gone")
    with pytest.raises(ValueError, match="'json' is not a module"):
        source_closure("json")


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import numpy, json", set()),
        ("from feedforward import Layer", {"layers", "layers.dense"}),
        ("from feedforward import tools as t, Layer", {"tools", "layers", "layers.dense"}),
        ("from feedforward import *", {"tools", "layers", "layers.dense"}),
        ("import feedforward as ff\nff.Layer(3)", {"layers", "layers.dense"}),
        ("import feedforward\nfeedforward.tool", {"tools"}),
        ("import feedforward.layers.base", {"layers", "layers.base"}),
        ("from feedforward.layers.base import base", {"layers", "layers.base"}),
        ("from feedforward.layers import dense", {"layers", "layers.dense"}),
        ("def f():\n    from feedforward import alone", {"alone"}),
        ("%matplotlib inline\n!ls\nif True:\n    %time 1\nimport feedforward.alone", {"alone"}),
        ("from feedforward import nothing_of_ours", set()),
        ("from feedforwards import Layer", set()),
    ],
)
def test_what_a_notebook_uses(library, code, modules):
    assert short(modules_of_source(code)) == modules


def test_a_fingerprint_changes_with_code_and_with_nothing_else(library):
    before = fingerprint("feedforward.part.experiment")
    base = library / "layers" / "base.py"
    base.write_text("def base(x):\n    '''Other words.'''\n\n    return (x+1)\n")
    (library / "alone.py").write_text("import json, math")
    assert fingerprint("feedforward.part.experiment") == before
    base.write_text("def base(x):\n    return x + 2\n")
    assert fingerprint("feedforward.part.experiment") != before


def test_the_real_library_is_seen_through():
    closure = source_closure("feedforward.training")
    assert {"feedforward.profiles", "feedforward.records", "feedforward.files"} <= closure
    assert "feedforward.cli" not in closure
    used = modules_of_source("from feedforward import BlockDense, load_balancing_loss")
    assert {"feedforward.layers.structured", "feedforward.layers.routing"} <= used
