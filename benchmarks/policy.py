"""Time a policy's plan with experts side by side with the dense policy it was made from.

    python benchmarks/policy.py                    # batches 1 and 32: about a minute
    python benchmarks/policy.py --config large --device cuda --json policy.json

A plan is one chunk of actions: the prefix and the state once, then the Euler steps. All policies
are made from one dense policy and are checked to give its plan before they are timed, then their
routers are drawn anew so that every expert is used. They run in one process, turn and turn about;
what is compared is CPU time (on a GPU, time between events), medians over the rounds. ``active`` is
a dense policy with as many parameters in use as AdaMoE's, ``total`` one with all of them.
"""

import argparse
import json
import platform
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from feedforward import MoE, collect_routing
from feedforward.memory import reuse_memory
from feedforward.robot.policy import CONFIGS, FlowPolicy, upcycled, widened
from feedforward.timing import interleaved

# batch -> at most this many times the dense policy's time, for AdaMoE
BARS = {1: 1.5, 32: 1.6}
TOKENS = 12  # of an instruction


def contestants(name: str, experts: int, k: int) -> dict[str, FlowPolicy]:
    """The dense policy and those made from it, all with its function."""
    torch.manual_seed(0)
    dense = FlowPolicy(CONFIGS[name]).eval()
    options = {"experts": experts, "k": k, "preserve": True}
    made = {kind: upcycled(dense, kind, **options) for kind in ("adamoe", "moe", "csmoe")}
    for match in ("active", "total"):
        made[match] = widened(dense, made["adamoe"].config.dense_hidden(match))
    return {"dense": dense, **made}


def inputs(policy: FlowPolicy, batch: int, device: str) -> dict[str, Tensor]:
    """What a plan for `batch` robots is made of."""
    config = policy.config
    generator = torch.Generator().manual_seed(1)
    given = {
        "state": torch.randn(batch, config.state, generator=generator),
        "text": torch.randn(batch, TOKENS, config.text_width, generator=generator),
        "text_mask": torch.ones(batch, TOKENS, dtype=torch.bool),
        "noise": torch.randn(batch, config.horizon, config.action, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def require_the_same_plan(policies: dict[str, FlowPolicy], given: dict[str, Tensor]) -> None:
    expected = policies["dense"].plan(**given)
    for policy in policies.values():
        torch.testing.assert_close(policy.plan(**given), expected, rtol=1e-3, atol=1e-3)


def draw_routers(policies: dict[str, FlowPolicy]) -> None:
    """Routers that spread the tokens over all experts."""
    for policy in policies.values():
        for module in policy.modules():
            if isinstance(module, MoE):
                module.router.init_std = policy.config.width**-0.5
                module.router.reset_parameters()


def experts_in_use(policy: FlowPolicy, given: dict[str, Tensor]) -> float:
    """Mean number of experts that one layer uses in one Euler step."""
    with collect_routing(policy) as routings:
        policy.plan(**given)
    steps = routings[policy.config.depth :]
    return statistics.mean(len(routing.indices.unique()) for routing in steps)


def processor() -> str:
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", nargs="+", default=["small"], choices=list(CONFIGS))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BARS))
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="Euler steps of a plan")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each cell")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the cells there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    reuse_memory()  # as the programs of the library do: else taking pages is timed too
    setting = {
        "device": processor() if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
        "experts": args.experts,
        "k": args.k,
        "steps": args.steps,
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    print("each policy as a multiple of the dense one's time; ! the bar does not hold")
    cells, missed = [], 0
    for name in args.config:
        policies = contestants(name, args.experts, args.k)
        policies = {kind: policy.to(args.device) for kind, policy in policies.items()}
        require_the_same_plan(policies, inputs(policies["dense"], 2, args.device))
        draw_routers(policies)
        others = [kind for kind in policies if kind != "dense"]
        head = "".join(f"{kind:>10}" for kind in others)
        print(f"{name:<8}{'batch':>6}{'dense ms':>10}{head}  experts in use")
        for batch in args.batch:
            given = inputs(policies["dense"], batch, args.device) | {"steps": args.steps}
            runs = {kind: partial(policy.plan, **given) for kind, policy in policies.items()}
            times = interleaved(runs, device=args.device, seconds=args.seconds, least=7)
            seconds = {kind: statistics.median(values) for kind, values in times.items()}
            ratios = {kind: seconds[kind] / seconds["dense"] for kind in others}
            used = experts_in_use(policies["adamoe"], given)
            bar = BARS.get(batch) if (args.experts, args.k, args.device) == (4, 1, "cpu") else None
            over = bar is not None and ratios["adamoe"] > bar
            missed += over
            marks = {kind: "!" if over and kind == "adamoe" else " " for kind in others}
            text = "".join(f"{ratios[kind]:9.2f}{marks[kind]}" for kind in others)
            print(f"{'':<8}{batch:>6}{seconds['dense'] * 1e3:10.2f}{text}{used:8.1f}", flush=True)
            cell = {"config": name, "batch": batch, "seconds": seconds, "ratio": ratios}
            cells.append(cell | {"bar": bar, "experts_in_use": used})
    print(f"{missed} bars do not hold")
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
