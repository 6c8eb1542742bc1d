"""Times taken side by side: the clocks of the devices, and rounds in which everything has its turn.

A ratio of two times means something only when both were taken in one process, turn and turn about:
whatever else the machine does then hits both alike. The book uses it in
``book/foundations/03-structured-matrices`` and ``book/structured-ffn/01-cost-and-speed``.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Name = TypeVar("Name")


def forward(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """A forward pass without a graph; `gradient` is not used."""
    with torch.no_grad():
        module(x)


def forward_and_backward(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """A forward and a backward pass from `gradient` of the output, with that of the input."""
    module.zero_grad(set_to_none=True)
    module(x.detach().requires_grad_()).backward(gradient)


#: The two passes that are timed.
PASSES = {"forward": forward, "training": forward_and_backward}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use this many threads of the processor, and as many as before afterwards.

    >>> with threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stopwatch(device: torch.device | str) -> Callable[[Callable[[], object]], float]:
    """A function that runs another one and returns the seconds it took on this device.

    On one thread of a processor it is processor time, which leaves out what other programs took;
    on several threads wall time; on a CUDA GPU the time between two events.

    >>> stopwatch("cpu")(lambda: torch.ones(9).sum()) >= 0
    True
    """
    device = torch.device(device)
    if device.type == "cuda":

        def seconds(run: Callable[[], object]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                start.record()
                run()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds

    one = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one else time.perf_counter

    def seconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock() - start

    return seconds


def interleaved(
    runs: Mapping[Name, Callable[[], object]],
    *,
    device: torch.device | str,
    rounds: float = math.inf,
    seconds: float = math.inf,
    least: int = 3,
    turn: float = 0.02,
) -> dict[Name, list[float]]:
    """Time functions turn and turn about, in an order that changes from round to round.

    Each runs once beforehand, for kernels to be chosen and memory to be mapped.

    Args:
        runs: what to time, by name.
        device: that they run on.
        rounds: at most.
        seconds: of wall time, after which no round begins once there were `least`.
        least: rounds, whatever they take.
        turn: seconds that a function's turn lasts at least; a quick one is repeated in it.

    Returns:
        The seconds of one call, by name: one number for each round.

    Raises:
        ValueError: if there is nothing to time, neither `rounds` nor `seconds` is finite, or they
            or `least` are too small.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one function to time")
    if math.isinf(rounds) and math.isinf(seconds):
        raise ValueError("rounds and seconds are both infinite; give one of them")
    if not (least >= 1 and rounds >= least and seconds > 0):
        raise ValueError(
            f"rounds {rounds}, least {least} and seconds {seconds}: least is a whole number from "
            "1, rounds is not below it, and seconds is positive"
        )
    measure, repeats = stopwatch(device), {}
    for name, run in runs.items():
        first = measure(run)
        # the first call pays for the start; a long one hardly notices
        once = first if first > turn else measure(run)
        repeats[name] = max(1, math.ceil(turn / max(once, 1e-6)))

    def repeat(name: Name) -> None:
        for _ in range(repeats[name]):
            runs[name]()

    names, times, start = list(runs), {name: [] for name in runs}, time.monotonic()
    done = 0
    while done < least or (done < rounds and time.monotonic() - start < seconds):
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(measure(lambda name=name: repeat(name)) / repeats[name])
        done += 1
    return times
