"""Computing in bfloat16, also on processors that have no instructions for it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from feedforward.records import has_fast_bf16


@contextlib.contextmanager
def bf16_products(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """A context in which products of bfloat16 matrices are as fast as the device allows.

    It belongs around a forward pass under autocast and its backward pass. Processors without
    bfloat16 instructions get the products, and attention, in float32 from the same bfloat16
    operands, rounded once at the end. The instructions add up in float32 too, so that of a product
    only the order of its sum differs; attention keeps its weights unrounded. PyTorch's own way
    there takes two to four times as long for a training step of a small Transformer. On other
    devices, and where it is not enabled, nothing changes.

    >>> left = torch.ones(2, 2, dtype=torch.bfloat16)
    >>> with bf16_products(torch.device("cpu")):
    ...     (left @ left).dtype
    torch.bfloat16
    """
    helps = enabled and device.type == "cpu" and not has_fast_bf16(device)
    with _ThroughFloat32() if helps else contextlib.nullcontext():
        yield


_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_PRODUCTS = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    _ATTENTION,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class _ThroughFloat32(TorchDispatchMode):
    """Products of bfloat16 matrices by way of float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(map(_is_bf16, args)):
            return func(*args, **kwargs)
        wide = [x.float() if _is_bf16(x) else x for x in args]
        named = {name: x.float() if _is_bf16(x) else x for name, x in kwargs.items()}
        out = func(*wide, **named)
        if func is _ATTENTION:  # the second is the logarithm of a sum, in float32 either way
            return out[0].bfloat16(), out[1]
        return tree_map(Tensor.bfloat16, out)


def _is_bf16(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
