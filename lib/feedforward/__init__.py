"""What can replace the dense feed-forward layer of a Transformer: experts and structure.

The public names load on first use, so that ``import feedforward`` costs nothing and
``from feedforward import LowRank`` needs torch alone.
"""

from importlib import import_module

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    "LowRank": "layers.structured",
    "BlockShuffle": "layers.structured",
    "BlockDense": "layers.structured",
    "PreMerged": "layers.structured",
    "SelfGuided": "layers.guided",
    "Routing": "layers.routing",
    "TopKRouter": "layers.routing",
    "SwitchRouter": "layers.routing",
    "ScaleAdapterRouter": "layers.routing",
    "load_balancing_loss": "layers.routing",
    "router_z_loss": "layers.routing",
    "MoE": "layers.experts",
    "collect_routing": "layers.experts",
    "count": "layers.cost",
    "replace_ffn": "surgery",
    "upcycle": "surgery",
    "premerge": "surgery",
    "ProtectedText": "augment.spans",
    "EDA": "augment.eda",
    "augment_questions": "augment.questions",
    "Answer": "qa.schema",
    "Question": "qa.schema",
    "load_squad": "qa.data",
    "load_questions": "qa.data",
    "ReaderConfig": "qa.model",
    "build_reader": "qa.model",
    "Score": "qa.metrics",
    "score": "qa.metrics",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
