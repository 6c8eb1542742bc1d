"""Mixture of experts: many feed-forward layers, of which each token uses k."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.layers.autocast import autocasting
from feedforward.layers.routing import Routing

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
}


_FEW = 64  # choices of experts, up to which starting kernels costs more than running them


class MoE(nn.Module):
    """A feed-forward layer of E experts; a router gives each token k of them.

    ``y = sum_i weight_i * expert_i(x)`` over the k chosen, ``expert_i(x) = w_out[i] @
    activation(w_in[i] @ x)``; gated, ``w_out[i] @ (activation(gate) * up)`` with ``[gate ; up] =
    w_in[i] @ x``. No token is dropped unless `capacity_factor` says so.
    Explained in ``book/foundations/02-mixture-of-experts``.

    Args:
        dim: width of a token.
        hidden: hidden width of one expert.
        experts: number of experts E.
        router: module that maps tokens (T, dim) and a mask to a ``Routing``.
        activation: "gelu", "gelu_tanh", "relu", "leaky_relu", "silu", or a function of a tensor
            that works element by element.
        gated: experts with a gate (GLU, Shazeer 2020).
        bias: experts with biases.
        shared: a module of the same width that every token goes through.
        shared_weight: None adds the shared output to the routed one (arXiv 2510.14300, the
            paper); s mixes them as ``s * shared + (1 - s) * routed`` (the paper's code, s = 0.5).
        capacity_factor: None for no limit. Otherwise an expert serves at most
            ``ceil(capacity_factor * real tokens * k / E)`` choices of one forward pass: first
            choices before second ones, earlier tokens before later ones (GShard, algorithm 1).
            What is beyond contributes zero, the weights of the other choices stay as they are.
        device: where the weights are made.
        dtype: type of the weights.

    Attributes:
        w_in: first weights, (E, hidden, dim); gated (E, 2 * hidden, dim), the gate's rows first.
        w_out: second weights, (E, dim, hidden).
        b_in: first biases, (E, hidden), gated (E, 2 * hidden); None without bias.
        b_out: second biases, (E, dim); None without bias.

    Raises:
        ValueError: a size below 1, a router of other sizes, an unknown activation, a capacity
            factor that is not positive, or a shared weight outside [0, 1] or without `shared`.

    >>> from feedforward import TopKRouter
    >>> moe = MoE(16, 32, 4, router=TopKRouter(16, 4, k=2))
    >>> moe(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        *,
        router: nn.Module,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        gated: bool = False,
        bias: bool = False,
        shared: nn.Module | None = None,
        shared_weight: float | None = None,
        capacity_factor: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("experts", experts)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
            # a router of one's own need not say its sizes
            if getattr(router, name, size) != size:
                raise ValueError(
                    f"the router was made for {name}={getattr(router, name)}, the layer for "
                    f"{name}={size}; give both the same"
                )
        if not callable(activation) and activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation is {activation!r}; choose one of {', '.join(_ACTIVATIONS)}, "
                "or give a function"
            )
        if shared_weight is not None and (shared is None or not 0.0 <= shared_weight <= 1.0):
            raise ValueError(
                f"shared_weight is {shared_weight} with shared={shared!r}; it takes a shared "
                "module and a value from [0, 1], or None to add the two outputs"
            )
        if capacity_factor is not None and not 0.0 < capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor is {capacity_factor}; it must be positive, or None for no limit"
            )
        self.dim, self.hidden, self.experts = dim, hidden, experts
        self.activation, self.gated = activation, gated
        self.shared_weight, self.capacity_factor = shared_weight, capacity_factor
        self.router, self.shared = router, shared
        made = {"device": device, "dtype": dtype}
        rows = 2 * hidden if gated else hidden
        self.w_in = nn.Parameter(torch.empty(experts, rows, dim, **made))
        self.w_out = nn.Parameter(torch.empty(experts, dim, hidden, **made))
        self.b_in = nn.Parameter(torch.empty(experts, rows, **made)) if bias else None
        self.b_out = nn.Parameter(torch.empty(experts, dim, **made)) if bias else None
        self._collectors = _Collectors()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the experts' weights anew, each expert its own, distributed as in ``nn.Linear``."""
        for weight, fan_in in (
            (self.w_in, self.dim),
            (self.b_in, self.dim),
            (self.w_out, self.hidden),
            (self.b_out, self.hidden),
        ):
            if weight is not None:
                nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Send each token through its experts.

        Args:
            x: tokens, (..., dim).
            mask: True for real tokens, (...) bool; padding takes no capacity and gets zeros.

        Returns:
            A tensor of x's shape, and of x's type or, under autocast, of autocast's.

        Raises:
            ValueError: another width or type of `x`, another shape or type of `mask`.
        """
        self._check(x, mask)
        tokens = x.reshape(-1, self.dim)
        real = None if mask is None else mask.reshape(-1)
        routing = self.router(tokens, real)
        kept = None if real is None else real.unsqueeze(1).expand_as(routing.indices)
        if self.capacity_factor is not None:
            kept = self._within_capacity(routing.indices, real)
        if kept is not None:
            routing = routing._replace(weights=routing.weights.masked_fill(~kept, 0.0))
        self._report(routing)
        y = self._route(tokens, routing, kept).reshape(x.shape)
        if self.shared is not None:
            # padding may hold NaN, which must not reach the shared weights' gradient
            shared = self.shared(x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0))
            s = self.shared_weight
            y = shared + y if s is None else s * shared + (1.0 - s) * y
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _report(self, routing: Routing) -> None:
        """Give the routing to whoever collects it."""
        if not self._collectors or _recomputing():
            return
        if self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                "a routing was collected in training mode without a graph, so a loss on it trains "
                "nothing: use checkpoint(..., use_reentrant=False), or model.eval() if you only "
                "look at the routing",
                stacklevel=3,
            )
        for collected in self._collectors:
            collected.append(routing)

    def _within_capacity(self, indices: Tensor, real: Tensor | None) -> Tensor:
        """Which choices their expert has room for, (T, k) bool; padding never has any."""
        tokens, k = indices.shape
        ids = indices if real is None else indices.masked_fill(~real.unsqueeze(1), self.experts)
        # choice by choice, so that a stable sort keeps first choices before second ones
        ids, order = ids.t().reshape(-1).sort(stable=True)
        place = torch.arange(tokens * k, device=ids.device)
        place = place - torch.searchsorted(ids, ids)  # how many choices come before it
        count = tokens if real is None else real.sum().double()
        # for whole numbers, place < ceil(c) is place < c
        kept = (place < self.capacity_factor * count * k / self.experts) & (ids < self.experts)
        return torch.empty_like(kept).scatter_(0, order, kept).reshape(k, tokens).t()

    def _route(self, x: Tensor, routing: Routing, kept: Tensor | None) -> Tensor:
        """The weighted sum of the chosen experts' outputs, (T, dim)."""
        if kept is None and 0 < routing.indices.numel() <= _FEW and _eager_on_cpu(x):
            return self._few(x, routing)
        dtype = x.dtype
        if autocasting(x):  # grouped_mm does not know autocast
            dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)
        b_in, b_out = (None if b is None else b.to(dtype) for b in (self.b_in, self.b_out))

        tokens, k = routing.indices.shape
        ids = routing.indices if kept is None else routing.indices.masked_fill(~kept, self.experts)
        ids, order = ids.reshape(-1).sort(stable=True)
        experts = torch.arange(self.experts, device=x.device)
        offsets = torch.searchsorted(ids, experts, right=True, out_int32=True)
        places = torch.arange(tokens * k, device=x.device)
        inverse = torch.empty_like(order).scatter_(0, order, places)
        source = order // k
        if kept is not None:
            # Choices that are not kept come last, past the last offset, where a grouped product
            # leaves its output and its gradient uninitialised. They read a row of zeros that is
            # nobody's, and whoever would read their output reads the last row that was computed.
            x = F.pad(x, (0, 0, 0, 1))
            source = source.masked_fill(ids == self.experts, tokens)
            inverse = inverse.minimum(offsets[-1] - 1).clamp(min=0)
        rows = x.index_select(0, source)
        if _groupable(rows, w_in) and _groupable(rows, w_out):
            y = self._grouped(rows, ids, offsets, w_in, b_in, w_out, b_out)
        else:
            y = self._loop(rows, offsets, w_in, b_in, w_out, b_out)
        y = y.index_select(0, inverse).view(tokens, k, self.dim)
        # choice by choice: no sum over a broadcast product, no bmm of bfloat16 (slow on CPU)
        weights = routing.weights.to(dtype).unsqueeze(2)
        (first, weight), *others = zip(y.unbind(1), weights.unbind(1), strict=True)
        total = first * weight
        for other, weight in others:
            total = torch.addcmul(total, other, weight)
        return total

    def _few(self, x: Tensor, routing: Routing) -> Tensor:
        """The same for few choices without a gradient, sorted in Python: fewer calls of torch."""
        ids, k = routing.indices.flatten().tolist(), routing.indices.shape[1]
        if k == 1 and ids.count(ids[0]) == len(ids):  # often so when a robot plans alone
            y = self._expert(x, ids[0])
            return y * routing.weights.to(y.dtype)
        places = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
        source = places if k == 1 else places // k
        used = sorted(set(ids))
        parts = x.index_select(0, source).split([ids.count(e) for e in used])
        y = torch.cat([self._expert(part, e) for part, e in zip(parts, used, strict=True)])
        y = y * routing.weights.to(y.dtype).view(-1, 1).index_select(0, places)
        return y.new_zeros(x.shape).index_add_(0, source, y)

    def _expert(self, x: Tensor, e: int) -> Tensor:
        """The output of one expert."""
        b_in, b_out = (None if b is None else b[e] for b in (self.b_in, self.b_out))
        return F.linear(self._activate(F.linear(x, self.w_in[e], b_in)), self.w_out[e], b_out)

    def _grouped(self, rows, ids, offsets, w_in, b_in, w_out, b_out) -> Tensor:
        """All experts on rows sorted by expert, each matrix product in one kernel."""
        h = F.grouped_mm(rows, w_in.transpose(1, 2), offs=offsets)
        if b_in is not None:
            h = h + F.pad(b_in, (0, 0, 0, 1)).index_select(0, ids)
        y = F.grouped_mm(self._activate(h), w_out.transpose(1, 2), offs=offsets)
        if b_out is not None:
            y = y + F.pad(b_out, (0, 0, 0, 1)).index_select(0, ids)
        return y

    def _loop(self, rows, offsets, w_in, b_in, w_out, b_out) -> Tensor:
        """The same, expert by expert, for types, widths and devices without a grouped product."""
        # on the meta device nothing says whose a row is; shapes are the same whosever it is
        ends = [rows.shape[0]] * self.experts if offsets.is_meta else offsets.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        *parts, rest = rows.split([*sizes, rows.shape[0] - ends[-1]])
        none = [None] * self.experts
        # unbind once: the backward of w[e] fills a gradient of the size of w for every expert
        experts = zip(
            parts,
            w_in.unbind(0),
            none if b_in is None else b_in.unbind(0),
            w_out.unbind(0),
            none if b_out is None else b_out.unbind(0),
            strict=True,
        )
        y = [F.linear(self._activate(F.linear(x, w, b)), v, c) for x, w, b, v, c in experts]
        return torch.cat([*y, torch.zeros_like(rest)])

    def _activate(self, h: Tensor) -> Tensor:
        activation = self.activation
        if isinstance(activation, str):
            activation = _ACTIVATIONS[activation]
        if not self.gated:
            return activation(h)
        gate, up = h.chunk(2, dim=-1)
        return activation(gate) * up

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"the layer takes (..., {self.dim}), given {tuple(x.shape)}")
        if x.dtype != self.w_in.dtype and not autocasting(x):
            raise ValueError(
                f"the layer's weights are {self.w_in.dtype}, given {x.dtype}; convert one of them "
                "with .to(dtype), or use torch.autocast"
            )
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"the mask takes shape {tuple(x.shape[:-1])} and type torch.bool (True = real "
                f"token), given {tuple(mask.shape)} of {mask.dtype}; an attention mask of ones "
                "and zeros becomes one by mask.bool()"
            )

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, hidden={self.hidden}, experts={self.experts}"
        if isinstance(self.activation, str):
            shown += f", activation={self.activation!r}"
        shown += f", gated={self.gated}, bias={self.b_in is not None}"
        for name in ("shared_weight", "capacity_factor"):
            if getattr(self, name) is not None:
                shown += f", {name}={getattr(self, name)}"
        return shown


class _Collectors(list):
    """The lists that a layer adds its routings to: shared by shallow copies, such as the replicas
    of DataParallel; a deep copy or an unpickled layer is another layer and starts without any."""

    def __reduce__(self):  # deepcopy and pickle both ask here
        return _Collectors, ()


@contextlib.contextmanager
def collect_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the ``Routing`` of every ``MoE`` layer of the forward passes made in the block.

    The routings come in the order in which the layers ran; several forward passes follow one
    another. Blocks may be nested: each gets everything that runs while it is open. Replicas of the
    model in other threads (``nn.DataParallel``) add theirs. When activation checkpointing computes
    a layer again in the backward pass, nothing is added twice.

    Losses of the collected routings reach the gate, under
    ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`` too. With
    ``use_reentrant=True`` the first forward pass runs without a graph, so its routings carry no
    gradient and a loss on them has no effect; a warning says so.

    Args:
        model: a module that is or holds ``MoE`` layers; without any the list stays empty.

    Yields:
        The list that fills as the model runs.

    >>> from feedforward import TopKRouter, load_balancing_loss
    >>> model = nn.Sequential(*(MoE(16, 32, 4, router=TopKRouter(16, 4, k=2)) for _ in range(3)))
    >>> with collect_routing(model) as routings:
    ...     output = model(torch.randn(5, 16))
    >>> loss = sum(load_balancing_loss(routing) for routing in routings) / len(routings)
    >>> len(routings), loss.requires_grad
    (3, True)
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    collected: list[Routing] = []
    for layer in layers:
        layer._collectors.append(collected)
    try:
        yield collected
    finally:
        for layer in layers:
            # by identity: lists of tensors do not compare
            layer._collectors[:] = [c for c in layer._collectors if c is not collected]


def _recomputing() -> bool:
    """Whether this forward pass is activation checkpointing's second one, inside a backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _eager_on_cpu(x: Tensor) -> bool:
    """Whether nothing is recorded: no gradient and no compilation; on the CPU."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not recorded


def _groupable(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``F.grouped_mm`` takes these rows and the transposed view of this weight."""
    if any(width * rows.element_size() % 16 for width in weight.shape[1:]):
        return False  # strides must be multiples of 16 bytes
    if torch.compiler.is_compiling():
        return rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    aligned = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return aligned and _grouped_mm_works(rows.dtype, rows.device)


@cache
def _grouped_mm_works(dtype: torch.dtype, device: torch.device) -> bool:
    """Try a small product and its gradient: what is supported differs by release and device."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            rows = torch.ones(2, 16, dtype=dtype, device=device, requires_grad=True)
            weight = torch.ones(2, 16, 16, dtype=dtype, device=device, requires_grad=True)
            offsets = torch.tensor([1, 2], dtype=torch.int32, device=device)
            y = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
            torch.autograd.grad(y, (rows, weight), torch.ones_like(y))
    except (RuntimeError, NotImplementedError):
        return False
    return True
