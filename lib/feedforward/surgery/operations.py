"""Replace the feed-forward layers of a model, or make mixtures of experts of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from feedforward.layers.experts import MoE
from feedforward.layers.guided import SelfGuided
from feedforward.layers.structured import PreMerged
from feedforward.surgery.finding import (
    REPLACED,
    DenseFFN,
    FeedForward,
    bias_of,
    features,
    places_of_ffns,
)
from feedforward.surgery.padding import watch_masks
from feedforward.surgery.recording import described_as, record, refresh

Model = TypeVar("Model", bound=nn.Module)


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
            kind = {"bias": bias_of(linear) is not None, "device": ffn.device, "dtype": ffn.dtype}
            new = make(*features(linear), **(kind | options))
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

    What several blocks share is replaced once and in all of them. An ``MoE`` in a block that is
    given an attention mask gets the mask of real tokens at every call, so that padding is never
    routed. Nothing is kept between calls, so activation checkpointing and several threads are no
    matter; ``torch.compile`` breaks its graph there. What was done is recorded in
    ``model.config.feedforward``, from which ``load`` repeats it. Explained in
    ``book/foundations/02-mixture-of-experts`` and ``book/foundations/03-structured-matrices``.

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
            already, one that shares only a part with another block, or what `build` returned does
            not fit. The model is then as it was.

    >>> from feedforward import MoE, TopKRouter, replace_ffn
    >>> block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    >>> model = nn.ModuleList([block])
    >>> def build(ffn):
    ...     return MoE(ffn.dim, ffn.hidden, 4, router=TopKRouter(ffn.dim, 4, k=1))
    >>> type(replace_ffn(model, build)[0]).__name__
    'MoE'
    """
    chosen = choose(model, layers)
    made = [check_built(build(ffn), ffn) for ffn in chosen]
    for ffn, new in zip(chosen, made, strict=True):
        install(ffn, new)
        whole = isinstance(new, nn.Module)
        described = described_as("module" if whole else "linears", new, ffn)
        record(model, {"operation": "replace_ffn", "layers": [ffn.index], **described})
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

    With `preserve` it starts at the parent's function. All experts are equal at the start, so the
    layer gives m times the parent's output, where m is the sum of the weights. Where m is the same
    for every token, what is left is rounding. Where it is not, the router's matrices are scaled by
    1e-5. That keeps the order of the logits (at k of E, each weight is then about 1 / E) and makes
    m a constant, k / E, 1 + k / E or s + (1 - s) * k / E, to about 1e-4 of itself, less at widths
    below a thousand; in float64 too. So near to each other are the probabilities that float32, in
    which a float32 router chooses, takes some for equal: of random tokens up to four in a hundred,
    whose best logits hardly differed, go to other experts than before the scaling, which changes
    no output. Then the last weights and biases of all experts, the shared one too, are divided by
    m. Only the start is fixed: everything trains as usual from there. Explained in
    ``book/foundations/02-mixture-of-experts``.

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
        preserve: start at the parent's function, to the tolerance above.
        layers: numbers of the FFNs, negative ones from the end; None for all.

    Returns:
        The model that was given.

    Raises:
        ValueError: as in ``replace_ffn``; sizes that ``MoE`` refuses; a noise below 0 or endless;
            `preserve` together with noise or a capacity, with a router whose weights depend on
            the token even when its matrices are nearly zero, or with `shared` where another part
            of the model uses the FFN's last weights. The model is then as it was.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; a standard deviation is finite and not negative")
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
    chosen = choose(model, layers)
    if preserve and shared:
        _check_alone(model, chosen)
    made = [upcycled(ffn, router(ffn.dim, experts), **options) for ffn in chosen]
    for ffn, moe in zip(chosen, made, strict=True):
        _copy_weights(ffn, moe, noise)
    factors = [_output_factor(moe) if preserve else 1.0 for moe in made]
    # nothing is changed before everything is made
    refresh(model)  # guides that were released since, for afterwards the maps are not found
    for ffn, moe, factor in zip(chosen, made, factors, strict=True):
        _scale_output(moe, 1.0 / factor)
        install(ffn, moe)
        described = options | described_as("router", moe.router, ffn)
        described |= {"noise": noise, "preserve": preserve}
        record(model, {"operation": "upcycle", "layers": [ffn.index], **described})
    return model


def choose(model: nn.Module, layers: Iterable[int] | None) -> list[FeedForward]:
    """The FFNs with these numbers."""
    places = places_of_ffns(model)
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
        return _whole_shares(model, chosen)
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
    return _whole_shares(model, [chosen[index] for index in sorted(chosen)])


def _whole_shares(model: nn.Module, chosen: list[FeedForward]) -> list[FeedForward]:
    """The same, none of which shares one of its two modules with a block and not the other."""
    parents = _parents(model)
    for ffn in chosen:
        if len({parents.get(id(place.owner)) for place in ffn._places}) > 1:
            raise ValueError(
                f"{ffn.name!r} shares only one of its two modules with another block, which would "
                "be left with half of what is replaced; give each block its own with copy.deepcopy"
            )
    return chosen


def _parents(model: nn.Module) -> dict[int, frozenset[int]]:
    """Of each module, by id: the ids of the modules that hold it."""
    parents: dict[int, frozenset[int]] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            parents[id(child)] = parents.get(id(child), frozenset()) | {id(parent)}
    return parents


def _check_alone(model: nn.Module, chosen: list[FeedForward]) -> None:
    """Raise a `ValueError` if something else uses the weights that `preserve` divides."""
    parents, users = _parents(model), {}
    for module in model.modules():
        for weight in module._parameters.values():
            users[id(weight)] = users.get(id(weight), 0) + 1
    for ffn in chosen:
        down = ffn.linears[-1]
        inside = [id(m) for m in down.modules()]
        if any(len(parents.get(m, ())) > 1 for m in inside) or any(
            users.get(id(weight), 0) > 1 for weight in down.parameters()
        ):
            raise ValueError(
                f"the last linear map of {ffn.name!r} is used elsewhere in the model too, and "
                "preserve=True would change it there; give this FFN its own with copy.deepcopy, or "
                "leave out preserve or shared"
            )


def check_built(
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
        if not ffn._whole and ffn.gated:
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
        if features(module) not in (None, features(old)):
            raise ValueError(
                f"build returned a map {features(module)} in {ffn.name!r} in the place of one of "
                f"{features(old)}"
            )
    return tuple(module.to(device=ffn.device, dtype=ffn.dtype) for module in new)


def install(ffn: FeedForward, new: nn.Module | tuple[nn.Module, ...]) -> None:
    """Put what was built in the place of an FFN, or of its linear maps."""
    if isinstance(new, tuple):
        for place, module in zip(ffn._places, new, strict=True):
            place.put(module)
        return
    if ffn._whole:
        body = new
        if ffn._dropout is not None:
            new = nn.Sequential()
            new.add_module("body", body)
            new.add_module("dropout", ffn._dropout)
        for place in ffn._whole:
            place.put(new)
    else:
        up, down = ffn._places
        up.put(new)
        ffn._activation.put(nn.Identity())
        down.put(nn.Identity())
    setattr(new, REPLACED, True)
    mixtures = [module for module in new.modules() if isinstance(module, MoE)]
    if mixtures:
        watch_masks(ffn._blocks, mixtures)


def upcycled(
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
    # a seed that nobody else takes: tokens drawn like the router's matrices would fit them
    generator = torch.Generator().manual_seed(2510_14300)
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
