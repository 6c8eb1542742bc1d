"""One training loop for every model of the book: exact to resume, on one processor or many GPUs.

A run that was killed continues from its last checkpoint and ends with the same numbers, bit for
bit on the same machine: a batch is a function of its index, and a checkpoint holds the weights,
the optimizer, the moving average, the random states and the curves so far.
"""

from feedforward.training.averages import EMA
from feedforward.training.checkpoints import CheckpointError, load_weights, save_weights
from feedforward.training.config import PRECISIONS, SCHEDULES, TrainingConfig
from feedforward.training.loop import (
    TrainingError,
    TrainingResult,
    seed_everything,
    train,
)
from feedforward.training.precision import bf16_products

__all__ = [
    "EMA",
    "PRECISIONS",
    "SCHEDULES",
    "CheckpointError",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "bf16_products",
    "load_weights",
    "save_weights",
    "seed_everything",
    "train",
]
