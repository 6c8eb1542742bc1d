"""Time the mixture of experts side by side with transformers' own blocks and with a dense layer.

    python benchmarks/moe.py                        # every cell, fp32 and bf16: about ten minutes
    python benchmarks/moe.py --tokens 512 --dtype float32 --json moe.json

All contestants hold the same weights, route the same tokens the same way, and are checked to agree
before they are timed. They run in one process, one after the other in each round, in an order that
turns from round to round; what is compared is CPU time (on a GPU, time between events), medians
over the rounds. ``dense`` is one feed-forward layer of an expert's size on T * k rows: equal active
FLOPs. ``floor`` is what no implementation can do without: the matrix products and the activations
of the chosen experts, each expert a layer of its own. On CPU much of a step is the kernel handing
out fresh pages; ``--keep-memory`` lets the allocator keep what is freed.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from feedforward import MoE, TopKRouter
from feedforward.memory import reuse_memory
from feedforward.timing import PASSES, interleaved

# name -> at most this many times the peer's time, for a cell that the bar speaks about
BARS = {
    "hf_grouped": lambda cell: 1.02 if cell["pass"] == "training" else None,
    "hf_eager": lambda cell: 0.5 if cell["pass"] == "training" else None,
    "dense": lambda cell: (
        {"forward": 1.40, "training": 1.30}[cell["pass"]]
        if cell["tokens"] == 512 and cell["dtype"] == "float32"
        else None
    ),
    "floor": lambda cell: None,
}


class Transformers(nn.Module):
    """The router and the experts of Hugging Face's Mixtral, ungated with NemotronH's experts."""

    def __init__(self, moe: MoE, implementation: str):
        super().__init__()
        config = MixtralConfig(
            hidden_size=moe.dim,
            intermediate_size=moe.hidden,
            num_local_experts=moe.experts,
            num_experts_per_tok=moe.router.k,
            hidden_act=moe.activation,
        )
        # what NemotronH's experts call the same things
        config.n_routed_experts, config.moe_intermediate_size = moe.experts, moe.hidden
        config.mlp_hidden_act, config.moe_latent_size = moe.activation, None
        config._experts_implementation = implementation
        self.router = MixtralTopKRouter(config)
        self.experts = (MixtralExperts if moe.gated else NemotronHExperts)(config)
        first = self.experts.gate_up_proj if moe.gated else self.experts.up_proj
        with torch.no_grad():
            self.router.weight.copy_(moe.router.gate)
            first.copy_(moe.w_in)
            self.experts.down_proj.copy_(moe.w_out)
        self.to(moe.w_in.device, moe.w_in.dtype)

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.router(x)
        return self.experts(x, indices, weights)


class Dense(nn.Module):
    """One expert as an ordinary feed-forward layer."""

    def __init__(self, moe: MoE):
        super().__init__()
        made = {"bias": False, "device": moe.w_in.device, "dtype": moe.w_in.dtype}
        self.gated, self.activate = moe.gated, getattr(F, moe.activation)
        self.first = nn.Linear(moe.dim, moe.w_in.shape[1], **made)
        self.second = nn.Linear(moe.hidden, moe.dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return self.second(self.activate(gate) * up)
        return self.second(self.activate(h))


class Floor(nn.Module):
    """The experts alone, on as many rows each as the routing gives them."""

    def __init__(self, moe: MoE, sizes: list[int]):
        super().__init__()
        self.experts = nn.ModuleList(Dense(moe) for _ in sizes)
        self.sizes = sizes

    def forward(self, rows: Tensor) -> Tensor:
        parts = zip(rows.split(self.sizes), self.experts, strict=True)
        return torch.cat([expert(part) for part, expert in parts])


def contestants(args, gated: bool, dtype: torch.dtype, tokens: int) -> dict[str, tuple]:
    """Name -> (module, input, gradient of the output)."""
    torch.manual_seed(0)
    hidden = args.hidden or (args.dim * 8 // 3 // 64 * 64 if gated else args.dim * 4)
    moe = MoE(
        args.dim,
        hidden,
        args.experts,
        router=TopKRouter(args.dim, args.experts, k=args.k),
        activation="silu" if gated else "gelu",
        gated=gated,
    ).to(args.device, dtype)
    made = {"device": args.device, "dtype": dtype}
    x, rows = torch.randn(tokens, args.dim, **made), torch.randn(tokens * args.k, args.dim, **made)
    eager, grouped = Transformers(moe, "eager"), Transformers(moe, "grouped_mm")
    with torch.no_grad():
        routing = moe.router(x)  # their router rounds its logits to the type of the tokens
        for peer in (eager, grouped):
            theirs = peer.experts(x, routing.indices, routing.weights)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(moe(x), theirs.to(dtype), rtol=tolerance, atol=tolerance)
    modules = {"ours": (moe, x), "hf_grouped": (grouped, x), "hf_eager": (eager, x)}
    modules["dense"] = (Dense(moe), rows)
    sizes = routing.indices.reshape(-1).bincount(minlength=args.experts).tolist()
    modules["floor"] = (Floor(moe, sizes), rows)
    return {name: (module, x, torch.randn_like(x)) for name, (module, x) in modules.items()}


def compare(entries: dict[str, tuple], step: Callable, seconds: float, device: str) -> dict:
    """Median seconds of every entry over interleaved rounds that fill about `seconds`."""
    runs = {name: partial(step, *entry) for name, entry in entries.items()}
    times = interleaved(runs, device=device, seconds=seconds, least=7, turn=0.0)
    rounds = len(times["ours"])
    return {name: statistics.median(values) for name, values in times.items()} | {"rounds": rounds}


def processor() -> str:
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--experts-shape", nargs="+", default=["plain", "gated"], choices=["plain", "gated"]
    )
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--hidden", type=int, help="default: 4 dim, gated 8/3 dim in steps of 64")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each cell and pass")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the cells there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.keep_memory and not reuse_memory():
        raise OSError("this C library does not take mallopt's settings; run without --keep-memory")
    device = processor() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    setting = {
        "device": device,
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dim": args.dim,
        "experts": args.experts,
        "k": args.k,
        "keep_memory": args.keep_memory,
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    print("ours as a multiple of each peer's time; ! a bar does not hold, ~ nor could the floor")
    print(f"{'cell':<28}{'pass':<9}{'ours ms':>9}" + "".join(f"{name:>13}" for name in BARS))
    cells, missed, impossible = [], 0, 0
    for shape in args.experts_shape:
        for dtype in args.dtype:
            for tokens in args.tokens:
                entries = contestants(args, shape == "gated", getattr(torch, dtype), tokens)
                for name, step in PASSES.items():
                    seconds = compare(entries, step, args.seconds, args.device)
                    cell = {"shape": shape, "dtype": dtype, "tokens": tokens, "pass": name}
                    cell |= {"seconds": seconds, "ratio": {}, "bar": {}}
                    text = f"{shape + ' ' + dtype + ' T' + str(tokens):<28}{name:<9}"
                    text += f"{seconds['ours'] * 1e3:9.2f}"
                    for peer, bar in BARS.items():
                        ratio, limit = seconds["ours"] / seconds[peer], bar(cell)
                        cell["ratio"][peer], cell["bar"][peer] = ratio, limit
                        mark = " "
                        if limit is not None and ratio > limit:
                            mark = "~" if seconds["floor"] / seconds[peer] > limit else "!"
                        missed, impossible = missed + (mark == "!"), impossible + (mark == "~")
                        text += f"{ratio:12.2f}{mark}"
                    print(text, flush=True)
                    cells.append(cell)
    print(f"{missed} bars do not hold; {impossible} more are below the floor")
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
