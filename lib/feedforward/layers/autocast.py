"""Autocast around a layer: whether it converts a tensor, and a context without it."""

import contextlib

import torch
from torch import Tensor


def autocasting(x: Tensor) -> bool:
    """Whether autocast would convert this tensor; it leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which autocast is off, on devices that have it (the meta device does not)."""
    available = torch.amp.is_autocast_available(device_type)
    if not (available and torch.is_autocast_enabled(device_type)):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
