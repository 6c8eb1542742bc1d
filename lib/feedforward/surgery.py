"""Replace the feed-forward layers of a model, Hugging Face models first, and save the result."""

import contextvars
import copy
import inspect
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from feedforward.layers.experts import MoE
from feedforward.layers.guided import SelfGuided
from feedforward.layers.routing import ScaleAdapterRouter, SwitchRouter, TopKRouter
from feedforward.layers.structured import (
    BlockDense,
    BlockShuffle,
    LowRank,
    PreMerged,
    StructuredLinear,
    measure_threshold,
    search_threshold,
)
from feedforward.timing import interleaved

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)


# -- what a feed-forward layer is ------------------------------------------------------------


class _Place(NamedTuple):
    """Where a module sits: an attribute of its owner."""

    owner: nn.Module
    name: str

    def put(self, module: nn.Module) -> None:
        module.train(self.owner.training)
        setattr(self.owner, self.name, module)


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A dense feed-forward layer (FFN) found in a model, as ``replace_ffn`` shows it to `build`.

    ``y = down(activation(up(x)))`` or, gated, ``y = down(activation(gate(x)) * up(x))``.
    Explained in ``book/foundations/01-feed-forward``.

    Attributes:
        index: number of the FFN in the model, from 0, counting those that were replaced.
        name: path of the module that holds it, such as ``"transformer.layer.0.ffn"``.
        dim: width of a token.
        hidden: hidden width.
        gated: whether it has a gate.
        activation: the activation function.
        linears: its linear maps: (up, down); gated (gate, up, down), or (gate and up in one, down).
    """

    index: int
    name: str
    dim: int
    hidden: int
    gated: bool
    activation: Callable[[Tensor], Tensor]
    linears: tuple[nn.Module, ...]
    _places: tuple[_Place, ...] = field(repr=False)  # of the linear maps
    _activation: _Place = field(repr=False)
    _whole: _Place | None = field(repr=False)  # of a module that is this FFN and nothing else
    _dropout: nn.Module | None = field(repr=False)  # on the output of that module
    _block: nn.Module | None = field(repr=False)  # which is given the attention mask

    @property
    def bias(self) -> bool:
        """Whether a linear map has a bias."""
        return any(_bias(linear) is not None for linear in self.linears)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.linears[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.linears[0].parameters()).dtype

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies of the weights, in the layout of one expert of ``MoE``.

        Returns:
            ``w_in`` (hidden, dim), gated (2 * hidden, dim) with the gate's rows first; ``b_in``, as
            long as w_in; ``w_out`` (dim, hidden); ``b_out`` (dim,). A bias that the FFN does not
            have is zero.
        """
        with torch.no_grad():
            *into, out = [_dense_weight(linear) for linear in self.linears]
            biases = [
                weight.new_zeros(weight.shape[0]) if _bias(linear) is None else _bias(linear)
                for weight, linear in zip([*into, out], self.linears, strict=True)
            ]
            return torch.cat(into), torch.cat(biases[:-1]), out.clone(), biases[-1].clone()

    def dense(self) -> "DenseFFN":
        """The FFN as a module of its own, around the same linear maps."""
        return DenseFFN(self.linears, self.activation, gated=self.gated)


class DenseFFN(nn.Module):
    """A dense FFN made of given linear maps: what ``upcycle`` keeps as the shared expert.

    Args:
        linears: (up, down); gated (gate, up, down), or (gate and up in one, down).
        activation: the activation function.
        gated: whether there is a gate.
    """

    def __init__(
        self, linears: Sequence[nn.Module], activation: Callable[[Tensor], Tensor], *, gated: bool
    ):
        super().__init__()
        self.gate = linears[0] if len(linears) == 3 else None
        self.up, self.down = linears[-2:]
        self.activation, self.gated = activation, gated

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., dim) to (..., dim)."""
        up = self.up(x)
        if not self.gated:
            return self.down(self.activation(up))
        gate, up = up.chunk(2, dim=-1) if self.gate is None else (self.gate(x), up)
        return self.down(self.activation(gate) * up)


def find_ffns(model: nn.Module) -> list[FeedForward]:
    """Find the dense FFNs of a model by their structure, whatever its classes are called.

    An FFN is, inside a repeated block (an element of a ``ModuleList``, or of a ``Sequential`` of
    blocks of one class), one activation between linear maps that go from a width to a hidden width
    and back: within one module (DistilBERT, GPT-2, Llama, T5, BART) or with the second map in the
    module that follows (BERT). An activation is what works element by element and is not
    linear, which is tried out. A module that is an FFN and nothing else is followed with a probe,
    which shows what is gate and what is up and turns away modules that do anything more.
    Attention, embeddings, poolers and heads are none of this. Structured linear maps count as
    linear maps. Explained in ``book/foundations/01-feed-forward``.

    Args:
        model: the model.

    Returns:
        The FFNs in the order in which the model registers them. Those that were replaced by
        something else are missing, but the numbers of the others count them.
    """
    return [ffn for ffn in _places_of_ffns(model) if ffn is not None]


# marks what stands in the place of an FFN
_REPLACED = "_replaces_ffn"


def _places_of_ffns(model: nn.Module) -> list[FeedForward | None]:
    """The FFNs by number; None where one was replaced."""
    places, seen = [], set()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for path, name, repeated in _walk(model):
            module = path[-1]
            if getattr(module, _REPLACED, False):
                places.append(None)
            elif repeated and id(module) not in seen:
                seen.add(id(module))
                if ffn := _match(path, name, len(places)):
                    places.append(ffn)
    return places


def _walk(model: nn.Module) -> Iterator[tuple[list[nn.Module], str, bool]]:
    """Every module with its ancestors, its name, and whether it is in a repeated block."""

    def visit(path, name, repeated):
        yield path, name, repeated
        module = path[-1]
        if getattr(module, _REPLACED, False):
            return
        children = list(module.named_children())
        stack = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len({type(child) for _, child in children}) == 1
        )
        for key, child in children:
            yield from visit([*path, child], f"{name}.{key}" if name else key, repeated or stack)

    yield from visit([model], "", False)


def _match(path: list[nn.Module], name: str, index: int) -> FeedForward | None:
    """The FFN whose activation and first linear map are children of the last module of `path`."""
    owner = path[-1]
    linears = {key: size for key, m in owner.named_children() if (size := _features(m))}
    if not 1 <= len(linears) <= 3:
        return None
    activations = [key for key in _callables(owner) if _is_activation(getattr(owner, key))]
    if len(activations) != 1:
        return None
    activation = _Place(owner, activations[0])
    block = next((m for m in reversed(path) if "attention_mask" in _parameters(m)), None)

    def ffn(places, dim, hidden, gated, whole=None, dropout=None):
        modules = tuple(getattr(place.owner, place.name) for place in places)
        function = getattr(owner, activations[0])
        return FeedForward(
            index, name, dim, hidden, gated, function, modules,
            tuple(places), activation, whole, dropout, block,
        )  # fmt: skip

    if len(linears) == 1:  # BERT: the second linear map is in the next module
        ((up, (dim, hidden)),) = linears.items()
        after = _next_sibling(path)
        down = [key for key, m in after.named_children() if _features(m)] if after else []
        if len(down) == 1 and _features(getattr(after, down[0])) == (hidden, dim):
            return ffn([_Place(owner, up), _Place(after, down[0])], dim, hidden, gated=False)
        return None

    alone = _only_ffn(owner)
    for down, (hidden, dim) in reversed(linears.items()):
        into = [key for key in linears if key != down]
        sizes = {linears[key] for key in into}
        if sizes != {(dim, hidden)} and (len(into) > 1 or sizes != {(dim, 2 * hidden)}):
            continue
        if alone and (followed := _follow(owner, into, down, activations[0], dim)):
            places = [_Place(owner, key) for key in (*followed.into, down)]
            if not followed.alone or len(path) < 2:
                return ffn(places, dim, hidden, followed.gated)
            whole = _Place(path[-2], name.rpartition(".")[2])
            return ffn(places, dim, hidden, followed.gated, whole, followed.dropout)
        if not alone and sizes == {(dim, hidden)} and len(into) == 1:
            # BART: one module with attention and norms, too much to follow
            return ffn([_Place(owner, into[0]), _Place(owner, down)], dim, hidden, gated=False)
    return None


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear map; None for other modules."""
    if isinstance(module, StructuredLinear | SelfGuided | PreMerged):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and weight.shape == (module.out_features, module.in_features):
        return module.in_features, module.out_features
    if _is_conv1d(module):
        return tuple(weight.shape)
    return None


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear map, whose weight is transposed."""
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return None not in sizes and getattr(module.weight, "shape", None) == sizes


def _dense_weight(linear: nn.Module) -> Tensor:
    """The matrix (out, in) of a linear map."""
    if hasattr(linear, "dense_weight"):
        return linear.dense_weight().detach()
    if isinstance(linear, SelfGuided | PreMerged):
        return linear.layer.dense_weight().detach()
    return (linear.weight.t() if _is_conv1d(linear) else linear.weight).detach()


def _bias(linear: nn.Module) -> Tensor | None:
    # guided and pre-merged layers have theirs in the layer that they wrap
    return linear.layer.bias if isinstance(linear, SelfGuided | PreMerged) else linear.bias


def _callables(owner: nn.Module) -> Iterator[str]:
    """Names of what may be an activation: modules without weights, and plain functions."""
    for key, module in owner.named_children():
        if not any(True for _ in module.children()) and not module.state_dict():
            yield key
    for key, value in vars(owner).items():
        if inspect.isbuiltin(value) or (inspect.isfunction(value) and not key.startswith("_")):
            yield key


def _is_activation(function: Callable) -> bool:
    """Whether a function works element by element and is not linear, by trying."""
    # the device is named because models are also made under torch.device("meta")
    x = torch.tensor([-3.0, -1.1, -0.4, 0.0, 0.3, 1.0, 2.6], device="cpu", dtype=torch.float32)
    training = getattr(function, "training", False)
    if training:
        function.eval()
    try:
        y = function(x.clone())
        single = torch.cat([function(part.clone()) for part in x.split(1)])
        if y.shape != x.shape or not torch.allclose(y, single, atol=1e-6):
            return False
        line = y[3] + x * (y[5] - y[3])
        return not torch.allclose(y, line, atol=1e-6)
    except Exception:  # it takes something else than a tensor: no activation
        return False
    finally:
        if training:
            function.train()


def _next_sibling(path: list[nn.Module]) -> nn.Module | None:
    if len(path) < 2:
        return None
    siblings = list(path[-2].children())
    place = next(i for i, module in enumerate(siblings) if module is path[-1]) + 1
    return siblings[place] if place < len(siblings) else None


def _only_ffn(owner: nn.Module) -> bool:
    """Whether the linear maps are all that has weights in a module."""
    inside = {id(p) for m in owner.children() if _features(m) for p in m.parameters()}
    return all(id(p) in inside for p in owner.parameters())


class _Followed(NamedTuple):
    into: list[str]  # names of the first linear maps, the gate's first
    gated: bool
    alone: bool  # the module does nothing before the first map and nothing but dropout at the end
    dropout: nn.Module | None  # at the end


def _follow(
    owner: nn.Module, into: list[str], down: str, activation: str, dim: int
) -> _Followed | None:
    """Follow a probe through a module: is it an FFN, which map is the gate, what else is done.

    Meanwhile the linear maps note what they are given and hand on known numbers, so that no weight
    is read. None when what reaches the last map is not what an FFN makes of them.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    function = getattr(owner, activation)
    dtype = next(owner.parameters()).dtype
    dropouts = [m for m in owner.children() if isinstance(m, nn.modules.dropout._DropoutNd)]
    stood_in = [getattr(owner, key) for key in (*into, down)] + dropouts
    forwards = [vars(module).get("forward") for module in stood_in]
    given, known, after = {}, {}, []

    # what works in chunks takes whole ones only
    length = getattr(owner, "chunk_size_feed_forward", 0) or 2

    def numbers(width):
        return torch.randn(1, length, width, generator=generator, device="cpu").to(dtype)

    def linear(key):
        def forward(x):
            given[key], known[key] = x, numbers(_features(getattr(owner, key))[1])
            return known[key]

        return forward

    def no_dropout(module):
        def forward(x):
            after.extend([module] if down in known else [])
            return x

        return forward

    x = numbers(dim)
    try:
        for key in (*into, down):
            getattr(owner, key).forward = linear(key)
        for module in dropouts:
            module.forward = no_dropout(module)
        output = owner(x)
        if len(into) == 2:
            orders = [into, into[::-1]]
            made = [function(known[gate]) * known[up] for gate, up in orders]
        elif known[into[0]].shape == given[down].shape:
            orders, made = [into], [function(known[into[0]])]
        else:
            gate, up = known[into[0]].chunk(2, dim=-1)
            orders, made = [into], [function(gate) * up]
        for order, hidden in zip(orders, made, strict=True):
            if torch.allclose(given[down], hidden, atol=1e-6):
                gated = len(into) == 2 or known[into[0]].shape != hidden.shape
                alone = output is known[down] and all(given[key] is x for key in into)
                return _Followed(order, gated, alone, after[-1] if after else None)
        return None
    except Exception:  # another signature, another path: not an FFN by itself
        return None
    finally:
        for module, forward in zip(stood_in, forwards, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


# -- operations ------------------------------------------------------------------------------


def structured(
    layer: type[nn.Module], *, guided: dict | None = None, **options
) -> Callable[[FeedForward], tuple[nn.Module, ...]]:
    """For ``replace_ffn``: a structured layer in the place of each linear map of an FFN.

    The layers start with their own initialisation; the replaced weights are not approximated.
    Explained in ``book/foundations/03-structured-matrices``.

    Args:
        layer: ``LowRank``, ``BlockShuffle`` or ``BlockDense``.
        guided: arguments of ``SelfGuided``, such as ``{"steps": 1000}``, to train the layers with
            self-guidance (arXiv 2406.16450); None for without.
        options: what the layer takes, such as ``rank=64``; or ``parameters=0.32``, the share of a
            dense layer's parameters, which ``layer.from_ratio`` makes ranks and blocks of.

    Returns:
        The `build` for ``replace_ffn``.

    >>> from feedforward import LowRank, replace_ffn
    >>> block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    >>> model = nn.ModuleList([block])
    >>> replace_ffn(model, structured(LowRank, rank=4))[0][0]
    LowRank(in_features=16, out_features=64, rank=4, bias=True, init='spectral')
    """
    make = layer.from_ratio if "parameters" in options else layer

    def build(ffn: FeedForward) -> tuple[nn.Module, ...]:
        made = []
        for linear in ffn.linears:
            kind = {"bias": _bias(linear) is not None, "device": ffn.device, "dtype": ffn.dtype}
            new = make(*_features(linear), **(kind | options))
            made.append(new if guided is None else SelfGuided(new, **guided))
        return tuple(made)

    return build


def replace_ffn(
    model: Model,
    build: Callable[[FeedForward], nn.Module | Sequence[nn.Module]],
    *,
    layers: Iterable[int] | None = None,
) -> Model:
    """Replace the FFNs of a model, in place.

    `build` is called with a description of each FFN and returns either

    - as many modules as the FFN has linear maps, in the order of ``FeedForward.linears``: each
      takes the place of one; activation, dropout and everything else stay. ``structured`` makes
      such a `build`; or
    - one module that maps (..., dim) to (..., dim), for example an ``MoE``: it takes the place of
      the linear maps and the activation. Dropout on the output, LayerNorm and the residual
      connection stay (BERT has them in the module of the second map); dropout on the hidden
      activations goes.

    An ``MoE`` in a block that is given an attention mask gets the mask of real tokens at every
    call, so that padding is never routed. Nothing is kept between calls, so activation
    checkpointing and several threads are no matter; ``torch.compile`` breaks its graph there. What
    was done is recorded in ``model.config.feedforward``, from which ``load`` repeats it. Explained
    in ``book/foundations/02-mixture-of-experts`` and ``book/foundations/03-structured-matrices``.

    Args:
        model: the model; it is changed.
        build: makes the new modules; they are moved to where the replaced weights are and into
            their type (``ffn.device``, ``ffn.dtype``).
        layers: numbers of the FFNs to replace, negative ones from the end; None for all. The
            structured models of arXiv 2406.16450 keep the first one dense:
            ``layers=range(1, n)``.

    Returns:
        The model that was given.

    Raises:
        ValueError: no FFN was found, a number that does not exist or was given twice or is replaced
            already, or what `build` returned does not fit. The model is then as it was.

    >>> from feedforward import MoE, TopKRouter, replace_ffn
    >>> block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    >>> model = nn.ModuleList([block])
    >>> def build(ffn):
    ...     return MoE(ffn.dim, ffn.hidden, 4, router=TopKRouter(ffn.dim, 4, k=1))
    >>> type(replace_ffn(model, build)[0]).__name__
    'MoE'
    """
    chosen = _choose(model, layers)
    made = [_check_built(build(ffn), ffn) for ffn in chosen]
    for ffn, new in zip(chosen, made, strict=True):
        _install(ffn, new)
        whole = isinstance(new, nn.Module)
        described = _described("module" if whole else "linears", new, ffn)
        _record(model, {"operation": "replace_ffn", "layers": [ffn.index], **described})
    return model


def upcycle(
    model: Model,
    *,
    experts: int,
    router: Callable[[int, int], nn.Module],
    shared: bool = True,
    shared_weight: float | None = None,
    capacity_factor: float | None = None,
    noise: float = 0.0,
    preserve: bool = False,
    layers: Iterable[int] | None = None,
) -> Model:
    """Make a mixture of experts of each FFN, every expert a copy of it, in place.

    The way of arXiv 2510.14300 (after Komatsuzaki et al. 2023): the routed experts are copies of
    the dense FFN, and with `shared` the dense FFN itself stays as the expert that is always on.
    As there, the model does not start as its parent: with one of four experts chosen by a nearly
    uniform router, the paper's code (``shared_weight=0.5``) gives 0.5 + 0.5 * 0.25 = 0.625 of the
    dense output, the paper's equation (``shared_weight=None``) 1 + 0.25 = 1.25 of it.

    With `preserve` it starts at exactly the parent's function, to rounding. All experts are equal
    at the start, so the layer gives m times the parent's output, where m is the sum of the
    weights. Where m differs from token to token, the router's matrices are scaled by 1e-5, which
    leaves every choice of the gate as it is (at k of E, each weight is then 1 / E) and m constant:
    k / E, 1 + k / E or s + (1 - s) * k / E. Then the last weights and biases of all experts, the
    shared one too, are divided by m. Only the start is fixed: everything trains as usual from
    there. Explained in ``book/foundations/02-mixture-of-experts``.

    Args:
        model: the model; it is changed. Masks and record as in ``replace_ffn``.
        experts: number of routed experts.
        router: makes a router from the width and the number of experts, for each layer anew:
            ``SwitchRouter``, or ``functools.partial(TopKRouter, k=2)``.
        shared: keep the dense FFN as the shared expert.
        shared_weight: None adds the shared output to the routed one; s mixes them as
            ``s * shared + (1 - s) * routed``.
        capacity_factor: of the ``MoE``; None never drops a token.
        noise: standard deviation of the Gaussian noise that is added to the weight matrices of
            the routed experts, so that they differ.
        preserve: start at the parent's function.
        layers: numbers of the FFNs, negative ones from the end; None for all.

    Returns:
        The model that was given.

    Raises:
        ValueError: as in ``replace_ffn``; sizes that ``MoE`` refuses; a negative noise;
            `preserve` together with noise or a capacity, or with a router whose weights depend on
            the token even when its matrices are nearly zero. The model is then as it was.
    """
    if noise < 0:
        raise ValueError(f"noise is {noise}; a standard deviation is not negative")
    if preserve and (noise or capacity_factor is not None):
        raise ValueError(
            f"preserve=True with noise={noise} and capacity_factor={capacity_factor}: noise and "
            "dropped tokens change the function; leave both out, or preserve"
        )
    options = {
        "experts": experts,
        "shared": shared,
        "shared_weight": shared_weight,
        "capacity_factor": capacity_factor,
    }
    chosen = _choose(model, layers)
    made = [_upcycled(ffn, router(ffn.dim, experts), **options) for ffn in chosen]
    for ffn, moe in zip(chosen, made, strict=True):
        _copy_weights(ffn, moe, noise)
    factors = [_output_factor(moe) if preserve else 1.0 for moe in made]
    # nothing is changed before everything is made
    for ffn, moe, factor in zip(chosen, made, factors, strict=True):
        _scale_output(moe, 1.0 / factor)
        _install(ffn, moe)
        described = options | _described("router", moe.router, ffn)
        described |= {"noise": noise, "preserve": preserve}
        _record(model, {"operation": "upcycle", "layers": [ffn.index], **described})
    return model


def premerge(
    model: nn.Module,
    *,
    threshold: int | Literal["measure"] = "measure",
    run: Callable[[int], object] | None = None,
    largest: int = 1024,
) -> nn.Module:
    """Put a ``PreMerged`` around every structured layer of a model, for generation with it.

    A step of decoding then multiplies by the dense weight, and the many tokens of a prompt go
    through the structured one: the number of tokens in flight decides. Where the dense weight never
    wins, the layer stays as it is, and costs no memory. Load weights before. Explained in
    ``book/structured-ffn/04-decoding``.

    Args:
        model: the model, changed in place. It may be a structured layer itself.
        threshold: as ``PreMerged`` takes it; ``"measure"`` measures the layers of each shape
            together, on the device that they are on.
        run: to measure: runs the model, in eval mode, with that many tokens in flight. Both ways of
            the layers are then timed in there, next to everything else that the model reads and
            does, which takes longer and is right where they are close. None: by themselves.
        largest: to measure: the largest number of tokens to try.

    Returns:
        The model; with a threshold the wrapped layer, if `model` was a structured layer itself.

    Raises:
        ValueError: a threshold that is neither a whole number from 0 nor ``"measure"``, no
            structured layer, one with a guide, or `run` with a threshold or in training mode.

    >>> block = nn.Sequential(LowRank(16, 64, rank=4), nn.GELU(), LowRank(64, 16, rank=4))
    >>> premerge(block.eval(), threshold=16)[0]
    PreMerged(
      threshold=16
      (layer): LowRank(in_features=16, out_features=64, rank=4, bias=True, init='spectral')
    )
    """
    if run is not None and (threshold != "measure" or model.training):
        raise ValueError(
            f"run measures in eval mode; threshold is {threshold!r} and training {model.training}: "
            'give threshold="measure" and call model.eval()'
        )
    if any(isinstance(module, SelfGuided) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has guided layers; drop the guides first with "
            "feedforward.layers.guided.release"
        )
    places = [
        _Place(parent, name)
        for parent in model.modules()
        if not isinstance(parent, PreMerged)
        for name, child in parent._modules.items()
        if isinstance(child, StructuredLinear)
    ]
    layers = [getattr(place.owner, place.name) for place in places]
    if isinstance(model, StructuredLinear):
        layers.append(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no structured layer that is not merged already; put some "
            "in with feedforward.replace_ffn"
        )
    shapes: dict[tuple, list[StructuredLinear]] = {}
    for layer in dict.fromkeys(layers):  # a shared one counts once
        shapes.setdefault(_shape(layer), []).append(layer)
    wrapped: dict[StructuredLinear, nn.Module] = {}
    for alike in shapes.values():
        tokens = threshold
        if threshold == "measure":
            tokens = measure_threshold(alike, largest=largest) if run is None else 0
        for layer in alike:
            keep = tokens == 0 and run is None
            wrapped[layer] = layer if keep else PreMerged(layer, threshold=tokens)

    def put() -> None:
        for place, layer in zip(places, layers, strict=False):
            setattr(place.owner, place.name, wrapped[layer])

    put()
    if run is not None:
        for alike in shapes.values():
            merged = [wrapped[layer] for layer in alike]
            _measure_in_place(merged, run, largest)
            if merged[0].threshold == 0:
                wrapped |= {layer: layer for layer in alike}
        put()
    return wrapped.get(model, model)


def _measure_in_place(merged: Sequence[PreMerged], run: Callable[[int], object], largest: int):
    """Set the threshold of layers of one shape, with which the whole model is the fastest."""

    def use(threshold: int) -> None:
        for layer in merged:
            layer.threshold = threshold

    def way(threshold: int, tokens: int) -> None:
        use(threshold)
        run(tokens)

    def ratio(tokens: int) -> float:
        runs = {True: partial(way, tokens, tokens), False: partial(way, 0, tokens)}
        times = interleaved(runs, device=merged[0].layer.v.device, rounds=11, seconds=2.0)
        return statistics.median(times[True]) / statistics.median(times[False])

    use(search_threshold(ratio, largest=largest))


def _shape(layer: StructuredLinear) -> tuple:
    """What decides how long a structured layer takes."""
    weights = (layer.v, layer.u)
    return (
        type(layer), layer.in_features, layer.out_features, layer.bias is None,
        *((weight.shape, weight.dtype, weight.device) for weight in weights),
    )  # fmt: skip


def _choose(model: nn.Module, layers: Iterable[int] | None) -> list[FeedForward]:
    """The FFNs with these numbers."""
    places = _places_of_ffns(model)
    total = len(places)
    if not total:
        raise ValueError(
            f"no feed-forward layer was found in {type(model).__name__}; in a repeated block "
            "(ModuleList) there must be an activation between linear maps to a hidden width and "
            "back"
        )
    if layers is None:
        chosen = [ffn for ffn in places if ffn is not None]
        if not chosen:
            raise ValueError(f"all {total} feed-forward layers have been replaced already")
        return chosen
    chosen = {}
    for number in layers:
        if not -total <= number < total:
            raise ValueError(
                f"layers names {number}; the model has {total} feed-forward layers, "
                f"0 to {total - 1} or -{total} to -1"
            )
        if places[number] is None:
            raise ValueError(f"feed-forward layer {number} has been replaced already")
        if number % total in chosen:
            raise ValueError(f"layers names feed-forward layer {number % total} twice")
        chosen[number % total] = places[number]
    return [chosen[index] for index in sorted(chosen)]


def _check_built(
    new: nn.Module | Sequence[nn.Module], ffn: FeedForward
) -> nn.Module | tuple[nn.Module, ...]:
    """What `build` returned, found to fit, and where and of the type of what it replaces."""
    if isinstance(new, nn.Module) and not isinstance(new, nn.ModuleList):
        for name, size in (("in_features", ffn.dim), ("out_features", ffn.dim), ("dim", ffn.dim)):
            if getattr(new, name, size) != size:
                raise ValueError(
                    f"build returned a {type(new).__name__} with {name}={getattr(new, name)} for "
                    f"{ffn.name!r}; one module must map {ffn.dim} to {ffn.dim}"
                )
        if ffn._whole is None and ffn.gated:
            raise ValueError(
                f"{ffn.name!r} does more than its gated FFN, so that no single module can take its "
                "place; let build return one module for each linear map"
            )
        return new.to(device=ffn.device, dtype=ffn.dtype)
    if isinstance(new, str) or not isinstance(new, Iterable):
        raise ValueError(
            f"build returned {type(new).__name__} for {ffn.name!r}; it must return a module, or "
            f"{len(ffn.linears)} modules for the linear maps"
        )
    new = tuple(new)
    if len(new) != len(ffn.linears) or not all(isinstance(m, nn.Module) for m in new):
        raise ValueError(
            f"build returned {[type(m).__name__ for m in new]} for {ffn.name!r}, which has "
            f"{len(ffn.linears)} linear maps; return one module for each, or one module for all"
        )
    for module, old in zip(new, ffn.linears, strict=True):
        if _features(module) not in (None, _features(old)):
            raise ValueError(
                f"build returned a map {_features(module)} in {ffn.name!r} in the place of one of "
                f"{_features(old)}"
            )
    return tuple(module.to(device=ffn.device, dtype=ffn.dtype) for module in new)


def _install(ffn: FeedForward, new: nn.Module | tuple[nn.Module, ...]) -> None:
    if isinstance(new, tuple):
        for place, module in zip(ffn._places, new, strict=True):
            place.put(module)
        return
    if ffn._whole is not None:
        body = new
        if ffn._dropout is not None:
            new = nn.Sequential()
            new.add_module("body", body)
            new.add_module("dropout", ffn._dropout)
        ffn._whole.put(new)
    else:
        up, down = ffn._places
        up.put(new)
        ffn._activation.put(nn.Identity())
        down.put(nn.Identity())
    setattr(new, _REPLACED, True)
    mixtures = [module for module in new.modules() if isinstance(module, MoE)]
    if mixtures and ffn._block is not None:
        _watch_masks(ffn._block, mixtures)


def _upcycled(
    ffn: FeedForward,
    router: nn.Module,
    *,
    experts: int,
    shared: bool = True,
    shared_weight: float | None = None,
    capacity_factor: float | None = None,
) -> MoE:
    """An MoE with the sizes of an FFN, and that FFN as the shared expert."""
    if not isinstance(router, nn.Module):
        raise ValueError(
            f"router made a {type(router).__name__} for {ffn.name!r}; it must make a router module"
        )
    if any(isinstance(linear, SelfGuided) for linear in ffn.linears):
        raise ValueError(
            f"{ffn.name!r} is trained with self-guidance; release its guides before upcycling"
        )
    return MoE(
        ffn.dim,
        ffn.hidden,
        experts,
        router=router.to(device=ffn.device, dtype=ffn.dtype),
        activation=ffn.activation,
        gated=ffn.gated,
        bias=ffn.bias,
        shared=ffn.dense() if shared else None,
        shared_weight=shared_weight,
        capacity_factor=capacity_factor,
        device=ffn.device,
        dtype=ffn.dtype,
    )


@torch.no_grad()
def _copy_weights(ffn: FeedForward, moe: MoE, noise: float) -> None:
    w_in, b_in, w_out, b_out = ffn.weights()
    for experts, weight in ((moe.w_in, w_in), (moe.w_out, w_out)):
        experts.copy_(weight.expand_as(experts))
        if noise:
            experts.add_(torch.randn_like(experts), alpha=noise)
    if moe.b_in is not None:
        moe.b_in.copy_(b_in.expand_as(moe.b_in))
        moe.b_out.copy_(b_out.expand_as(moe.b_out))


@torch.no_grad()
def _output_factor(moe: MoE) -> float:
    """What a new MoE gives of its parent's output; makes it the same for every token."""
    if moe.w_in.is_meta:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, moe.dim, generator=generator).to(moe.w_in.device)
    router = moe.router.eval()
    total = router(x).weights.sum(dim=1)
    if (total - total[0]).abs().max() > 1e-6 * total.abs().max():
        for weight in router.parameters():
            weight.mul_(1e-5)
        total = router(x).weights.sum(dim=1)
        if (total - total[0]).abs().max() > 1e-4 * total.abs().max():
            raise ValueError(
                f"the weights of {type(router).__name__} depend on the token even when its "
                "matrices are nearly zero, so that preserve=True cannot make up for them"
            )
    router.train()
    total = total.double().mean().item()
    if moe.shared is None:
        return total
    s = moe.shared_weight
    return 1.0 + total if s is None else s + (1.0 - s) * total


@torch.no_grad()
def _scale_output(moe: MoE, factor: float) -> None:
    """Multiply the output of all experts, through their last weights and biases."""
    last = [moe.w_out, moe.b_out]
    if isinstance(moe.shared, DenseFFN):
        down = moe.shared.down
        down = down.layer if isinstance(down, PreMerged) else down
        last += [down.u if hasattr(down, "u") else down.weight, down.bias]
    for weight in last:
        if weight is not None and factor != 1.0:
            weight.mul_(factor)


# -- padding ---------------------------------------------------------------------------------

# the real tokens of the block that runs, and those of the blocks around it
_masks: contextvars.ContextVar[tuple[Tensor | None, ...]] = contextvars.ContextVar(
    "real tokens", default=()
)
# those of a block that a backward pass computes again, without its hooks
_mask_again: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar(
    "real tokens, again", default=None
)


def _watch_masks(block: nn.Module, mixtures: list[MoE]) -> None:
    """Let the mixtures of experts in a block know which tokens are real."""
    if _drop_mask not in block._forward_hooks.values():
        _hook(block, _take_mask)
        block.register_forward_hook(_drop_mask, always_call=True)
        inside = (module for module in block.modules() if module is not block)
        attention = next((m for m in inside if "attention_mask" in _parameters(m)), None)
        if attention is not None:
            _hook(attention, _take_mask_again)
    for moe in mixtures:
        moe.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _hook(module: nn.Module, hook: Callable) -> None:
    hook = partial(hook, names=_parameters(module))
    module.register_forward_pre_hook(hook, with_kwargs=True)


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _given_mask(names: tuple[str, ...], args: tuple, kwargs: dict) -> Tensor | None:
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("attention_mask")
    return None if mask is None else _real_tokens(mask, given[names[0]].shape)


def _take_mask(block: nn.Module, args: tuple, kwargs: dict, *, names: tuple[str, ...]) -> None:
    """Forward pre-hook of a block: keep which tokens are real while it runs."""
    _masks.set((*_masks.get(), _given_mask(names, args, kwargs)))


def _take_mask_again(
    attention: nn.Module, args: tuple, kwargs: dict, *, names: tuple[str, ...]
) -> None:
    """Forward pre-hook of the self-attention in a block, which is given the same mask.

    Activation checkpointing repeats the forward of a block with or without its hooks (transformers
    5.23: without), but always with those of the modules inside.
    """
    if not _masks.get():
        _mask_again.set(_given_mask(names, args, kwargs))


def _drop_mask(block: nn.Module, args: tuple, output: object) -> None:
    """Forward hook of a block: it is done."""
    _masks.set(_masks.get()[:-1])


def _give_mask(moe: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of an MoE: hand it the mask of real tokens of the block around it."""
    if masks := _masks.get():
        mask = masks[-1]
    else:
        in_backward = torch._C._current_graph_task_id() != -1
        mask = _mask_again.get() if in_backward else None
    if mask is None or len(args) > 1 or "mask" in kwargs:
        return None
    tokens = args[0].shape[:-1]
    if mask.numel() != tokens.numel():
        raise ValueError(
            f"a block of {mask.numel()} tokens gave its mixture of experts {tokens.numel()} at a "
            "time, so that its mask does not fit; set chunk_size_feed_forward to 0 in the "
            "model's configuration"
        )
    return args, kwargs | {"mask": mask.reshape(tokens)}


def _real_tokens(attention_mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Which tokens (B, S) of the block's input are real: those that some token attends to.

    None for all of them.
    """
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"the attention mask is a {type(attention_mask).__name__}, which does not show single "
            "tokens; use attn_implementation 'sdpa' or 'eager' with mixtures of experts"
        )
    batch, length = shape[:2]
    if length == 1 and attention_mask.shape[-1] > 1:
        return None  # one step of generation: what was generated is real
    seen = attention_mask
    if seen.dim() > 2 and seen.is_floating_point():  # added to the scores: about -inf for unseen
        seen = seen > -1e4
    seen = seen.bool()
    if seen.dim() > 2:
        seen = seen.flatten(1, -2).any(dim=1)
    if seen.shape[1] > length:  # earlier tokens, and room for later ones, are in the cache
        end = int(seen.any(dim=0).nonzero().max()) + 1
        seen = seen[:, max(end - length, 0) :][:, :length]
    if seen.shape[1] != length:
        raise ValueError(
            f"the attention mask of shape {tuple(attention_mask.shape)} does not fit {length} "
            "tokens, so that padding cannot be told"
        )
    return seen.expand(batch, length)


# -- the record ------------------------------------------------------------------------------

_SIZES = ("in_features", "out_features", "bias")
# what describes a module, by type: arguments of its constructor
_RECORDED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: _SIZES,
    LowRank: (*_SIZES, "rank", "init"),
    BlockShuffle: (*_SIZES, "blocks", "init"),
    BlockDense: (*_SIZES, "rank", "blocks", "init"),
    SelfGuided: ("layer", "steps", "schedule", "stochastic"),
    PreMerged: ("layer", "threshold"),
    TopKRouter: ("dim", "experts", "k", "renormalize"),
    SwitchRouter: ("dim", "experts", "jitter"),
    ScaleAdapterRouter: ("dim", "experts", "k", "combine"),
    MoE: (
        "dim", "hidden", "experts", "router", "activation", "gated", "bias", "shared",
        "shared_weight", "capacity_factor",
    ),
}  # fmt: skip
_KINDS = {kind.__name__: kind for kind in _RECORDED}
# stands for the activation of the replaced FFN, or for that FFN as the shared expert
_PARENT = "parent"


class _Unrecorded(Exception):
    """A module that cannot be described in JSON."""


def _describe(value: object, ffn: FeedForward) -> object:
    """A module as JSON; `_remake` makes it of that again."""
    if isinstance(value, tuple):
        return [_describe(each, ffn) for each in value]
    if value is ffn.activation or isinstance(value, DenseFFN):
        return _PARENT
    if type(value) in _RECORDED:
        described = {"type": type(value).__name__}
        for name in _RECORDED[type(value)]:
            if name == "bias":
                bias = value.b_in if isinstance(value, MoE) else value.bias
                described[name] = bias is not None
            else:
                described[name] = _describe(getattr(value, name), ffn)
        return described
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Unrecorded(type(value).__name__)


def _described(key: str, value: object, ffn: FeedForward) -> dict:
    try:
        return {key: _describe(value, ffn)}
    except _Unrecorded as error:
        return {"unrecorded": str(error)}


def _remake(described: object, ffn: FeedForward) -> object:
    if isinstance(described, list):
        return tuple(_remake(each, ffn) for each in described)
    if not isinstance(described, dict):
        return described
    kind = _KINDS.get(described.get("type"))
    if kind is None:
        raise ValueError(f"unknown layer {described.get('type')!r}; known are {', '.join(_KINDS)}")
    options = {key: _remake(value, ffn) for key, value in described.items() if key != "type"}
    if options.get("activation") == _PARENT:
        options["activation"] = ffn.activation
    if options.get("shared") == _PARENT:
        options["shared"] = ffn.dense()
    if "device" in inspect.signature(kind).parameters:
        options |= {"device": ffn.device, "dtype": ffn.dtype}
    return kind(**options)


def _record(model: nn.Module, operation: dict) -> None:
    """Add an operation to a Hugging Face model's configuration; others have no place for it."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return
    recorded = copy.deepcopy(getattr(config, "feedforward", None) or [])
    if operation["operation"] == "replace_ffn":  # what stood there before is gone
        for earlier in recorded:
            earlier["layers"] = [i for i in earlier["layers"] if i not in operation["layers"]]
        recorded = [earlier for earlier in recorded if earlier["layers"]]
    if recorded and recorded[-1] | {"layers": 0} == operation | {"layers": 0}:
        recorded[-1]["layers"] += operation["layers"]
    else:
        recorded.append(operation)
    # another model may have been made of the same configuration object
    changed = copy.deepcopy(config)
    changed.feedforward = recorded
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = changed


def _refresh(model: nn.Module) -> None:
    """Describe structured layers anew: ``guided.release`` changes what was recorded."""
    recorded = getattr(model.config, "feedforward", None) or []
    linears = {i: o["linears"] for o in recorded if "linears" in o for i in o["layers"]}
    for ffn in find_ffns(model) if linears else ():
        described = _described("linears", ffn.linears, ffn)
        if ffn.index in linears and described != {"linears": linears[ffn.index]}:
            _record(model, {"operation": "replace_ffn", "layers": [ffn.index], **described})


def _replay(model: nn.Module, operations: list) -> None:
    """Repeat recorded operations; the weights are for the caller to fill in."""
    if not isinstance(operations, list) or not all(isinstance(o, dict) for o in operations):
        raise ValueError(
            f"feedforward in the configuration is {operations!r}, not a list of records"
        )
    for operation in operations:
        options = dict(operation)
        name, layers = options.pop("operation", None), options.pop("layers", None)
        if name not in ("replace_ffn", "upcycle"):
            raise ValueError(
                f"unknown operation {name!r} in the configuration; this release knows replace_ffn "
                "and upcycle"
            )
        if "unrecorded" in options:
            raise ValueError(f"{name} put in a {options['unrecorded']}, which cannot be remade")
        try:
            chosen = _choose(model, layers)
            if name == "upcycle":
                router = options.pop("router")
                sizes = {k: v for k, v in options.items() if k not in ("noise", "preserve")}
                made = [_upcycled(ffn, _remake(router, ffn), **sizes) for ffn in chosen]
            else:
                ((_, described),) = options.items()
                made = [_check_built(_remake(described, ffn), ffn) for ffn in chosen]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot repeat {operation}: {error}") from error
        for ffn, new in zip(chosen, made, strict=True):
            _install(ffn, new)


def from_config(config: "PreTrainedConfig", cls: "type[PreTrainedModel] | None" = None):
    """Make a model of a configuration and repeat the operations recorded in it; random weights.

    Args:
        config: a configuration of ``transformers``, such as ``model.config``.
        cls: class of the model; None for the one that ``config.architectures`` names.

    Returns:
        The model. Under ``torch.device("meta")`` it takes no memory, which is enough to count it.

    Raises:
        ValueError: no such class in ``transformers``, or an operation that cannot be repeated.
    """
    return _with_operations(cls or _model_class(config))(config)


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Save a Hugging Face model with replaced FFNs: configuration and weights, through safetensors.

    Everything is written to a temporary folder beside that then takes the place of `folder`; when
    something fails, an earlier save stays as it was. Other files in it (a tokenizer) are kept.

    Args:
        model: a model of ``transformers``; replaced or not.
        folder: where to; new, empty, or with an earlier save.

    Raises:
        ValueError: not a model of ``transformers``, a module that cannot be described in the
            configuration, or a folder with something else in it.
        OSError: it cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"save takes a model of transformers, given {type(model).__name__}; save the "
            "state_dict() of others with safetensors.torch.save_file"
        )
    _refresh(model)
    for operation in getattr(model.config, "feedforward", None) or []:
        if "unrecorded" in operation:
            raise ValueError(
                f"layers {operation['layers']} hold a {operation['unrecorded']}, which cannot be "
                f"described in the configuration (known are {', '.join(_KINDS)}), so load could "
                "not remake it; save the state_dict() with safetensors.torch.save_file instead"
            )
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; save takes a folder")
    earlier = list(folder.iterdir()) if folder.is_dir() else []
    if earlier and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds something else than a saved model; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
    ) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        # under the names that the model uses, not those of an older release of its class
        model.save_pretrained(new, save_original_format=False)
        for file in earlier:
            if not (file.suffix == ".safetensors" or (new / file.name).exists()):
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def load(folder: str | os.PathLike, cls: "type[PreTrainedModel] | None" = None):
    """Load what ``save`` wrote: make the model, repeat the operations, load every weight strictly.

    A checkpoint without replaced FFNs loads as well. Only safetensors files are read and no code
    from the folder is run.

    Args:
        folder: the folder.
        cls: class of the model; None for the one that the configuration names.

    Returns:
        The model, in evaluation mode as ``from_pretrained`` leaves it.

    Raises:
        ValueError: no folder or no weights, a file that is damaged or cut short, missing,
            additional or differently shaped weights, an unknown class or operation.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder that save wrote")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    cls = cls or _model_class(config)
    made = _with_operations(cls) if getattr(config, "feedforward", None) else cls
    try:
        model, report = made.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}") from error
    wrong = {
        what: sorted(map(str, report.get(f"{what}_keys") or []))
        for what in ("missing", "unexpected", "mismatched")
    }
    if any(wrong.values()):
        told = "; ".join(f"{what} {', '.join(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"the weights in {folder} do not fit its configuration: {told}")
    # loading a module's own weights runs what it does after loading: guides take up their count
    model.load_state_dict(model.state_dict())
    model.__class__ = cls
    return model


def _model_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    import transformers

    named = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, named, None) if isinstance(named, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"the configuration names the model class {named!r}, which transformers does not have; "
            "give the class as cls"
        )
    return cls


def _with_operations(cls: "type[PreTrainedModel]") -> "type[PreTrainedModel]":
    """The class, whose models have the operations of their configuration done."""

    class Operated(cls):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            _replay(self, getattr(config, "feedforward", None) or [])

    Operated.__name__ = cls.__name__  # transformers writes it into configurations
    return Operated
