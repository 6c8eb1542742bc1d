"""What a program does with memory that it no longer needs."""

import os
import platform
import subprocess
import sys

import pytest

from feedforward import memory

_PAGES_TAKEN = """
import resource, sys
import torch
from feedforward.memory import reuse_memory

def step():
    torch.ones(2**24).mul_(2)

if sys.argv[1] == "reuse":
    assert reuse_memory()
for _ in range(20):  # until there is a place that fits
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_taken(how: str) -> int:
    """Pages that a process takes from the system in five steps of 64 MiB after twenty."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", _PAGES_TAKEN, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")
def test_a_step_takes_the_memory_of_the_last_one():
    assert pages_taken("reuse") < 100
    assert pages_taken("as it is") > 5 * 2**24 * 4 // 2**21  # a page of 2 MiB at most


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.reuse_memory() is False


def test_a_library_without_the_setting_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.reuse_memory() is False
