"""What a program does with memory that it no longer needs."""

import ctypes
import sys

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def reuse_memory() -> bool:
    """Let this process keep the memory that it frees, and take it again for the next tensor.

    glibc gives the memory of a large tensor back to the system as soon as the tensor is gone and
    asks for it anew in the next step; the system clears every page of it before. In a training step
    of a small Transformer that cost as much time as the arithmetic. A process that keeps its memory
    holds the most that it ever had at once until it ends, so that this is for programs to decide:
    ``feedforward run`` and ``feedforward.notebook.setup`` do.

    Returns:
        Whether it worked: it does on Linux with glibc, and elsewhere nothing happens.

    Source: the GNU C Library's manual, "Malloc Tunable Parameters".
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    thresholds = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return mallopt is not None and all([mallopt(name, _LARGEST) for name in thresholds])
