"""Time structured feed-forward layers H -> 4H -> H against the dense one.

    python benchmarks/structured.py                       # a few minutes on one CPU thread
    python benchmarks/structured.py --widths 1536 --tokens 2048 --passes forward --json times.json
    python benchmarks/structured.py --device cuda --dtypes bfloat16 --tokens 1 16 30000

Every layer of a cell runs in this one process, turn and turn about, in an order that changes from
round to round. What is compared are medians: of CPU time on one thread, which other processes
disturb least, of wall time on several threads, of the time between events on a GPU. A ratio above
1 means faster than dense. The bound is the ratio of the matrix FLOPs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from feedforward import BlockDense, BlockShuffle, LowRank
from feedforward.files import atomic_write
from feedforward.memory import reuse_memory
from feedforward.records import Provenance
from feedforward.timing import PASSES, interleaved

LAYERS = {"LowRank": LowRank, "BlockDense": BlockDense, "BlockShuffle": BlockShuffle}


def feed_forwards(width: int, shares: list[float], device: str, dtype: torch.dtype) -> dict:
    """(layer, share of the dense parameters) -> the feed-forward layer; the first is dense."""

    def ffn(linear: Callable[..., nn.Module]) -> nn.Sequential:
        made = {"device": device, "dtype": dtype}
        up, down = linear(width, 4 * width, **made), linear(4 * width, width, **made)
        return nn.Sequential(up, nn.GELU(), down)

    modules = {("dense", 1.0): ffn(nn.Linear)}
    for share in shares:
        for name, kind in LAYERS.items():

            def linear(n: int, m: int, kind=kind, share=share, **made) -> nn.Module:
                # the values do not matter for the time, and a Gaussian start is the quickest
                return kind.from_ratio(n, m, parameters=share, init="gaussian", **made)

            modules[name, share] = ffn(linear)
    return modules


def cells(args: argparse.Namespace) -> Iterator[dict]:
    """One row for each layer in each setting."""
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        for width in args.widths:
            torch.manual_seed(0)
            modules = feed_forwards(width, args.shares, args.device, dtype)
            flops = {name: weights(module) for name, module in modules.items()}
            for tokens in args.tokens:
                x = torch.randn(tokens, width, device=args.device, dtype=dtype)
                gradient = torch.randn_like(x)
                for passes in args.passes:
                    runs = {
                        name: partial(PASSES[passes], module, x, gradient)
                        for name, module in modules.items()
                    }
                    times = interleaved(
                        runs, device=args.device, rounds=args.rounds, least=args.rounds
                    )
                    medians = {name: statistics.median(values) for name, values in times.items()}
                    for (layer, share), seconds in medians.items():
                        yield {
                            "layer": layer,
                            "share": share,
                            "width": width,
                            "tokens": tokens,
                            "dtype": dtype_name,
                            "pass": passes,
                            "seconds": seconds,
                            "speedup": medians["dense", 1.0] / seconds,
                            "bound": flops["dense", 1.0] / flops[layer, share],
                        }


def weights(module: nn.Module) -> int:
    """Entries of all matrices, which are the multiply-adds of one token."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.63, 0.32])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    args = parser.parse_args(argv)
    for name in ("widths", "tokens", "shares", "threads", "rounds"):
        given = getattr(args, name)
        if any(value <= 0 for value in (given if isinstance(given, list) else [given])):
            parser.error(f"--{name} takes positive numbers")
    return args


def main(argv: list[str] | None = None) -> int:
    args, start = parse(argv), time.monotonic()
    torch.set_num_threads(args.threads)
    reuse_memory()  # as the programs of the library do: else taking pages is timed too
    rows = []
    columns = f"{'layer':<14}{'share':>6}{'width':>7}{'tokens':>8}  {'dtype':<9}{'pass':<9}"
    print(f"{columns}{'ms':>10}{'speed-up':>10}{'bound':>7}")
    for row in cells(args):
        rows.append(row)
        print(
            f"{row['layer']:<14}{row['share']:>6.2f}{row['width']:>7}{row['tokens']:>8}  "
            f"{row['dtype']:<9}{row['pass']:<9}{row['seconds'] * 1e3:>10.3f}"
            f"{row['speedup']:>10.2f}{row['bound']:>7.2f}",
            flush=True,
        )
    provenance = Provenance.here(seconds=time.monotonic() - start, device=args.device)
    print(
        f"{provenance.device}, {provenance.threads} threads, "
        f"torch {provenance.versions['torch']}, {provenance.seconds:.0f} s"
    )
    if args.json:
        with atomic_write(args.json, "w") as file:
            json.dump({"provenance": asdict(provenance), "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
