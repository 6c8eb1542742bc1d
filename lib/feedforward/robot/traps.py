"""Two ways to weight the wrong thing, both out of the released code of arXiv 2510.14300.

Top-k selection leaves arrays of two kinds: one column an expert, or one column a choice. These
functions weight experts' outputs as the two released versions did, and as it should be, so that
they can be compared. Nothing else uses them. Explained in
``book/adamoe/03-selecting-is-not-weighting``.
"""

import torch
from torch import Tensor


def gathered(outputs: Tensor, indices: Tensor, scales: Tensor) -> Tensor:
    """The right form: the scales of the chosen experts weight the outputs of the chosen experts.

    Args:
        outputs: of all experts, (T, E, D).
        indices: the chosen ones, (T, k).
        scales: one column an expert, (T, E).

    Returns:
        (T, D).

    >>> outputs = torch.tensor([[[1.0], [10.0]]])
    >>> gathered(outputs, torch.tensor([[1]]), torch.tensor([[0.25, 0.5]]))
    tensor([[5.]])
    """
    return (_chosen(outputs, indices) * scales.gather(1, indices).unsqueeze(-1)).sum(1)


def not_gathered(outputs: Tensor, indices: Tensor, scales: Tensor) -> Tensor:
    """The first release: the scales stay one column an expert and are multiplied all the same.

    With k = 1, (T, 1, D) times (T, E, 1) broadcasts, and the chosen expert is weighted with the sum
    of all scales. That code gave raw logits plus adapter as `scales`, where the paper has
    probabilities.

    Args:
        outputs: of all experts, (T, E, D).
        indices: the chosen ones, (T, 1).
        scales: one column an expert, (T, E).

    Returns:
        (T, D).

    >>> outputs = torch.tensor([[[1.0], [10.0]]])
    >>> not_gathered(outputs, torch.tensor([[1]]), torch.tensor([[0.25, 0.5]]))
    tensor([[7.5000]])
    """
    return (_chosen(outputs, indices) * scales.unsqueeze(-1)).sum(1)


def gathered_twice(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The vanilla path of the later release: weights that are gathered already, gathered again.

    The second time, numbers of experts pick among k columns. JAX fills in NaN beyond the last
    column; with k > 1 the numbers that are in range pick another choice's weight unnoticed.

    Args:
        outputs: of all experts, (T, E, D).
        indices: the chosen ones, (T, k).
        weights: one column a choice, (T, k).

    Returns:
        (T, D).

    >>> outputs = torch.tensor([[[1.0], [10.0]]])
    >>> gathered_twice(outputs, torch.tensor([[1]]), torch.tensor([[0.5]]))
    tensor([[nan]])
    """
    beyond = indices >= weights.shape[1]
    again = weights.gather(1, indices.masked_fill(beyond, 0)).masked_fill(beyond, torch.nan)
    return (_chosen(outputs, indices) * again.unsqueeze(-1)).sum(1)


def _chosen(outputs: Tensor, indices: Tensor) -> Tensor:
    """The chosen experts' outputs, (T, k, D)."""
    return outputs.gather(1, indices.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))
