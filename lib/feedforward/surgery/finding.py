"""What a feed-forward layer is: found in a model by its structure, whatever its class is called."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from feedforward.layers.guided import SelfGuided
from feedforward.layers.structured import PreMerged, StructuredLinear
from feedforward.surgery.padding import forward_parameters


class Place(NamedTuple):
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
    _places: tuple[Place, ...] = field(repr=False)  # of the linear maps
    _activation: Place = field(repr=False)
    _whole: tuple[Place, ...] = field(repr=False)  # all, of a module that is this FFN alone
    _dropout: nn.Module | None = field(repr=False)  # on the output of that module
    _blocks: tuple[nn.Module, ...] = field(repr=False)  # which are given the attention mask

    @property
    def bias(self) -> bool:
        """Whether a linear map has a bias."""
        return any(bias_of(linear) is not None for linear in self.linears)

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
                weight.new_zeros(weight.shape[0]) if bias_of(linear) is None else bias_of(linear)
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
        The FFNs in the order in which the model registers them; one that several blocks share
        comes once. Those that were replaced by something else are missing, but the numbers of the
        others count them.
    """
    return [ffn for ffn in places_of_ffns(model) if ffn is not None]


# marks what stands in the place of an FFN
REPLACED = "_replaces_ffn"


def places_of_ffns(model: nn.Module) -> list[FeedForward | None]:
    """The FFNs by number; None where one was replaced."""
    places, seen, paths = [], {}, list(_walk(model))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for path, name, repeated in paths:
            module = path[-1]
            if id(module) in seen:
                continue
            if getattr(module, REPLACED, False):
                seen[id(module)] = None
                places.append(None)
            elif repeated:
                seen[id(module)] = None
                if ffn := _match(path, name, len(places)):
                    seen[id(module)] = ffn.index
                    places.append(ffn)
    everywhere: dict[int, list[tuple[list[nn.Module], str]]] = {}
    for path, name, _ in paths:
        if (index := seen.get(id(path[-1]))) is not None:
            everywhere.setdefault(index, []).append((path, name))
    for index, found in everywhere.items():
        if len(found) > 1:
            places[index] = _shared(places[index], found)
    return places


def _shared(ffn: FeedForward, found: list[tuple[list[nn.Module], str]]) -> FeedForward:
    """The FFN, with all places in which its module is found."""
    whole = ()
    if ffn._whole:
        places = [Place(path[-2], name.rpartition(".")[2]) for path, name in found]
        whole = tuple({(id(place.owner), place.name): place for place in places}.values())
    blocks = {id(block): block for path, _ in found if (block := _masked_block(path))}
    return replace(ffn, _whole=whole, _blocks=tuple(blocks.values()))


def _walk(model: nn.Module) -> Iterator[tuple[list[nn.Module], str, bool]]:
    """Every module with its ancestors, its name, and whether it is in a repeated block."""

    def visit(path, name, repeated):
        yield path, name, repeated
        module = path[-1]
        if getattr(module, REPLACED, False):
            return
        # not named_children, which leaves out what stands there twice
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        stack = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len({type(child) for _, child in children}) == 1
        )
        for key, child in children:
            yield from visit([*path, child], f"{name}.{key}" if name else key, repeated or stack)

    yield from visit([model], "", False)


def _match(path: list[nn.Module], name: str, index: int) -> FeedForward | None:
    """The FFN whose activation and first linear map are children of the last module of `path`."""
    owner = path[-1]
    linears = {key: size for key, m in owner.named_children() if (size := features(m))}
    if not 1 <= len(linears) <= 3:
        return None
    activations = [key for key in _callables(owner) if _is_activation(getattr(owner, key))]
    if len(activations) != 1:
        return None
    activation = Place(owner, activations[0])
    block = _masked_block(path)

    def ffn(places, dim, hidden, gated, whole=(), dropout=None):
        modules = tuple(getattr(place.owner, place.name) for place in places)
        function = getattr(owner, activations[0])
        return FeedForward(
            index, name, dim, hidden, gated, function, modules,
            tuple(places), activation, whole, dropout, (block,) if block else (),
        )  # fmt: skip

    if len(linears) == 1:  # BERT: the second linear map is in the next module
        ((up, (dim, hidden)),) = linears.items()
        after = _next_sibling(path)
        down = [key for key, m in after.named_children() if features(m)] if after else []
        if len(down) == 1 and features(getattr(after, down[0])) == (hidden, dim):
            return ffn([Place(owner, up), Place(after, down[0])], dim, hidden, gated=False)
        return None

    alone = _only_ffn(owner)
    for down, (hidden, dim) in reversed(linears.items()):
        into = [key for key in linears if key != down]
        sizes = {linears[key] for key in into}
        if sizes != {(dim, hidden)} and (len(into) > 1 or sizes != {(dim, 2 * hidden)}):
            continue
        if alone and (followed := _follow(owner, into, down, activations[0], dim)):
            places = [Place(owner, key) for key in (*followed.into, down)]
            if not followed.alone or len(path) < 2:
                return ffn(places, dim, hidden, followed.gated)
            whole = Place(path[-2], name.rpartition(".")[2])
            return ffn(places, dim, hidden, followed.gated, (whole,), followed.dropout)
        if not alone and sizes == {(dim, hidden)} and len(into) == 1:
            # BART: one module with attention and norms, too much to follow
            return ffn([Place(owner, into[0]), Place(owner, down)], dim, hidden, gated=False)
    return None


def _masked_block(path: list[nn.Module]) -> nn.Module | None:
    """The innermost module of the path that is given the attention mask."""
    return next((m for m in reversed(path) if "attention_mask" in forward_parameters(m)), None)


def features(module: nn.Module) -> tuple[int, int] | None:
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


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias of a linear map: guided and pre-merged layers have it in the layer they wrap."""
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
    inside = {id(p) for m in owner.children() if features(m) for p in m.parameters()}
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
            given[key], known[key] = x, numbers(features(getattr(owner, key))[1])
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
