"""Structured linear maps: ``y = U(Vx) + b`` with fewer parameters and FLOPs than a dense matrix."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from feedforward.layers.autocast import without_autocast
from feedforward.timing import interleaved

Init = Literal["spectral", "orthonormal", "gaussian"]

# whether a transform of torch.func is at work
_transforming = torch._C._are_functorch_transforms_active

INITS: tuple[Init, ...] = ("spectral", "orthonormal", "gaussian")


class StructuredLinear(nn.Module):
    """What `LowRank`, `BlockShuffle` and `BlockDense` share: a drop-in for `torch.nn.Linear`.

    The weights are `v`, applied first, and `u`; `bias` is None without one. The input may have any
    leading dimensions, none at all, and zero tokens.
    """

    #: Standard deviation of the dense Gaussian matrix that every start is made from.
    std = 0.02

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        init: Init,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **sizes: int,
    ):
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init is {init!r}; choose one of {', '.join(INITS)}")
        v, u = self.shapes(in_features, out_features, **sizes)
        self.in_features, self.out_features, self.init = in_features, out_features, init
        for name, size in sizes.items():
            setattr(self, name, size)
        self._sizes = tuple(sizes)
        self.v = nn.Parameter(torch.empty(v, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(u, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @staticmethod
    def shapes(in_features: int, out_features: int, **sizes: int) -> tuple[torch.Size, torch.Size]:
        """The shapes of `v` and `u` for these widths and this rank and these blocks.

        Raises:
            ValueError: If no such layer exists.
        """
        raise NotImplementedError

    @classmethod
    def weight_count(cls, in_features: int, out_features: int, **sizes: int) -> int:
        """How many weights `v` and `u` hold; also the multiply-adds of one token.

        Takes the layer's own ``rank=`` and ``blocks=``, and builds nothing.

        >>> LowRank.weight_count(768, 3072, rank=192) / (768 * 3072)
        0.3125
        """
        return sum(shape.numel() for shape in cls.shapes(in_features, out_features, **sizes))

    @property
    def flops_per_token(self) -> int:
        """Floating point operations of the two products for one token; the bias is not counted."""
        return 2 * (self.v.numel() + self.u.numel())

    def reset_parameters(self) -> None:
        """Draw the weights anew as `init` says and set the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.v.is_meta:
            return
        with torch.no_grad():
            if self.init == "spectral":
                v, u = self._project(self._gaussian(self.out_features, self.in_features))
            else:
                v, u = self._gaussian(*self.v.shape), self._gaussian(*self.u.shape)
                if self.init == "orthonormal":
                    v, u = _polar(v), _polar(u)
            self.v.copy_(v)
            self.u.copy_(u)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features).

        Raises:
            ValueError: If the last dimension of `x` is not `in_features`.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has the shape {tuple(x.shape)}; its last dimension must be "
                f"in_features = {self.in_features}"
            )
        y = self._multiply(x.reshape(-1, self.in_features))
        return y.reshape(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """The one matrix (out_features, in_features) that does the same; differentiable.

        ``layer(x)`` is ``torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)``.
        """
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """A new dense layer that computes the same; its weights are copies."""
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.v.device,
            dtype=self.v.dtype,
        )
        with torch.no_grad(), without_autocast(self.v.device.type):
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """The arguments that make this layer."""
        sizes = "".join(f"{name}={getattr(self, name)}, " for name in self._sizes)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {sizes}"
            f"bias={self.bias is not None}, init={self.init!r}"
        )

    def _multiply(self, x: Tensor) -> Tensor:
        """Map tokens (T, in_features) to (T, out_features), bias included."""
        raise NotImplementedError

    def _project(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The `v` and `u` whose dense weight is nearest to `weight` (Frobenius norm)."""
        raise NotImplementedError

    def _gaussian(self, *shape: int) -> Tensor:
        # half precision has no singular value decomposition
        dtype = torch.promote_types(self.v.dtype, torch.float32)
        return torch.randn(shape, device=self.v.device, dtype=dtype) * self.std


class LowRank(StructuredLinear):
    """A linear map through a bottleneck: ``y = U(Vx) + b`` with `v` (R, N) and `u` (M, R).

    R(N + M) parameters in place of NM. Source: arXiv 2406.16450, section 3.1. Explained in
    ``book/foundations/03-structured-matrices``.

    Args:
        in_features: width N of the input.
        out_features: width M of the output.
        rank: width R of the bottleneck, from 1 to min(N, M).
        bias: whether to add a bias (M,), zero at the start.
        init: how the weights start. All three begin with Gaussian entries of standard deviation
            0.02. ``"spectral"`` (the paper's choice here) splits the largest R singular values of
            such a dense matrix evenly over `u` and `v`; ``"orthonormal"`` replaces Gaussian `v`
            and `u` by their polar factors; ``"gaussian"`` takes Gaussian `v` and `u` as they are.
        device: where the weights live.
        dtype: type of the weights.

    Raises:
        ValueError: If a width is not positive, the rank is out of range, or the init is unknown.

    >>> layer = LowRank(6, 8, rank=2)
    >>> layer(torch.ones(3, 6)).shape, layer.v.shape, layer.u.shape
    (torch.Size([3, 8]), torch.Size([2, 6]), torch.Size([8, 2]))
    """

    rank: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        bias: bool = True,
        init: Init = "spectral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features, out_features, rank=rank, bias=bias, init=init, device=device, dtype=dtype
        )

    @staticmethod
    def shapes(in_features: int, out_features: int, *, rank: int) -> tuple[torch.Size, torch.Size]:
        """The shapes of `v` and `u`: (R, N) and (M, R)."""
        _check_rank(in_features, out_features, rank)
        return torch.Size((rank, in_features)), torch.Size((out_features, rank))

    @classmethod
    def from_ratio(
        cls,
        in_features: int,
        out_features: int,
        *,
        parameters: float = 0.32,
        bias: bool = True,
        init: Init = "spectral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer whose `v` and `u` hold about this share of the NM weights of a dense one.

        The rank picked is a round one, because the paper's "32 %" is 31.25 % exactly, and round
        widths are fast: the simplest fraction of min(N, M) within 2.5 % of the share, where there
        is one, else the nearest rank. For H -> 4H and 4H -> H, 0.63 picks H/2 and 0.32 picks H/4.

        Raises:
            ValueError: If `parameters` is not above 0 and at most 1.

        >>> LowRank.from_ratio(768, 3072, parameters=0.32).rank
        192
        """
        _check_share(parameters)
        _check_widths(in_features, out_features)
        per_rank = (in_features + out_features) / (in_features * out_features)
        rank = _round_rank(parameters / per_rank, min(in_features, out_features))
        return cls(
            in_features, out_features, rank=rank, bias=bias, init=init, device=device, dtype=dtype
        )

    def dense_weight(self) -> Tensor:
        """The matrix UV (M, N); differentiable."""
        return self.u @ self.v

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v), self.u, self.bias)

    def _project(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _split_svd(weight, self.rank)


class BlockShuffle(StructuredLinear):
    """Two block-diagonal maps with a shuffle between them, also known as a Monarch matrix.

    With m = min(N, M), `v` is B blocks (m/B, N/B) and `u` is B blocks (M/B, m/B):
    m(N + M)/B parameters in place of NM. The blocks' outputs stand one after the other;
    before and after `u` they are dealt out, so that every output sees every input: entry j of the
    hidden vector goes to block j mod B, position j div B, and row i of block c of `u` is output
    iB + c. Source: arXiv 2406.16450, section 3.1. Explained in
    ``book/foundations/03-structured-matrices``.

    Args:
        in_features: width N of the input, a multiple of `blocks`.
        out_features: width M of the output, a multiple of `blocks`.
        blocks: number of blocks B.
        bias: whether to add a bias (M,), zero at the start.
        init: how the weights start. All three begin with Gaussian entries of standard deviation
            0.02. ``"orthonormal"`` (the paper's choice here) replaces every Gaussian block by its
            polar factor; ``"spectral"`` takes the `v` and `u` nearest to a dense Gaussian matrix,
            singular values split evenly; ``"gaussian"`` takes Gaussian blocks as they are.
        device: where the weights live.
        dtype: type of the weights.

    Raises:
        ValueError: If the blocks do not divide both widths, or the init is unknown.

    >>> layer = BlockShuffle(6, 8, blocks=2)
    >>> layer(torch.ones(3, 6)).shape, layer.v.shape, layer.u.shape
    (torch.Size([3, 8]), torch.Size([2, 3, 3]), torch.Size([2, 4, 3]))
    """

    blocks: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        blocks: int,
        bias: bool = True,
        init: Init = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features,
            out_features,
            blocks=blocks,
            bias=bias,
            init=init,
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def shapes(
        in_features: int, out_features: int, *, blocks: int
    ) -> tuple[torch.Size, torch.Size]:
        """The shapes of `v` and `u`: (B, m/B, N/B) and (B, M/B, m/B) with m = min(N, M)."""
        _check_widths(in_features, out_features)
        _check_blocks(blocks, in_features=in_features, out_features=out_features)
        n, m = in_features // blocks, out_features // blocks
        return torch.Size((blocks, min(n, m), n)), torch.Size((blocks, m, min(n, m)))

    @classmethod
    def from_ratio(
        cls,
        in_features: int,
        out_features: int,
        *,
        parameters: float = 0.32,
        bias: bool = True,
        init: Init = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer whose `v` and `u` hold about this share of the NM weights of a dense one.

        Picked are, of the numbers of blocks B > 1 that divide both widths, those with the nearest
        share. For H -> 4H and 4H -> H, 0.63 picks B = 2 and 0.32 picks B = 4.

        Raises:
            ValueError: If `parameters` is not above 0 and at most 1, or the widths have no common
                divisor but 1.

        >>> BlockShuffle.from_ratio(768, 3072, parameters=0.32).blocks
        4
        """
        _check_share(parameters)
        _check_widths(in_features, out_features)
        choices = _divisors(math.gcd(in_features, out_features))[1:]
        if not choices:
            raise ValueError(
                f"in_features = {in_features} and out_features = {out_features} have no common "
                "divisor but 1, so there is no number of blocks above 1; choose other widths"
            )
        share = min(in_features, out_features) * (1 / in_features + 1 / out_features)
        blocks = min(choices, key=lambda b: abs(share / b - parameters))
        return cls(
            in_features,
            out_features,
            blocks=blocks,
            bias=bias,
            init=init,
            device=device,
            dtype=dtype,
        )

    def dense_weight(self) -> Tensor:
        """The matrix ``P'UPV`` (M, N) with both shuffles, P and P'; differentiable."""
        v = torch.block_diag(*self.v).view(-1, self.blocks, self.in_features)
        return (self.u @ v.transpose(0, 1)).transpose(0, 1).reshape(-1, self.in_features)

    def _multiply(self, x: Tensor) -> Tensor:
        return self._collected(self._dealt(x) @ self.u.transpose(1, 2))

    def _dealt(self, x: Tensor) -> Tensor:
        """What `v` makes of `x` (T, N), dealt out to the blocks of `u`: (B, T, m/B)."""
        tokens, (hidden, width) = x.shape[0], self.v.shape[1:]
        x, part = _by_blocks(x, self.blocks), hidden // self.blocks
        # an exported graph is one for any number of tokens, so it must not ask how many there are
        few = not torch.compiler.is_exporting() and tokens <= width
        if few or hidden % self.blocks:
            # the blocks' outputs side by side, then dealt out: a transpose of (m/B, B)
            h = x @ self.v.transpose(1, 2)
            return h.transpose(0, 1).reshape(tokens, hidden, self.blocks).permute(2, 0, 1)
        # Dealing out columns of many tokens is slow. The rows of v are fewer: in the order of the
        # blocks that they go to, what is dealt out are whole parts.
        v = self.v.view(self.blocks, part, self.blocks, width).transpose(1, 2)
        h = x @ v.reshape(self.blocks, hidden, width).transpose(1, 2)
        h = h.view(self.blocks, tokens, self.blocks, part).permute(2, 1, 0, 3)
        return h.reshape(self.blocks, tokens, hidden)

    def _collected(self, y: Tensor) -> Tensor:
        """What `u` makes of that (B, T, M/B), row i of block c at iB + c, and the bias: (T, M)."""
        tokens = y.shape[1]
        if self.blocks == 2 and self.bias is not None and _allows_out(y):
            # the bias on the way, one block after the other; with more blocks that takes longer
            out = y.new_empty(tokens, y.shape[2], 2)
            for block, bias, place in zip(y, self.bias.view(-1, 2).T, out.unbind(2), strict=True):
                torch.add(block, bias, out=place)
            return out.view(tokens, self.out_features)
        y = y.permute(1, 2, 0).reshape(tokens, self.out_features)
        if self.bias is None:
            return y
        if _transforming():  # vmap may bring more biases than there is room for in y
            return (y + self.bias).to(y.dtype)
        # in place, so that autocast's type stays
        return y.add_(self.bias)

    def _project(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # Block b of v and block c of u meet in the outputs c, c + B, ... and the inputs of b; what
        # runs between them are those rows of b that the shuffle deals to c.
        v, u = torch.empty_like(self.v), torch.empty_like(self.u)
        hidden, width = v.shape[1:]
        for b in range(self.blocks):
            for c in range(self.blocks):
                first = (c - b * hidden) % self.blocks
                rows = range(first, hidden, self.blocks)
                position = (b * hidden + first) // self.blocks
                part = weight[c :: self.blocks, b * width : (b + 1) * width]
                right, left = _split_svd(part, len(rows))
                v[b, first :: self.blocks] = right
                u[c, :, position : position + len(rows)] = left
        return v, u


class BlockDense(StructuredLinear):
    """A block-diagonal map to a bottleneck, then a dense one: `v` (B, R/B, N/B) and `u` (M, R).

    R(M + N/B) parameters in place of NM; one block makes it a `LowRank`. Source: arXiv 2406.16450,
    section 3.1. Explained in ``book/foundations/03-structured-matrices``.

    Args:
        in_features: width N of the input, a multiple of `blocks`.
        out_features: width M of the output.
        rank: width R of the bottleneck, a multiple of `blocks`, at most min(N, M).
        blocks: number of blocks B.
        bias: whether to add a bias (M,), zero at the start.
        init: how the weights start. All three begin with Gaussian entries of standard deviation
            0.02. ``"orthonormal"`` (the paper's choice here) replaces every Gaussian block of `v`
            and the Gaussian `u` by their polar factors; ``"spectral"`` takes the `v` and `u`
            nearest to a dense Gaussian matrix, singular values split evenly; ``"gaussian"`` takes
            Gaussian `v` and `u` as they are.
        device: where the weights live.
        dtype: type of the weights.

    Raises:
        ValueError: If the blocks do not divide the input width and the rank, the rank is out of
            range, or the init is unknown.

    >>> layer = BlockDense(6, 8, rank=4, blocks=2)
    >>> layer(torch.ones(3, 6)).shape, layer.v.shape, layer.u.shape
    (torch.Size([3, 8]), torch.Size([2, 2, 3]), torch.Size([8, 4]))
    """

    rank: int
    blocks: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        blocks: int,
        bias: bool = True,
        init: Init = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features,
            out_features,
            rank=rank,
            blocks=blocks,
            bias=bias,
            init=init,
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def shapes(
        in_features: int, out_features: int, *, rank: int, blocks: int
    ) -> tuple[torch.Size, torch.Size]:
        """The shapes of `v` and `u`: (B, R/B, N/B) and (M, R)."""
        _check_rank(in_features, out_features, rank)
        _check_blocks(blocks, in_features=in_features, rank=rank)
        v = torch.Size((blocks, rank // blocks, in_features // blocks))
        return v, torch.Size((out_features, rank))

    @classmethod
    def from_ratio(
        cls,
        in_features: int,
        out_features: int,
        *,
        parameters: float = 0.32,
        blocks: int = 2,
        bias: bool = True,
        init: Init = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer whose `v` and `u` hold about this share of the NM weights of a dense one.

        The share is that of this layer and its mirror image M -> N together, because the paper
        gives both layers of an FFN the same rank: for H -> 4H with two blocks, 62.5 % of the FFN
        are 75 % of its first layer and 50 % of its second, or R = 2H/3. The rank picked is a round
        one: the simplest fraction of min(N, M) within 2.5 % of the share, where there is one, else
        the nearest multiple of `blocks`. For H -> 4H and 4H -> H with two blocks (and 3 a divisor
        of H), 0.63 picks 2H/3 and 0.32 picks H/3.

        Raises:
            ValueError: If `parameters` is not above 0 and at most 1, or the blocks do not divide
                the input width.

        >>> BlockDense.from_ratio(768, 3072, parameters=0.32).rank
        256
        """
        _check_share(parameters)
        _check_widths(in_features, out_features)
        _check_blocks(blocks, in_features=in_features)
        per_rank = (in_features + out_features) / (in_features * out_features)
        per_rank *= (1 + 1 / blocks) / 2
        rank = _round_rank(parameters / per_rank, min(in_features, out_features), step=blocks)
        return cls(
            in_features,
            out_features,
            rank=rank,
            blocks=blocks,
            bias=bias,
            init=init,
            device=device,
            dtype=dtype,
        )

    def dense_weight(self) -> Tensor:
        """The matrix UV (M, N) with block-diagonal V; differentiable."""
        return (_by_blocks(self.u, self.blocks) @ self.v).transpose(0, 1).flatten(1)

    def _multiply(self, x: Tensor) -> Tensor:
        blocks, v = _by_blocks(x, self.blocks), self.v.transpose(1, 2)
        if _allows_out(x) and x.shape[0] <= 16:
            # decoding: the blocks write side by side, which saves a copy and a tenth of the time
            h = x.new_empty(x.shape[0], self.rank)
            torch.bmm(blocks, v, out=_by_blocks(h, self.blocks))
        else:
            h = (blocks @ v).transpose(0, 1).flatten(1)
        return F.linear(h, self.u, self.bias)

    def _project(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # the columns of u that belong to a block see its inputs alone
        v, u = _split_svd(_by_blocks(weight, self.blocks), self.rank // self.blocks)
        return v, u.transpose(0, 1).flatten(1)


class PreMerged(nn.Module):
    """A structured layer that keeps its dense weight too, for the decoding of few tokens.

    There is nothing between V and U but a shuffle, so that W = UV can be kept as well: in eval
    mode an input of up to `threshold` tokens is multiplied by W, a larger one by V and U. It costs
    the memory of both. Source: arXiv 2406.16450, section 3.3 (pre-merge). Explained in
    ``book/foundations/03-structured-matrices`` and ``book/structured-ffn/04-decoding``.

    W is the buffer `merged` (M, N). It is in no checkpoint, and None in training mode, which always
    uses V and U. It is made by ``eval()``, and anew when the weights were loaded, replaced or
    changed in place in eval mode, or after a forward pass with their gradients, which an optimizer
    may have followed up. What leaves no trace is not seen: writing to ``.data``, through numpy, or
    in place to weights made under ``torch.inference_mode()``; the step of a fused optimizer without
    such a forward pass before it; and anything but loading in a compiled module. Call `merge` then.

    V and U are used, whatever the number of tokens, where their gradients are wanted
    (``requires_grad``, outside of ``torch.no_grad()``), under the transforms of ``torch.func``, in
    the replicas of ``nn.DataParallel``, and where V, U or the bias are not the layer's own
    parameters, as under weight norm and pruning. ``feedforward.surgery.premerge`` does it to a
    whole model.

    Args:
        layer: a `LowRank`, `BlockShuffle` or `BlockDense`; it is kept as ``.layer``, and its keys
            in a checkpoint become ``layer.v``, ``layer.u``, ``layer.bias``. So load first and
            merge then.
        threshold: the largest number of tokens (the product of the leading dimensions) that W is
            used for, or ``"measure"`` to find it on the device that the layer is on (see
            `measure`). 0 never uses W.

    Raises:
        ValueError: If the threshold is neither a whole number from 0 nor ``"measure"``, or `layer`
            is of another kind.

    >>> layer = PreMerged(LowRank(6, 8, rank=2), threshold=16).eval()
    >>> with torch.no_grad():
    ...     layer(torch.ones(6)).shape
    torch.Size([8])
    """

    threshold: int
    merged: Tensor | None

    def __init__(self, layer: StructuredLinear, *, threshold: int | Literal["measure"]):
        super().__init__()
        check_structured(layer)
        if threshold != "measure" and not (_is_integer(threshold) and threshold >= 0):
            raise ValueError(
                f"threshold is {threshold!r}; give a number of tokens from 0 (never merged), or "
                '"measure"'
            )
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("merged", None, persistent=False)
        self.register_load_state_dict_post_hook(_merge_after_loading)
        self.train(layer.training)
        self.threshold = self.measure() if threshold == "measure" else threshold

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features).

        Raises:
            ValueError: If the last dimension of `x` is not `in_features`.
        """
        # a step of decoding on a GPU is over in microseconds: what a module keeps is read from its
        # dicts, which takes a tenth of the time that its attributes do
        layer = self._modules["layer"]
        weights = layer._parameters
        if _transforming() or not ("v" in weights and "u" in weights and "bias" in weights):
            return layer(x)
        if torch.is_grad_enabled():
            self._distrust(layer)
        few = x.numel() <= self.threshold * self.in_features
        # a wrong width is the structured layer's to report
        fits = x.dim() > 0 and x.shape[-1] == self.in_features
        wants_gradients = torch.is_grad_enabled() and (
            layer.v.requires_grad or layer.u.requires_grad
        )
        if self.training or wants_gradients or not few or not fits:
            return layer(x)
        if self._is_stale():
            self.merge()
        return F.linear(x, self._buffers["merged"], layer._parameters["bias"])

    def merge(self) -> None:
        """Make the dense weight from the present V and U."""
        # no tensor of inference mode: autograd may come by with frozen weights
        autocast = without_autocast(self.layer.v.device.type)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            self.merged = self.layer.dense_weight()
        self._merged_from = self._versions()

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, which drops W, or to eval mode, which makes it."""
        super().train(mode)
        if mode:
            self.merged = None
        else:
            self.merge()
        return self

    def measure(self, *, largest: int = 1024, rounds: int = 11) -> int:
        """Up to how many tokens the dense weight is the faster one on this device now.

        Call ``layer.threshold = layer.measure()`` after the layer has moved to another device. Of
        the layers of a model ``feedforward.surgery.premerge`` measures those of one shape together.

        Args:
            largest: the largest number of tokens to try.
            rounds: how often each way is timed for each number of tokens.

        Returns:
            As `measure_threshold`.

        Raises:
            ValueError: If the layer is on the meta device, which computes nothing.
        """
        return measure_threshold([self.layer], largest=largest, rounds=rounds)

    def extra_repr(self) -> str:
        """The threshold in tokens."""
        return f"threshold={self.threshold}"

    def _is_stale(self) -> bool:
        if self._buffers["merged"] is None:
            return True
        # a compiled graph cannot ask for versions
        return not torch.compiler.is_compiling() and self._merged_from != self._versions()

    def _distrust(self, layer: StructuredLinear) -> None:
        """Where gradients of the weights are recorded, W is made anew before its next use.

        What takes the gradients up may write past the count of changes, as fused optimizers do.
        """
        if not torch.compiler.is_compiling() and (layer.v.requires_grad or layer.u.requires_grad):
            self._merged_from = None

    def _versions(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Changes whenever V or U does; None where they are not the layer's own."""
        weights = self._modules["layer"]._parameters
        if "v" not in weights or "u" not in weights:
            return None
        return _version(weights["v"]), _version(weights["u"])


@torch.no_grad()
def measure_threshold(
    layers: Sequence[StructuredLinear], *, largest: int = 1024, rounds: int = 11
) -> int:
    """Up to how many tokens dense weights are faster than V and U on this device now.

    Both ways are timed turn and turn about, and `search_threshold` looks where they cross.
    Explained in ``book/structured-ffn/04-decoding``.

    Args:
        layers: layers of one shape, which run one after the other, as those of a model do: a single
            one would find its weights in the processor's cache.
        largest: the largest number of tokens to try.
        rounds: how often each way is timed for each number of tokens.

    Returns:
        As `search_threshold`.

    Raises:
        ValueError: If a layer is not structured, there is none, one is on the meta device, which
            computes nothing, or `largest` or `rounds` are too small.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("there are no layers to measure; give at least one")
    for layer in layers:
        check_structured(layer)
        if layer.v.is_meta:
            raise ValueError("a layer on the meta device cannot be timed; move it to a real one")
    dense = [(layer.dense_weight(), layer.bias) for layer in layers]
    device, dtype = layers[0].v.device, layers[0].v.dtype

    def ratio(tokens: int) -> float:
        """The time of the dense weights over that of V and U."""
        x = torch.randn(tokens, layers[0].in_features, device=device).to(dtype)

        def merged() -> None:
            for weight, bias in dense:
                F.linear(x, weight, bias)

        def structured() -> None:
            for layer in layers:
                layer(x)

        runs = {"merged": merged, "structured": structured}
        times = interleaved(runs, device=device, rounds=rounds, seconds=0.5, turn=0.002)
        return statistics.median(times["merged"]) / statistics.median(times["structured"])

    return search_threshold(ratio, largest=largest)


def search_threshold(ratio: Callable[[int], float], *, largest: int = 1024) -> int:
    """Up to how many tokens the dense weight should be used.

    Asks for 1, 2, 4, ... tokens until V and U have clearly won twice in a row, and then between the
    last of these numbers that the dense weight should be used for and the next, or `largest`.

    Args:
        ratio: of a number of tokens, the time with the dense weight over that with V and U.
        largest: the largest number of tokens to ask for.

    Returns:
        The threshold with the least time over all numbers of tokens that were asked for, each
        counted by its ratio, so that one number that was timed badly decides little. 0 never uses
        the dense weight.

    Raises:
        ValueError: If `largest` is below 1.

    >>> search_threshold(lambda tokens: tokens / 23)
    23
    """
    if largest < 1:
        raise ValueError(f"largest is {largest}; give at least 1 token")
    tokens, lost, total = 1, 0, {0: 0.0}  # log of the time, relative to always using V and U
    while tokens <= largest and lost < 2:
        r = ratio(tokens)
        total[tokens] = total[tokens // 2] + math.log(r)
        lost = lost + 1 if r > 1.02 else 0
        tokens *= 2
    threshold = min(total, key=total.get)
    # where the dense weight won to the end, there may be numbers left up to `largest`
    beyond = 2 * threshold if 2 * threshold in total else min(2 * threshold, largest + 1)
    while beyond - threshold > 1:
        middle = (threshold + beyond) // 2
        threshold, beyond = (middle, beyond) if ratio(middle) <= 1 else (threshold, middle)
    return threshold


def check_structured(layer: nn.Module) -> None:
    """Raise a `ValueError` unless `layer` is one of the three structured layers."""
    if not isinstance(layer, StructuredLinear):
        raise ValueError(
            f"the layer is a {type(layer).__name__}; give a LowRank, BlockShuffle or BlockDense"
        )


def _merge_after_loading(module: PreMerged, incompatible_keys) -> None:
    if not module.training:
        module.merge()


def _version(weight: Tensor) -> tuple[int, int]:
    """Changes whenever the weight does; inference tensors do not count changes in place."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _by_blocks(x: Tensor, blocks: int) -> Tensor:
    """Cut the columns of `x` (T, N) into blocks (B, T, N/B), without a copy."""
    return x.view(x.shape[0], blocks, x.shape[1] // blocks).transpose(0, 1)


def _allows_out(x: Tensor) -> bool:
    """Whether a product may write into a tensor that is there already."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # transforms of functions and forward-mode derivatives go on without a graph
    if _transforming() or forward_ad._current_level >= 0:
        return False
    return not x.is_meta and not torch.is_autocast_enabled(x.device.type)


def _polar(weight: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, of each matrix of a batch."""
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    return u @ v


def _split_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The V and U of this rank nearest to `weight`; each takes the root of its singular values."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[..., :rank].sqrt()
    return root.unsqueeze(-1) * v[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)


def _round_rank(wanted: float, largest: int, step: int = 1) -> int:
    """The simplest fraction of `largest` within 2.5 % of `wanted`, else the nearest rank.

    Only multiples of `step` from `step` to `largest` are ranks.
    """
    limit = largest // step * step
    for parts in _divisors(largest):
        unit = largest // parts
        rank = unit * max(1, round(wanted / unit))
        if rank <= limit and rank % step == 0 and abs(rank - wanted) <= 0.025 * wanted:
            return rank
    return max(min(step * round(wanted / step), limit), step)


def _divisors(number: int) -> list[int]:
    """Every divisor, in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive(values: Iterable[tuple[str, object]]) -> None:
    for name, value in values:
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a whole number from 1")


def _check_widths(in_features: int, out_features: int) -> None:
    _check_positive((("in_features", in_features), ("out_features", out_features)))


def _check_rank(in_features: int, out_features: int, rank: int) -> None:
    _check_widths(in_features, out_features)
    _check_positive((("rank", rank),))
    largest = min(in_features, out_features)
    if rank > largest:
        raise ValueError(
            f"rank is {rank}, more than the smaller width of {in_features} -> {out_features}; "
            f"give a rank from 1 to {largest}"
        )


def _check_blocks(blocks: int, **widths: int) -> None:
    _check_positive((("blocks", blocks),))
    for name, width in widths.items():
        if width % blocks:
            allowed = ", ".join(map(str, _divisors(math.gcd(*widths.values()))))
            raise ValueError(
                f"{name} = {width} cannot be cut into {blocks} equal blocks; "
                f"blocks that divide {' and '.join(widths)}: {allowed}"
            )


def _check_share(parameters: float) -> None:
    if not 0 < parameters <= 1:
        raise ValueError(
            f"parameters is {parameters!r}; give a share of the dense layer's above 0, at most 1"
        )
