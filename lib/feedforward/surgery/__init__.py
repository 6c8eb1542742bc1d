"""Replace the feed-forward layers of a model, Hugging Face models first, and save the result."""

from feedforward.surgery.finding import DenseFFN, FeedForward, find_ffns
from feedforward.surgery.merging import premerge
from feedforward.surgery.operations import replace_ffn, structured, upcycle
from feedforward.surgery.saving import from_config, load, save

__all__ = [
    "DenseFFN",
    "FeedForward",
    "find_ffns",
    "from_config",
    "load",
    "premerge",
    "replace_ffn",
    "save",
    "structured",
    "upcycle",
]
