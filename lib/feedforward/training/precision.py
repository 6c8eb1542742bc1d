"""Computing in bfloat16, also on processors that have no instructions for it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from feedforward.records import has_fast_bf16


@contextlib.contextmanager
def bf16_products(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """A context in which matrix products of bfloat16 are as fast as the device allows.

    It belongs around a forward pass under autocast and its backward pass. Processors without
    bfloat16 instructions get the products in float32, rounded once at the end: what the
    instructions do too, which add up in float32. PyTorch's own way there gives the same but for
    the order of the sums, and makes a training step of a small Transformer take twice as long.
    Elsewhere, and where it is not enabled, nothing changes.

    >>> left = torch.ones(2, 2, dtype=torch.bfloat16)
    >>> with bf16_products(torch.device("cpu")):
    ...     (left @ left).dtype
    torch.bfloat16
    """
    helps = enabled and device.type == "cpu" and not has_fast_bf16(device)
    with _ThroughFloat32() if helps else contextlib.nullcontext():
        yield


_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
}


class _ThroughFloat32(TorchDispatchMode):
    """Products of bfloat16 matrices by way of float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _PRODUCTS or args[-1].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        wide = [x.float() if isinstance(x, Tensor) else x for x in args]
        return func(*wide, **kwargs).bfloat16()
