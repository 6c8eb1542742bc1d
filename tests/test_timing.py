"""Clocks that see work and not waiting, and rounds in which everything has its turn."""

import math
import time

import pytest
import torch
from torch import nn

from feedforward.timing import PASSES, interleaved, stopwatch, threads


def test_threads_are_given_back_even_after_an_error():
    before = torch.get_num_threads()

    def interrupted():
        with threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.get_num_threads() == before


def test_one_thread_is_timed_without_what_others_took():
    with threads(1):
        assert stopwatch("cpu")(lambda: time.sleep(0.05)) < 0.04  # waiting is not work
    with threads(2):
        assert stopwatch("cpu")(lambda: time.sleep(0.05)) >= 0.05


def test_a_gpu_is_timed_between_events(monkeypatch):
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("synchronize")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    class Current:
        def __init__(self, device):
            asked.append(str(device))

        def __enter__(self): ...

        def __exit__(self, *error): ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Current)
    assert stopwatch("cuda:1")(lambda: asked.append("run")) == 0.25
    assert asked == ["cuda:1", "record", "run", "record", "synchronize"]


def test_the_passes_do_what_they_are_called():
    module, x, gradient = nn.Linear(3, 2), torch.ones(4, 3), torch.ones(4, 2)
    PASSES["forward"](module, x, gradient)
    assert module.weight.grad is None
    for _ in range(2):  # gradients do not pile up
        PASSES["training"](module, x, gradient)
        assert torch.equal(module.weight.grad, torch.full((2, 3), 4.0))
    assert x.grad is None
    assert not x.requires_grad


def test_everything_has_its_turn_first():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(runs, device="cpu", rounds=4, turn=0.0)
    assert order[:3] == list("abc")  # the start
    assert "".join(order[3:]) == "abcbcacababc"
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 4)


def test_a_quick_run_is_repeated_in_its_turn_and_counted_once(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    calls = {"quick": 0, "slow": 0}

    def works(name, seconds):
        calls[name] += 1
        clock[0] += seconds

    runs = {"quick": lambda: works("quick", 0.001), "slow": lambda: works("slow", 0.5)}
    with threads(1):
        times = interleaved(runs, device="cpu", rounds=3, turn=0.01)
    assert calls == {"quick": 2 + 3 * 10, "slow": 1 + 3}
    assert times["quick"] == pytest.approx([0.001] * 3)
    assert times["slow"] == pytest.approx([0.5] * 3)


def test_rounds_end_when_the_time_is_over(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def works():
        clock[0] += 1.0

    def rounds(**limits):
        return len(interleaved({"a": works}, device="cpu", turn=0.0, **limits)["a"])

    assert rounds(seconds=5.0) == 5
    assert rounds(seconds=5.0, rounds=4) == 4
    assert rounds(seconds=0.5, least=3) == 3


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "both infinite"),
        ({"rounds": 2, "least": 3}, "rounds is not below it"),
        ({"rounds": 2, "least": 0}, "from 1"),
        ({"seconds": 0.0}, "seconds is positive"),
        ({"seconds": math.nan}, "seconds is positive"),
    ],
)
def test_limits_that_make_no_sense(limits, message):
    with pytest.raises(ValueError, match=message):
        interleaved({"a": int}, device="cpu", **limits)


def test_nothing_to_time():
    with pytest.raises(ValueError, match="runs is empty"):
        interleaved({}, device="cpu", rounds=3)
