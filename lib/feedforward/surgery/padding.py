"""Padding is never routed: mixtures of experts are told which tokens of their block are real."""

import contextvars
import inspect
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from feedforward.layers.experts import MoE

# the real tokens of the block that runs, and those of the blocks around it
_masks: contextvars.ContextVar[tuple[Tensor | None, ...]] = contextvars.ContextVar(
    "real tokens", default=()
)
# those of a block that a backward pass computes again, without its hooks
_mask_again: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar(
    "real tokens, again", default=None
)


def watch_masks(blocks: Iterable[nn.Module], mixtures: list[MoE]) -> None:
    """Let the mixtures of experts in these blocks know which tokens are real."""
    blocks = list(blocks)
    for block in blocks:
        if _drop_mask in block._forward_hooks.values():
            continue
        _hook(block, _take_mask)
        block.register_forward_hook(_drop_mask, always_call=True)
        inside = (module for module in block.modules() if module is not block)
        attention = next((m for m in inside if "attention_mask" in forward_parameters(m)), None)
        if attention is not None:
            _hook(attention, _take_mask_again)
    for moe in mixtures if blocks else ():
        moe.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _hook(module: nn.Module, hook: Callable) -> None:
    hook = partial(hook, names=forward_parameters(module))
    module.register_forward_pre_hook(hook, with_kwargs=True)


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward pass takes."""
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
