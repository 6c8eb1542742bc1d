"""What the benchmarks share: the two passes that are timed, and the clocks of the devices."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def forward(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """A forward pass without a graph."""
    with torch.no_grad():
        module(x)


def forward_and_backward(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """A forward and a backward pass, gradients of the input included."""
    module.zero_grad(set_to_none=True)
    module(x.detach().requires_grad_()).backward(gradient)


PASSES = {"fwd": forward, "f+b": forward_and_backward}


def stopwatch(device: str) -> Callable[[Callable[[], None]], float]:
    """A function that runs another one and returns the seconds it took on this device.

    On one thread of a CPU it is processor time, which leaves out what other programs took.
    """
    if torch.device(device).type == "cuda":

        def seconds(run: Callable[[], None]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(run: Callable[[], None]) -> float:
        start = clock()
        run()
        return clock() - start

    return seconds
