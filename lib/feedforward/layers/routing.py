"""Which experts a token goes to, and with what weight: routers and the losses that balance them."""

from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.layers.autocast import without_autocast


class Routing(NamedTuple):
    """The decision of a router about T tokens and E experts, k experts for each token.

    The output of a mixture of experts for token t is
    ``sum(weights[t, j] * expert[indices[t, j]](x[t]) for j in range(k))``.
    Explained in ``book/foundations/02-mixture-of-experts``.

    Attributes:
        indices: the chosen experts, (T, k) int64, the most probable first.
        weights: what the chosen experts' outputs are multiplied by, (T, k). Exactly 0 for padding
            and for choices that an expert's capacity dropped, so
            ``(routing.weights == 0)[routing.mask]`` shows what was dropped.
        probabilities: softmax of the logits over all experts, (T, E).
        logits: the router's scores, (T, E).
        mask: True for a real token, False for padding, (T,); None when all are real.
    """

    indices: Tensor
    weights: Tensor
    probabilities: Tensor
    logits: Tensor
    mask: Tensor | None = None


class _Router(nn.Module):
    """What the routers share: a bias-free gate, softmax in float32, top k by probability."""

    init_std = 0.02

    def __init__(self, dim: int, experts: int, k: int, device=None, dtype=None):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; a router needs tokens at least 1 wide")
        if experts < 1:
            raise ValueError(f"experts is {experts}; a router needs at least one expert")
        if not isinstance(k, Integral) or not 1 <= k <= experts:
            raise ValueError(
                f"k is {k} with {experts} experts; choose k from 1 to {experts}, or more experts"
            )
        self.dim, self.experts, self.k = dim, experts, k
        self.gate = nn.Parameter(torch.empty(experts, dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw every weight anew from a normal distribution with standard deviation `init_std`."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=self.init_std)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x: tokens, (T, dim).
            mask: True for real tokens, (T,) bool; None when there is no padding.

        Raises:
            ValueError: `x` or `mask` has another shape or `mask` another type.
        """
        self._check(x, mask)
        with without_autocast(x.device.type):
            # float32 at least: in half precision near ties are decided by rounding (Switch, 2.4)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if mask is not None:
                # whatever stands in padding (attention may leave NaN there) reaches no gradient
                x = x.masked_fill(~mask.unsqueeze(1), 0.0)
            x = self._perturb(x)
            logits = F.linear(x, self.gate.to(x.dtype))
            probabilities = logits.softmax(dim=-1)
            chosen, indices = probabilities.topk(self.k, dim=-1)
            weights = self._weights(x, probabilities, chosen, indices)
            if mask is not None:
                weights = weights.masked_fill(~mask.unsqueeze(1), 0.0)
        return Routing(indices, weights, probabilities, logits, mask)

    def _perturb(self, x: Tensor) -> Tensor:
        return x

    def _weights(self, x: Tensor, probabilities: Tensor, chosen: Tensor, indices: Tensor) -> Tensor:
        raise NotImplementedError

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"the router takes tokens of shape (T, {self.dim}), given {tuple(x.shape)}; "
                "flatten leading dimensions with x.reshape(-1, dim)"
            )
        if mask is not None and (mask.shape != x.shape[:1] or mask.dtype != torch.bool):
            raise ValueError(
                f"the mask takes shape ({x.shape[0]},) and type torch.bool (True = real token), "
                f"given {tuple(mask.shape)} of {mask.dtype}; an attention mask of ones and zeros "
                "becomes one by mask.bool().reshape(-1)"
            )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, experts={self.experts}, k={self.k}"


class TopKRouter(_Router):
    """The k most probable experts, weighted by their probabilities.

    ``p = softmax(gate @ x)``; ``weights = p_i`` for i in the top k, divided by their sum when
    `renormalize` (Shazeer et al. 2017, equation 3; the sparse head of arXiv 2204.09598).
    Explained in ``book/foundations/02-mixture-of-experts``.

    Args:
        dim: width of a token.
        experts: number of experts E.
        k: experts per token.
        renormalize: make the k weights sum to 1. With k = 1 the weight is then the constant 1 and
            the task gives the gate no gradient; keep the probability (False) for that.
        device: where the gate is made.
        dtype: type of the gate; the arithmetic is in float32 at least.

    Attributes:
        gate: the router's matrix, (E, dim).

    Raises:
        ValueError: dim or experts below 1, or k not in 1..experts.

    >>> routing = TopKRouter(8, 4, k=2)(torch.ones(3, 8))
    >>> routing.indices.shape, bool(torch.allclose(routing.weights.sum(1), torch.ones(3)))
    (torch.Size([3, 2]), True)
    """

    def __init__(
        self, dim: int, experts: int, *, k: int, renormalize: bool = True, device=None, dtype=None
    ):
        super().__init__(dim, experts, k, device, dtype)
        self.renormalize = renormalize
        self.reset_parameters()

    def _weights(self, x: Tensor, probabilities: Tensor, chosen: Tensor, indices: Tensor) -> Tensor:
        return chosen / chosen.sum(dim=-1, keepdim=True) if self.renormalize else chosen

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, renormalize={self.renormalize}"


class SwitchRouter(_Router):
    """The one most probable expert, weighted by its probability.

    Switch Transformers (Fedus et al. 2022, section 2.1), used by arXiv 2204.09598.
    Explained in ``book/foundations/02-mixture-of-experts``.

    Args:
        dim: width of a token.
        experts: number of experts E.
        jitter: in training the router (never an expert) sees its input multiplied element by
            element with a uniform draw from [1 - jitter, 1 + jitter].
        device: where the gate is made.
        dtype: type of the gate; the arithmetic is in float32 at least.

    Attributes:
        gate: the router's matrix, (E, dim).

    Raises:
        ValueError: dim or experts below 1, or jitter not in [0, 1).
    """

    def __init__(self, dim: int, experts: int, *, jitter: float = 0.0, device=None, dtype=None):
        super().__init__(dim, experts, 1, device, dtype)
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"jitter is {jitter}; choose it from [0, 1), 0 for none")
        self.jitter = jitter
        self.reset_parameters()

    def _perturb(self, x: Tensor) -> Tensor:
        if not (self.training and self.jitter):
            return x
        return x * torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)

    def _weights(self, x: Tensor, probabilities: Tensor, chosen: Tensor, indices: Tensor) -> Tensor:
        return chosen

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, jitter={self.jitter}"


class ScaleAdapterRouter(_Router):
    """Top k by probability, while a second matrix has its own say in the weights (AdaMoE, CSMoE).

    ``p = softmax(gate @ x)`` alone selects. Then for the chosen i (arXiv 2510.14300, section 3)

    - ``combine="add"`` (AdaMoE): ``weight_i = p_i + (adapter @ x)_i``, of either sign;
    - ``combine="concat"`` (CSMoE): ``weight_i = softmax(adapter @ [x ; p])_i`` over all E experts.

    Explained in ``book/foundations/02-mixture-of-experts``.

    Args:
        dim: width of a token.
        experts: number of experts E.
        k: experts per token.
        combine: "add" or "concat".
        device: where the matrices are made.
        dtype: type of the matrices; the arithmetic is in float32 at least.

    Attributes:
        gate: the matrix that selects, (E, dim).
        adapter: the matrix that scales, (E, dim) for "add", (E, dim + E) for "concat".

    Raises:
        ValueError: dim or experts below 1, k not in 1..experts, or another `combine`.
    """

    init_std = 0.006  # the authors' code, for both matrices

    def __init__(
        self, dim: int, experts: int, *, k: int, combine: str = "add", device=None, dtype=None
    ):
        super().__init__(dim, experts, k, device, dtype)
        if combine not in ("add", "concat"):
            raise ValueError(f"combine is {combine!r}; choose 'add' (AdaMoE) or 'concat' (CSMoE)")
        self.combine = combine
        width = dim if combine == "add" else dim + experts
        self.adapter = nn.Parameter(torch.empty(experts, width, device=device, dtype=dtype))
        self.reset_parameters()

    def _weights(self, x: Tensor, probabilities: Tensor, chosen: Tensor, indices: Tensor) -> Tensor:
        adapter = self.adapter.to(x.dtype)
        if self.combine == "add":
            return chosen + F.linear(x, adapter).gather(1, indices)
        scores = F.linear(torch.cat([x, probabilities], dim=1), adapter)
        return scores.softmax(dim=-1).gather(1, indices)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, combine={self.combine!r}"


def load_balancing_loss(routing: Routing, *, form: str = "switch") -> Tensor:
    """How unevenly the experts are used: large when the probable experts are the chosen ones.

    With f_e the share of all choices that fell on expert e (T * k choices of the T real tokens,
    so f sums to 1 whatever k is) and P_e the mean probability of e over the real tokens:

    - ``form="switch"``: ``E * sum_e f_e P_e``, 1 when balanced (Switch Transformers, equation 4);
    - ``form="mean"``: ``mean_e f_e P_e``, 1 / E^2 when balanced (the code of arXiv 2510.14300),
      which is E^2 times weaker.

    An even f or an even P gives the balanced value; where the two disagree it can be less. The
    gradient flows through P. Choices that capacity dropped count, as they were chosen. Padding
    does not; without a real token the loss is 0. Explained in
    ``book/foundations/02-mixture-of-experts``.

    Args:
        routing: the routing of one layer.
        form: "switch" or "mean".

    Returns:
        A scalar, float32 or float64.

    Raises:
        ValueError: another `form`.

    >>> even = torch.full((4, 4), 0.25)
    >>> routing = Routing(torch.arange(4)[:, None], even[:, :1], even, even.log())
    >>> load_balancing_loss(routing).item(), load_balancing_loss(routing, form="mean").item()
    (1.0, 0.0625)
    """
    if form not in ("switch", "mean"):
        raise ValueError(f"form is {form!r}; choose 'switch' (E * sum f P) or 'mean' (mean of f P)")
    indices, _, probabilities, _, mask = routing
    (tokens, k), experts = indices.shape, probabilities.shape[1]
    if mask is None:
        real = torch.ones_like(indices, dtype=probabilities.dtype)
        count = max(tokens, 1)
    else:
        real = mask.unsqueeze(1).expand_as(indices).to(probabilities.dtype)
        count = mask.sum().clamp(min=1)
        probabilities = probabilities.masked_fill(~mask.unsqueeze(1), 0.0)
    share = probabilities.new_zeros(experts)
    share = share.index_add(0, indices.reshape(-1), real.reshape(-1)) / (count * k)
    product = (share * (probabilities.sum(dim=0) / count)).sum()
    return product * experts if form == "switch" else product / experts


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over the real tokens of ``logsumexp(logits) ** 2``, which keeps the logits small.

    ST-MoE (Zoph et al. 2022, equation 5). Without a real token the loss is 0. Explained in
    ``book/foundations/02-mixture-of-experts``.

    Args:
        routing: the routing of one layer.

    Returns:
        A scalar, float32 or float64.

    >>> even = torch.zeros(3, 1)
    >>> router_z_loss(Routing(even.long(), even, even.exp(), even + 2.0)).item()
    4.0
    """
    logits, mask = routing.logits, routing.mask
    if mask is None:
        return logits.logsumexp(dim=-1).square().sum() / max(logits.shape[0], 1)
    logits = logits.masked_fill(~mask.unsqueeze(1), 0.0)
    squares = logits.logsumexp(dim=-1).square().masked_fill(~mask, 0.0)
    return squares.sum() / mask.sum().clamp(min=1)
