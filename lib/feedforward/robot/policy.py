"""A policy that flows: chunks of actions by flow matching, in the way of pi0, with any FFN.

Two streams of tokens meet in attention. The prefix holds what is seen and what is asked: features
of images and states of an instruction's tokens, both from frozen encoders. The action expert holds
the robot's state and the noisy actions, and its feed-forward layers are those of this library:
dense, or experts as in AdaMoE (arXiv 2510.14300) and its controls.
"""

import contextlib
import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from feedforward.files import DataError, atomic_write
from feedforward.layers.experts import MoE, collect_routing
from feedforward.layers.routing import (
    Routing,
    ScaleAdapterRouter,
    TopKRouter,
    load_balancing_loss,
)
from feedforward.profiles import unknown
from feedforward.robot.lerobot import STILL
from feedforward.surgery import DenseFFN, upcycle

#: Kinds of feed-forward layers of the action expert.
FFNS = ("dense", "adamoe", "moe", "csmoe", "collapsed")

# keys and values of one layer, each (B, key heads, tokens, head width)
_Memory = tuple[Tensor, Tensor]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class PolicyConfig:
    """The sizes of a policy and the kind of its action expert's feed-forward layers (FFN).

    All are gated (GeGLU) and without biases, behind an RMSNorm, as in pi0. The kinds:

    - ``"dense"``: one FFN;
    - ``"adamoe"``: E routed experts, weighted by probability plus scale adapter (AdaMoE);
    - ``"moe"``: weighted by the probability alone (the paper's vanilla MoE);
    - ``"csmoe"``: weighted by a softmax that sees token and probabilities (CSMoE);
    - ``"collapsed"``: a control, every token to the first expert with weight 1.

    Explained in ``book/adamoe/01-a-policy-that-flows``, the kinds in
    ``book/adamoe/03-selecting-is-not-weighting``.

    Args:
        state: numbers in the robot's state.
        action: numbers in an action.
        horizon: actions in a chunk.
        width: width of the action expert.
        depth: layers of both streams.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; None for as many.
        head_width: width of a head; None for ``width / heads``.
        hidden: hidden width of an FFN of the action expert, of one expert where there are several.
        text_width: width of the instruction's token states; 384 for MiniLM.
        image_width: numbers in a camera's features; None for a policy without images.
        cameras: number of cameras, each a token of the prefix.
        prefix_width: width of the prefix; None for `width`.
        prefix_hidden: hidden width of its FFNs; None for `hidden`.
        ffn: the kind.
        experts: routed experts E.
        k: experts that a token is given.
        shared: keep one more expert that is always on.
        shared_weight: None adds the shared output to the routed one (the paper); s mixes them as
            ``s * shared + (1 - s) * routed`` (0.5 in the released code).
        router_std: standard deviation that router and adapter start with.

    Raises:
        ValueError: sizes that do not fit together, an unknown kind, or options of another kind.

    >>> PolicyConfig(state=39, action=4, ffn="adamoe").experts
    4
    """

    state: int
    action: int
    horizon: int = 16
    width: int = 128
    depth: int = 3
    heads: int = 4
    kv_heads: int | None = None
    head_width: int | None = None
    hidden: int = 512
    text_width: int = 384
    image_width: int | None = None
    cameras: int = 0
    prefix_width: int | None = None
    prefix_hidden: int | None = None
    ffn: str = "dense"
    experts: int = 4
    k: int = 1
    shared: bool = True
    shared_weight: float | None = None
    router_std: float = 0.006

    def __post_init__(self):
        optional = ("kv_heads", "head_width", "image_width", "prefix_width", "prefix_hidden")
        sizes = (
            "state", "action", "horizon", "width", "depth", "heads", "hidden", "text_width",
            "experts", "k", *optional,
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if not (_is_count(value) or (value is None and name in optional)):
                raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
        if self.ffn not in FFNS:
            raise ValueError(unknown("kind of FFN", self.ffn, FFNS))
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}: change one of them, "
                "or give head_width"
            )
        if self.heads % self.key_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.width % 2:
            raise ValueError(f"width is {self.width}; the embedding of the time needs an even one")
        if self.cameras != 0 and not _is_count(self.cameras):
            raise ValueError(f"cameras is {self.cameras!r}; give a whole number")
        if (self.image_width is None) != (self.cameras == 0):
            raise ValueError(
                f"image_width is {self.image_width} with cameras={self.cameras}; give both for a "
                "policy that sees, neither for one that does not"
            )
        if self.k > self.experts or (self.ffn == "collapsed" and self.k != 1):
            most = 1 if self.ffn == "collapsed" else self.experts
            raise ValueError(f"k is {self.k}; with these experts it is from 1 to {most}")
        if not isinstance(self.shared, bool):
            raise ValueError(f"shared is {self.shared!r}; give True or False")
        s = self.shared_weight
        if s is not None and not (self.shared and 0 <= s <= 1):
            raise ValueError(
                f"shared_weight is {s} with shared={self.shared}; give a share from [0, 1] where "
                "there is a shared expert, or None to add the outputs"
            )
        if not 0 <= self.router_std < math.inf:
            raise ValueError(f"router_std is {self.router_std}; a standard deviation is from 0")
        if self.ffn == "dense":
            for field in fields(self):
                own = getattr(self, field.name)
                if field.name in _OF_EXPERTS and own != field.default:
                    raise ValueError(
                        f"{field.name} is {own!r} with ffn='dense', which has no experts: leave it "
                        f"out, or choose one of {', '.join(FFNS[1:])}"
                    )

    @property
    def per_head(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def prefix_sizes(self) -> tuple[int, int]:
        """Width of the prefix, and hidden width of its FFNs."""
        return self.prefix_width or self.width, self.prefix_hidden or self.hidden

    def dense_hidden(self, match: str) -> int:
        """Hidden width of a dense FFN as large as the experts, the router's matrices left out.

        Args:
            match: ``"active"`` for the experts that one token uses, ``"total"`` for all of them.

        >>> PolicyConfig(39, 4, hidden=512, ffn="adamoe").dense_hidden("total")
        2560
        """
        if match not in ("active", "total"):
            raise ValueError(f"match is {match!r}; choose 'active' or 'total'")
        if self.ffn == "dense":
            return self.hidden
        return self.hidden * ((self.k if match == "active" else self.experts) + self.shared)

    def widened(self, hidden: int) -> "PolicyConfig":
        """The same with wider FFNs in the action expert, for `widened`; the prefix stays.

        Raises:
            ValueError: a policy that is not dense, or a smaller width.
        """
        config = replace(self, hidden=hidden, prefix_hidden=self.prefix_sizes[1])
        if self.ffn != "dense" or hidden < self.hidden:
            raise ValueError(
                f"widening takes a dense policy to at least its hidden width {self.hidden}; given "
                f"ffn={self.ffn!r} and hidden={hidden}"
            )
        return config


_OF_EXPERTS = ("experts", "k", "shared", "shared_weight", "router_std")

_SMALL = PolicyConfig(
    state=39, action=4, horizon=8, width=128, depth=3, heads=8, head_width=32, hidden=256,
    prefix_width=64, prefix_hidden=128,
)  # fmt: skip
_LARGE = PolicyConfig(
    state=39, action=4, horizon=16, width=512, depth=8, heads=8, hidden=2048, prefix_width=256,
    prefix_hidden=1024,
)  # fmt: skip
_PI0 = PolicyConfig(
    state=32, action=32, horizon=50, width=1024, depth=18, heads=8, kv_heads=1, head_width=256,
    hidden=4096, text_width=2048, image_width=2048, cameras=3, prefix_width=2048,
    prefix_hidden=16_384,
)  # fmt: skip

CONFIGS: Mapping[str, PolicyConfig] = MappingProxyType(
    {
        "small": _SMALL,
        "large": _LARGE,
        "pi0": _PI0,
        "pi0-adamoe": replace(_PI0, ffn="adamoe"),
    }
)
"""Configurations by name, with the states and actions of Meta-World for the first two.

- ``small``: 1 M parameters, attention twice as wide as its tokens like pi0's, for two cores;
- ``large``: 40 M, for a GPU;
- ``pi0``, ``pi0-adamoe``: the sizes of pi0 (openpi's ``gemma_300m`` for the action expert and
  ``gemma_2b`` for the prefix, one token a camera), for the accounting of the action expert.
"""


# -- layers ----------------------------------------------------------------------------------------


class _Reader(nn.Module):
    """What a layer lets others read of its tokens: keys and values, behind a norm."""

    def __init__(self, config: PolicyConfig, width: int):
        super().__init__()
        self.per_head = config.per_head
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.key = nn.Linear(width, config.key_heads * config.per_head, bias=False)
        self.value = nn.Linear(width, config.key_heads * config.per_head, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, heads * head width) as (B, heads, T, head width)."""
        return x.unflatten(-1, (-1, self.per_head)).transpose(1, 2)

    def remember(self, x: Tensor) -> tuple[Tensor, _Memory]:
        """The normed tokens, and their keys and values."""
        x = self.attention_norm(x)
        return x, (self.split(self.key(x)), self.split(self.value(x)))


class _Block(_Reader):
    """One layer of a stream: attention to what is remembered and a feed-forward layer."""

    def __init__(self, config: PolicyConfig, width: int, ffn: nn.Module):
        super().__init__(config, width)
        inner = config.heads * config.per_head
        self.grouped = config.key_heads != config.heads
        self.query = nn.Linear(width, inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.ffn = ffn

    def update(
        self,
        x: Tensor,
        normed: Tensor,
        memory: _Memory,
        visible: Tensor | None,
        real: Tensor | None = None,
    ) -> Tensor:
        """The tokens (B, T, width) after the layer; `real` ones alone are routed."""
        y = F.scaled_dot_product_attention(
            self.split(self.query(normed)), *memory, attn_mask=visible, enable_gqa=self.grouped
        )
        x = x + self.output(y.transpose(1, 2).flatten(2))
        given = (real,) if isinstance(self.ffn, MoE) else ()
        return x + self.ffn(self.ffn_norm(x), *given)


class ActionExpert(nn.Module):
    """The stream of state and actions; its FFNs are what the configuration says.

    Args:
        config: of the policy.
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(config, config.width, build_ffn(config)) for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        memory: Sequence[_Memory],
        visible: Tensor | None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, list[_Memory]]:
        """Take T tokens through the layers.

        Args:
            x: tokens, (B, T, width).
            memory: of each layer the keys and values of the M earlier tokens.
            visible: what each token sees, (1 or B, 1, 1 or T, M + T) bool; None for everything.
            real: False for padding, (B, T) bool; None where there is none.

        Returns:
            The normed tokens, and of each layer the keys and values of all M + T.
        """
        longer = []
        for block, earlier in zip(self.blocks, memory, strict=True):
            normed, own = block.remember(x)
            both = tuple(torch.cat(pair, dim=2) for pair in zip(earlier, own, strict=True))
            x = block.update(x, normed, both, visible, real)
            longer.append(both)
        return self.norm(x), longer


class CollapsedRouter(nn.Module):
    """Every token to the first expert with weight 1: a control, where nothing is selected.

    It stands for a router that has collapsed, which in arXiv 2510.14300 did better than a balanced
    one. There is nothing to learn in it. Explained in ``book/adamoe/05-controls-and-verdicts``.

    Args:
        dim: width of a token.
        experts: number of experts E, of which all but the first stay idle.
    """

    k = 1

    def __init__(self, dim: int, experts: int):
        super().__init__()
        self.dim, self.experts = dim, experts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens (T, dim), of which `mask` (T,) says which are real."""
        made = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
        indices = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        probabilities = torch.zeros(len(x), self.experts, **made)
        probabilities[:, 0] = 1.0
        weights = torch.ones(len(x), 1, **made)
        if mask is not None:
            weights = weights.masked_fill(~mask.unsqueeze(1), 0.0)
        return Routing(indices, weights, probabilities, probabilities.log(), mask)


def build_ffn(config: PolicyConfig) -> nn.Module:
    """One feed-forward layer of the action expert."""
    if config.ffn == "dense":
        return _geglu(config.width, config.hidden)
    return MoE(
        config.width,
        config.hidden,
        config.experts,
        router=_make_router(config)(config.width, config.experts),
        activation="gelu_tanh",
        gated=True,
        shared=_geglu(config.width, config.hidden) if config.shared else None,
        shared_weight=config.shared_weight,
    )


def _geglu(width: int, hidden: int) -> DenseFFN:
    gate, up, down = (
        nn.Linear(*sizes, bias=False)
        for sizes in ((width, hidden), (width, hidden), (hidden, width))
    )
    return DenseFFN((gate, up, down), nn.GELU(approximate="tanh"), gated=True)


def _make_router(config: PolicyConfig) -> Callable[[int, int], nn.Module]:
    """Makes routers of the configuration's kind from a width and a number of experts."""

    def make(dim: int, experts: int) -> nn.Module:
        if config.ffn == "collapsed":
            return CollapsedRouter(dim, experts)
        if config.ffn == "moe":
            router = TopKRouter(dim, experts, k=config.k, renormalize=False)
        else:
            combine = {"adamoe": "add", "csmoe": "concat"}[config.ffn]
            router = ScaleAdapterRouter(dim, experts, k=config.k, combine=combine)
        router.init_std = config.router_std
        router.reset_parameters()
        return router

    return make


# -- flow matching ---------------------------------------------------------------------------------


def sample_times(
    count: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw times of the flow, (count,): ``0.999 * Beta(1.5, 1) + 0.001``, where 1 is noise.

    The distribution leans towards noise (pi0). Beta(1.5, 1) is the power 2/3 of a uniform draw.
    Explained in ``book/adamoe/01-a-policy-that-flows``.

    >>> times = sample_times(10_000, generator=torch.Generator().manual_seed(0))
    >>> bool(times.min() >= 0.001), bool(times.max() <= 1), round(times.mean().item(), 2)
    (True, True, 0.6)
    """
    return 0.999 * _draw(torch.rand, (count,), generator, device) ** (2 / 3) + 0.001


def time_embedding(times: Tensor, width: int) -> Tensor:
    """Sines and cosines of times with periods from 0.004 to 4, (B,) to (B, width); `width` even.

    As in pi0, so that differences of a thousandth of the flow can be told apart. Explained in
    ``book/adamoe/01-a-policy-that-flows``.
    """
    shares = torch.linspace(0, 1, width // 2, dtype=times.dtype, device=times.device)
    angles = times[:, None] * (2 * math.pi / (4e-3 * 1000**shares))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FlowPolicy(nn.Module):
    """From an instruction, a state and images to a chunk of actions, by flow matching.

    A network learns the velocity ``noise - actions`` at points ``t * noise + (1 - t) * actions``;
    a plan starts from noise at t = 1 and follows the velocity to t = 0 in Euler steps. Attention
    is blockwise: the prefix sees the prefix, the state sees the prefix and itself, actions see all,
    so that keys and values of prefix and state are computed once a plan. States and actions are
    normalised inside (`set_statistics`). After pi0, which places tokens by rotation where this
    policy adds a learned vector to each action token, and whose prefix is a language model of its
    own. Explained in ``book/adamoe/01-a-policy-that-flows``.

    Args:
        config: sizes, and the kind of feed-forward layers.

    Attributes:
        config: as given.
        action_expert: the `ActionExpert`, the part that experts go into.

    >>> config = PolicyConfig(state=3, action=2, horizon=4, width=16, depth=2, hidden=32)
    >>> policy = FlowPolicy(config)
    >>> text, real = torch.randn(5, 7, 384), torch.ones(5, 7, dtype=torch.bool)
    >>> policy.plan(torch.randn(5, 3), text, real).shape
    torch.Size([5, 4, 2])
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        width, (prefix_width, prefix_hidden) = config.width, config.prefix_sizes
        self.text_in = nn.Linear(config.text_width, prefix_width)
        self.images_in = nn.ModuleList(
            nn.Linear(config.image_width, prefix_width) for _ in range(config.cameras)
        )
        # of the last layer only keys and values are ever read
        self.prefix = nn.ModuleList(
            _Block(config, prefix_width, _geglu(prefix_width, prefix_hidden))
            for _ in range(config.depth - 1)
        )
        self.prefix.append(_Reader(config, prefix_width))
        self.state_in = nn.Linear(config.state, width)
        self.action_in = nn.Linear(config.action, width)
        self.time_in = nn.Linear(2 * width, width)
        self.time_out = nn.Linear(width, width)
        self.position = nn.Parameter(torch.empty(config.horizon, width).normal_(std=0.02))
        self.action_expert = ActionExpert(config)
        self.action_out = nn.Linear(width, config.action)
        for name, size in (("state", config.state), ("action", config.action)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    @torch.no_grad()
    def set_statistics(self, statistics: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Normalise by the statistics of a data set; they are saved with the weights.

        A number that stands still in the data (standard deviation below 1e-4) is not scaled. What
        cannot be used leaves everything as it was.

        Args:
            statistics: ``"mean"`` and ``"std"`` of ``"observation.state"`` and ``"action"``, as
                ``meta/stats.json`` of a LeRobot data set holds them.

        Raises:
            ValueError: one is missing, of another size, not finite, or a negative deviation.
        """
        usable = []
        for name, key in (("state", "observation.state"), ("action", "action")):
            for what in ("mean", "std"):
                buffer = getattr(self, f"{name}_{what}")
                try:
                    given = torch.as_tensor(statistics[key][what]).to(buffer)
                except KeyError as error:
                    raise ValueError(
                        f"the statistics have no {error}; they need mean and std of "
                        "observation.state and action"
                    ) from None
                except (TypeError, ValueError, RuntimeError) as error:
                    raise ValueError(f"the {what} of {key} holds no numbers: {error}") from error
                if given.shape != buffer.shape:
                    raise ValueError(
                        f"the {what} of {key} has shape {tuple(given.shape)}; the policy was made "
                        f"for {tuple(buffer.shape)}"
                    )
                if not given.isfinite().all() or (what == "std" and (given < 0).any()):
                    raise ValueError(f"the {what} of {key} is {given.tolist()}; not usable")
                if what == "std":
                    given = given.where(given >= STILL, 1.0)
                usable.append((buffer, given))
        for buffer, given in usable:
            buffer.copy_(given)

    def forward(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> Tensor:
        """The flow-matching loss: mean squared error of the velocity at random times.

        Args:
            batch: ``state`` (B, S); ``actions`` (B, H, A); ``mask`` (B, H) bool, True for actions
                that count: others are neither seen, routed nor predicted; ``text`` (B, L, W);
                ``text_mask`` (B, L) bool, True for real tokens; ``images`` (B, C, F) for a policy
                with cameras.
            generator: of noise and times; None for torch's own.

        Returns:
            A scalar.

        Raises:
            ValueError: a part is missing, too much, or of another shape; on a processor also when
                a state or an action that counts is not finite.
        """
        if missing := {"state", "actions", "mask", "text", "text_mask"} - batch.keys():
            raise ValueError(f"the batch has no {', '.join(sorted(missing))}")
        config, mask = self.config, batch["mask"]
        seen = batch["state"], batch["text"], batch["text_mask"], batch.get("images")
        self._check(*seen)
        rows = len(seen[0])
        _require_shape("actions", batch["actions"], (rows, config.horizon, config.action))
        _require_shape("mask", mask, (rows, config.horizon), torch.bool)
        actions = (batch["actions"].to(self.action_mean) - self.action_mean) / self.action_std
        # what stands where no action counts may be anything, NaN as well
        actions = actions.masked_fill(~mask.unsqueeze(-1), 0.0)
        if actions.device.type == "cpu":  # a GPU would have to be waited for
            _require_finite(state=seen[0], actions=actions)
        noise = _draw(torch.randn, actions.shape, generator, actions.device).to(actions)
        times = sample_times(rows, generator=generator, device=actions.device).to(actions)
        t = times[:, None, None]
        velocity = self.velocity(t * noise + (1 - t) * actions, times, *seen, mask=mask)
        errors = (velocity - (noise - actions)).square().mean(-1).masked_fill(~mask, 0.0)
        return errors.sum() / mask.sum().clamp(min=1)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The flow-matching loss of a batch, as `forward` gives it."""
        return self(batch, generator)

    def velocity(
        self,
        actions: Tensor,
        times: Tensor,
        state: Tensor,
        text: Tensor,
        text_mask: Tensor,
        images: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity of noisy actions, everything computed in one pass.

        Args:
            actions: normalised and noisy, (B, H, A).
            times: of each row, (B,).
            state: (B, S), not normalised.
            text: states of the instruction's tokens, (B, L, W).
            text_mask: True for real tokens, (B, L) bool.
            images: features of each camera, (B, C, F).
            mask: False for actions to leave out, (B, H) bool; None for none.

        Returns:
            (B, H, A).

        Raises:
            ValueError: something of another shape.
        """
        self._check(state, text, text_mask, images)
        shape = (len(state), self.config.horizon, self.config.action)
        _require_shape("actions", actions, shape)
        _require_shape("times", times, shape[:1])
        if mask is not None:
            _require_shape("mask", mask, shape[:2], torch.bool)
        memory, prefix = self._remember(text, text_mask, images)
        (rows, horizon), device = actions.shape[:2], actions.device
        real = torch.ones(rows, 1 + horizon, dtype=torch.bool, device=device)
        if mask is not None:
            real[:, 1:] = mask
        # the state, row 0 of the suffix, sees no action
        block = torch.ones(1 + horizon, 1 + horizon, dtype=torch.bool, device=device)
        block[0, 1:] = False
        suffix = real[:, None, :] & block
        visible = torch.cat([prefix[:, None].expand(-1, 1 + horizon, -1), suffix], dim=-1)
        tokens = torch.cat([self._state_token(state), self._action_tokens(actions, times)], dim=1)
        routed = None if mask is None else real
        tokens, _ = self.action_expert(tokens, memory, visible[:, None], routed)
        return self.action_out(tokens[:, 1:])

    @torch.no_grad()
    def plan(
        self,
        state: Tensor,
        text: Tensor,
        text_mask: Tensor,
        images: Tensor | None = None,
        *,
        steps: int = 10,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Plan a chunk of actions: Euler steps from noise, prefix and state computed once.

        Under ``collect_routing(policy)`` the routings come layer by layer: first those of the
        state (B tokens), then for each step those of the actions (B * H tokens, row by row);
        `routes` puts them in order.

        Args:
            state: (B, S).
            text: states of the instruction's tokens, (B, L, W).
            text_mask: True for real tokens, (B, L) bool.
            images: features of each camera, (B, C, F).
            steps: Euler steps.
            generator: of the noise; None for torch's own.
            noise: the noise itself, (B, H, A), in place of a draw.

        Returns:
            Actions in the units of the data, (B, H, A).

        Raises:
            ValueError: steps below 1, or something of another shape.
        """
        if not _is_count(steps):
            raise ValueError(f"steps is {steps!r}; give a whole number of at least 1")
        self._check(state, text, text_mask, images)
        shape = (len(state), self.config.horizon, self.config.action)
        if noise is None:
            noise = _draw(torch.randn, shape, generator, state.device)
        _require_shape("noise", noise, shape)
        memory, prefix = self._remember(text, text_mask, images)
        # a mask costs time, and most plans are made without padding
        padded = not bool(prefix.all())

        def visible(tokens: int) -> Tensor | None:
            return F.pad(prefix, (0, tokens), value=True)[:, None, None] if padded else None

        _, memory = self.action_expert(self._state_token(state), memory, visible(1))
        seen = visible(1 + self.config.horizon)
        actions = noise.to(self.action_mean)
        for step in range(steps):
            time = actions.new_full((1,), 1 - step / steps)
            tokens, _ = self.action_expert(self._action_tokens(actions, time), memory, seen)
            actions = actions - self.action_out(tokens) / steps
        return actions * self.action_std + self.action_mean

    def _remember(
        self, text: Tensor, text_mask: Tensor, images: Tensor | None
    ) -> tuple[list[_Memory], Tensor]:
        """Keys and values of the prefix in each layer, and which of its P tokens are real."""
        text = text.to(self.text_in.weight.dtype)
        text = text.masked_fill(~text_mask.unsqueeze(-1), 0.0)  # padding may hold anything
        tokens, real = [self.text_in(text)], text_mask
        if images is not None:
            images = images.to(text.dtype)
            seen = [into(images[:, i]) for i, into in enumerate(self.images_in)]
            tokens.insert(0, torch.stack(seen, dim=1))
            real = F.pad(real, (len(seen), 0), value=True)
        # under autocast too, what is added up from layer to layer is not rounded
        x, memory = torch.cat(tokens, dim=1).to(text.dtype), []
        for layer in self.prefix:
            normed, own = layer.remember(x)
            memory.append(own)
            if isinstance(layer, _Block):
                x = layer.update(x, normed, own, real[:, None, None])
        return memory, real

    def _state_token(self, state: Tensor) -> Tensor:
        state = (state.to(self.state_mean) - self.state_mean) / self.state_std
        return self.state_in(state).unsqueeze(1).to(state.dtype)

    def _action_tokens(self, actions: Tensor, times: Tensor) -> Tensor:
        x = self.action_in(actions)
        time = time_embedding(times, self.config.width)[:, None].expand(len(x), x.shape[1], -1)
        x = self.time_out(F.silu(self.time_in(torch.cat([x, time.to(x.dtype)], dim=-1))))
        return x + self.position

    def _check(self, state: Tensor, text: Tensor, text_mask: Tensor, images: Tensor | None) -> None:
        config, rows = self.config, len(state)
        length = text.shape[1] if text.dim() == 3 else 0
        _require_shape("state", state, (rows, config.state))
        _require_shape("text", text, (rows, length, config.text_width))
        _require_shape("text_mask", text_mask, (rows, length), torch.bool)
        if (images is not None) != bool(config.cameras):
            raise ValueError(
                f"images {'are' if images is not None else 'are not'} given and the policy was "
                f"made for {config.cameras} cameras"
            )
        if images is not None:
            _require_shape("images", images, (rows, config.cameras, config.image_width))


def routes(routings: Sequence[Routing], config: PolicyConfig) -> tuple[Tensor, Tensor]:
    """The experts of each action, out of the routings that were collected from one plan.

    Explained in ``book/adamoe/04-do-experts-specialise``.

    Args:
        routings: what ``collect_routing(policy)`` collected while ``policy.plan`` ran once.
        config: of the policy.

    Returns:
        The chosen experts and their weights, each (steps, layers, B, H, k).

    Raises:
        ValueError: routings that do not come from one plan of a policy with experts.
    """
    steps = len(routings) // config.depth - 1
    rows = len(routings[0].indices) if routings else 0
    tokens = [rows] * config.depth + [rows * config.horizon] * (steps * config.depth)
    if steps < 1 or [len(routing.indices) for routing in routings] != tokens:
        raise ValueError(
            f"{len(routings)} routings are not those of one plan with {config.depth} layers of "
            "experts; collect them around a single call of plan"
        )
    shape = (steps, config.depth, rows, config.horizon, config.k)
    chosen = routings[config.depth :]
    return (
        torch.stack([routing.indices for routing in chosen]).view(shape),
        torch.stack([routing.weights for routing in chosen]).view(shape),
    )


# -- other policies of a trained one ---------------------------------------------------------------


def upcycled(
    policy: FlowPolicy,
    ffn: str,
    *,
    experts: int = 4,
    k: int = 1,
    shared: bool = True,
    shared_weight: float | None = None,
    router_std: float = 0.006,
    noise: float = 0.0,
    preserve: bool = False,
    seed: int = 0,
) -> FlowPolicy:
    """A policy with experts from a trained dense one: each expert starts as a copy of the FFN.

    As in the paper the copy does not start as its parent: with E = 4 and k = 1 an FFN gives about
    1.25 times the parent's output, and 0.625 times in the released form (``shared_weight=0.5``).
    With `preserve` it starts at the parent's function, to rounding. Equal experts that see the
    same tokens stay equal (shared and first expert of ``"collapsed"``); `noise` makes them differ.
    Explained in ``book/adamoe/02-upcycling``.

    Args:
        policy: the dense parent, which is left as it is.
        ffn: kind of the new FFNs, as in `PolicyConfig`.
        experts: as in `PolicyConfig`.
        k: as in `PolicyConfig`.
        shared: as in `PolicyConfig`; the shared expert is the parent's FFN.
        shared_weight: as in `PolicyConfig`.
        router_std: as in `PolicyConfig`.
        noise: standard deviation of what is added to the weights of the copies.
        preserve: start at the parent's function.
        seed: of routers and noise.

    Returns:
        The new policy.

    Raises:
        ValueError: a parent that is not dense, `ffn` that is, or options that do not fit.
    """
    if policy.config.ffn != "dense" or ffn == "dense":
        raise ValueError(
            f"upcycling goes from a dense policy to one with experts, not from "
            f"{policy.config.ffn!r} to {ffn!r}"
        )
    config = replace(
        policy.config, ffn=ffn, experts=experts, k=k, shared=shared, shared_weight=shared_weight,
        router_std=router_std,
    )  # fmt: skip
    new = copy.deepcopy(policy)
    new.config = config
    with _seeded(seed, policy):
        upcycle(
            new.action_expert,
            experts=experts,
            router=_make_router(config),
            shared=shared,
            shared_weight=shared_weight,
            noise=noise,
            preserve=preserve,
        )
    return new


def widened(policy: FlowPolicy, hidden: int, *, seed: int = 0) -> FlowPolicy:
    """A dense policy with wider FFNs that starts at exactly the function of a trained one.

    The new hidden units have fresh weights on the way in and zeros on the way out, so that they
    add nothing at first and learn from there: the control with as many parameters as experts have
    (`PolicyConfig.dense_hidden`). Explained in ``book/adamoe/05-controls-and-verdicts``.

    Args:
        policy: the dense parent, which is left as it is.
        hidden: hidden width of the new FFNs, at least the parent's.
        seed: of the fresh weights.

    Returns:
        The new policy.

    Raises:
        ValueError: a parent that is not dense, or a smaller width.
    """
    old = policy.config
    config = old.widened(hidden)
    new = copy.deepcopy(policy)
    new.config = config
    with _seeded(seed, policy), torch.no_grad():
        for block in new.action_expert.blocks:
            wide = build_ffn(config).to(block.ffn.up.weight)
            for name in ("gate", "up"):
                getattr(wide, name).weight[: old.hidden] = getattr(block.ffn, name).weight
            wide.down.weight.zero_()
            wide.down.weight[:, : old.hidden] = block.ffn.down.weight
            block.ffn = wide.train(block.training)
    return new


@contextlib.contextmanager
def _seeded(seed: int, policy: FlowPolicy) -> Iterator[None]:
    """A context in which torch's generators start from a seed; afterwards they go on as before."""
    device = policy.position.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# -- training --------------------------------------------------------------------------------------


class Objective:
    """The loss of a policy for ``training.train``: flow matching and balance of the experts.

    The balance loss is the mean over layers of ``mean_e f_e P_e``, with a weight that falls after
    some steps (arXiv 2510.14300 and its code: 0.01, and 0.005 after 500 steps). Given to ``train``
    as `loss` and its `on_step` as `on_step`, a resumed run knows its step and so its weight. The
    curves ``flow`` and ``balance`` show the two parts; a dense policy has the first alone.
    Explained in ``book/adamoe/03-selecting-is-not-weighting``.

    Args:
        weights: of the balance loss, in the first steps and later.
        switch: number of the first steps.

    Raises:
        ValueError: when the weights are no two numbers from 0, or `switch` is negative.

    >>> objective = Objective()
    >>> objective.weight(499), objective.weight(500)
    (0.01, 0.005)
    """

    def __init__(self, weights: tuple[float, float] = (0.01, 0.005), switch: int = 500):
        two = isinstance(weights, tuple | list) and len(weights) == 2
        if not two or not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"weights is {weights}; give two numbers from 0")
        if isinstance(switch, bool) or not isinstance(switch, int) or switch < 0:
            raise ValueError(f"switch is {switch!r}; give a whole number of steps from 0")
        self.weights, self.switch, self.step = tuple(weights), switch, 0

    def weight(self, step: int) -> float:
        """Weight of the balance loss in a step, counted from 0."""
        return self.weights[step >= self.switch]

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts."""
        with collect_routing(model) as routings:
            flow = model(batch)
        if not routings:
            return flow, {"flow": flow}
        balance = torch.stack([load_balancing_loss(r, form="mean") for r in routings]).mean()
        loss = flow + self.weight(self.step) * balance
        return loss, {"flow": flow, "balance": balance}

    def on_step(self, model: nn.Module, step: int) -> None:
        """Take note of how many steps are done."""
        self.step = step


def parameter_groups(
    *, experts: Mapping[str, float] | None = None, router: Mapping[str, float] | None = None
) -> Callable[[str, nn.Parameter], dict[str, float]]:
    """For ``training.train``: settings of their own for routed experts, and for router and adapter.

    The paper's code trains base and experts with 2.5e-5 after 1000 steps of warm-up, router and
    adapter with 5e-5 after 100. Explained in ``book/adamoe/02-upcycling``.

    Args:
        experts: ``lr``, ``warmup`` and ``weight_decay`` of the routed experts where they differ
            from the training's; the shared expert belongs to the base.
        router: likewise of gates and scale adapters.

    >>> groups = parameter_groups(router={"lr": 5e-5, "warmup": 100})
    >>> groups("action_expert.blocks.0.ffn.router.gate", None)
    {'lr': 5e-05, 'warmup': 100}
    """

    def settings(name: str, parameter: nn.Parameter) -> dict[str, float]:
        *owners, last = name.split(".")
        if "router" in owners:
            return dict(router or {})
        return dict(experts or {}) if last in ("w_in", "w_out") else {}

    return settings


# -- files -----------------------------------------------------------------------------------------


def save_policy(policy: FlowPolicy, path: str | os.PathLike) -> None:
    """Write weights, statistics and configuration to one safetensors file; whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    with atomic_write(path) as file:
        file.write(to_safetensors(tensors, {"policy": json.dumps(asdict(policy.config))}))


def load_policy(path: str | os.PathLike) -> FlowPolicy:
    """Read what `save_policy` wrote; in evaluation mode, on the CPU.

    Raises:
        DataError: no such file, a damaged one, or one that holds another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = PolicyConfig(**json.loads((file.metadata() or {})["policy"]))
            # cloned, because a file's tensors need not be aligned as kernels want them
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            policy = FlowPolicy(config)
        policy.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} is no policy that can be read ({type(error).__name__}: {error}); write it "
            "anew with save_policy"
        ) from error
    return policy.requires_grad_(True).eval()


# -- checks ----------------------------------------------------------------------------------------


def _draw(function, shape, generator: torch.Generator | None, device) -> Tensor:
    """Random numbers, drawn where the generator is and moved to the device."""
    place = device if generator is None else generator.device
    return function(tuple(shape), generator=generator, device=place).to(device)


def _require_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    if tensor.shape != shape or dtype not in (None, tensor.dtype):
        wanted = f"{shape}" if dtype is None else f"{shape} of {dtype}"
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} of {tensor.dtype}; the policy takes {wanted}"
        )


def _require_finite(**parts: Tensor) -> None:
    for name, values in parts.items():
        if not (sound := values.isfinite().flatten(1).all(dim=1)).all():
            rows = (~sound).nonzero().flatten().tolist()
            raise ValueError(
                f"{name!r} of the batch is not finite in rows {rows}: look for it in the data"
            )
