"""The arms of the AdaMoE part: which action experts, from one dense parent, tuned alike.

Every arm of a seed starts from the same dense policy, ``dense-parent``, and is tuned for the same
number of steps on the same batches: ``dense`` goes on as it is, the others get experts in the place
of their feed-forward layers, or wider ones. The chapters of ``book/adamoe`` explain them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from feedforward.profiles import get_profile, unknown
from feedforward.robot import aloha, libero
from feedforward.robot.accounting import plan
from feedforward.robot.policy import CONFIGS, PolicyConfig
from feedforward.robot.runs import (
    EXPERIMENT,
    LOCAL,
    Evaluation,
    RobotConfig,
    Tuning,
    load_data,
    rollouts_of,
    run,
    specialisation,
    trained_policy,
)
from feedforward.robot.tasks import SUITES, Images, suite
from feedforward.robot.vision import FEATURES
from feedforward.training import TrainingConfig

__all__ = [
    "ARMS",
    "Evaluation",
    "RobotConfig",
    "Tuning",
    "grid",
    "load_data",
    "plan",
    "rollouts_of",
    "run",
    "specialisation",
    "trained_policy",
]

#: What distinguishes the tuning of each arm; ``dense-parent`` has none. ``dense-matched`` has as
#: many parameters as ``single-expert`` in all and as ``adamoe`` active, ``dense-matched-total`` as
#: ``adamoe`` in all, routers and adapters left out. ``adamoe-untuned`` is the parent's function
#: with copies for experts and routers that never learned: what their choices tell, chance tells.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "adamoe": {"ffn": "adamoe"},
    "vanilla-moe": {"ffn": "moe"},
    "csmoe": {"ffn": "csmoe"},
    "collapsed": {"ffn": "collapsed"},
    "adamoe-k2": {"ffn": "adamoe", "k": 2},
    "adamoe-e8": {"ffn": "adamoe", "experts": 8},
    "adamoe-balance-none": {"ffn": "adamoe", "balance": (0.0, 0.0)},
    "adamoe-balance-weaker": {"ffn": "adamoe", "balance": (0.001, 0.0005)},
    "adamoe-balance-stronger": {"ffn": "adamoe", "balance": (0.1, 0.05)},
    "single-expert": {"ffn": "adamoe", "experts": 1, "balance": (0.0, 0.0)},
    "dense-matched": {"match": 2},
    "dense-matched-total": {"match": 5},
    "adamoe-preserved": {"ffn": "adamoe", "preserve": True},
    "adamoe-released": {"ffn": "adamoe", "shared_weight": 0.5},
    "adamoe-untuned": {"ffn": "adamoe", "preserve": True, "tuned": False},
}
# of an arm that stays what it starts as: one step, too small for float32 to notice
_UNTUNED = {"steps": 1, "lr": 1e-12, "warmup": 0}


@dataclass(frozen=True)
class _Scale:
    """What the arms of a profile share.

    Args:
        policy: The dense parent.
        parent: Its training.
        tuning: Of all arms.
        config: Further fields of the configuration.
        switch: Steps of the first weight of the balance loss.
        router_warmup: Steps.
        tuned: The arms beside the dense parent.
    """

    policy: PolicyConfig
    parent: TrainingConfig
    tuning: TrainingConfig
    config: Mapping[str, Any] = field(default_factory=dict)
    switch: int = 500
    router_warmup: int = 10
    tuned: tuple[str, ...] = tuple(ARMS)

    def arms(self) -> dict[str, RobotConfig]:
        parent = RobotConfig("dense-parent", self.policy, self.parent, **self.config)
        arms = {parent.variant: parent}
        for variant in self.tuned:
            given = dict(ARMS[variant])
            if match := given.pop("match", None):
                given["hidden"] = match * self.policy.hidden
            training = self.tuning
            if not given.pop("tuned", True):
                training = replace(training, **_UNTUNED)
            tuning = Tuning(training, switch=self.switch, router_warmup=self.router_warmup, **given)
            arms[variant] = replace(parent, variant=variant, tuning=tuning)
        return arms


# --- the profiles -------------------------------------------------------------------------------

_SHARED = {"betas": (0.9, 0.95), "clip": 1.0, "ema": 0.99, "weight_decay": 0.01}
_SMALL = replace(CONFIGS["small"], width=96, heads=4, head_width=24, hidden=256, horizon=8, depth=3)
# those whose demonstrations are longer than the median of the suite
_LONG = ("assembly", "basketball", "bin-picking", "pick-out-of-hole", "shelf-place", "stick-pull")

_SMOKE = _Scale(
    policy=replace(_SMALL, width=32, heads=2, head_width=16, hidden=64, depth=2),
    parent=TrainingConfig(
        30, 1e-3, precision="fp32", log_every=5, checkpoint_every_seconds=None, **_SHARED
    ),
    tuning=TrainingConfig(
        10, 3e-4, precision="fp32", log_every=5, checkpoint_every_seconds=None, **_SHARED
    ),
    config={
        "tasks": ("drawer-close", "reach"),
        "demonstrations": 2,
        "batch": 16,
        "evaluation": Evaluation(episodes=2, at_once=4),
    },
)
_CPU = _Scale(
    policy=_SMALL,
    parent=TrainingConfig(2500, 1e-3, warmup=100, precision="fp32", log_every=50, **_SHARED),
    tuning=TrainingConfig(700, 3e-4, warmup=100, precision="fp32", log_every=25, **_SHARED),
    config={"tasks": SUITES["hard"], "demonstrations": 10, "long_tasks": _LONG},
)
_EASY = _Scale(
    policy=_SMALL,
    parent=TrainingConfig(3000, 1e-3, warmup=100, precision="fp32", log_every=50, **_SHARED),
    tuning=_CPU.tuning,
    config={
        "tasks": SUITES["easy"],
        "demonstrations": 20,
        "evaluation": Evaluation(episodes=10, held_out=False),
    },
)
_GPU = _Scale(
    policy=replace(
        CONFIGS["large"],
        state=4,
        image_width=FEATURES,
        cameras=2,
        prefix_width=256,
        prefix_hidden=1024,
    ),
    parent=TrainingConfig(20_000, 3e-4, warmup=500, log_every=100, **_SHARED),
    tuning=TrainingConfig(5_000, 1e-4, warmup=200, log_every=50, **_SHARED),
    config={
        "tasks": SUITES["hard"],
        "demonstrations": 50,
        "batch": 256,
        "state": "robot",
        "images": Images(84, ("corner2", "gripperPOV")),
        "long_tasks": _LONG,
        "evaluation": Evaluation(episodes=50),
    },
    router_warmup=20,
)
# The action expert, batch, rates and steps of the released code, dense and sparse alike 90,000;
# text and images come from the encoders here, in the place of pi0's language model.
_PAPER = _Scale(
    policy=replace(
        CONFIGS["pi0"],
        state=8,
        action=7,
        text_width=384,
        image_width=FEATURES,
        cameras=2,
        prefix_width=512,
        prefix_hidden=2048,
    ),
    parent=TrainingConfig(
        30_000, 2.5e-5, warmup=1000, log_every=100, checkpoint_every_seconds=600.0, **_SHARED
    ),
    tuning=TrainingConfig(
        90_000, 2.5e-5, warmup=1000, log_every=100, checkpoint_every_seconds=600.0, **_SHARED
    ),
    config={"source": LOCAL, "batch": 32},
    router_warmup=100,
)

# --- LIBERO-Object ------------------------------------------------------------------------------

LIBERO = "adamoe-libero"
_OBJECT = tuple(task.name for task in suite("libero-object"))
_TUNED_ON_LIBERO = ("dense", "adamoe", "vanilla-moe")
_LIBERO_SMALL = {
    "state": len(libero.STATE_NAMES["things"]),
    "action": len(libero.ACTION_NAMES),
    "horizon": 2 * libero.EXECUTE,
}
_LIBERO_SCALES = {
    "smoke": replace(
        _SMOKE,
        policy=replace(_SMOKE.policy, **_LIBERO_SMALL),
        config={
            "experiment": LIBERO,
            "tasks": ("ketchup",),
            "state": "things",
            "noise": 0.2,
            "demonstrations": 1,
            "batch": 16,
            "evaluation": Evaluation(episodes=1, execute=libero.EXECUTE),
        },
        tuned=_TUNED_ON_LIBERO,
    ),
    "cpu": replace(
        _CPU,
        policy=replace(_SMALL, **_LIBERO_SMALL),
        parent=replace(_CPU.parent, steps=5000),
        config={
            "experiment": LIBERO,
            "tasks": _OBJECT,
            "state": "things",
            "noise": 0.2,
            "demonstrations": 20,
            "evaluation": Evaluation(episodes=12, execute=libero.EXECUTE, at_once=len(_OBJECT)),
        },
        tuned=_TUNED_ON_LIBERO,
    ),
}


# --- ALOHA, two arms ----------------------------------------------------------------------------

ALOHA = "adamoe-aloha"
_TWO_ARMS = {
    "state": len(aloha.STATE_NAMES["full"]),
    "action": len(aloha.ACTION_NAMES),
    "horizon": 16,
}
_ON_ALOHA = {
    "experiment": ALOHA,
    "tasks": tuple(task.name for task in suite("aloha")),
    "noise": 0.003,  # of half of what a joint can be turned, in each step
}
_ALOHA_SCALES = {
    "smoke": replace(
        _SMOKE,
        policy=replace(_SMOKE.policy, **_TWO_ARMS),
        config={
            **_ON_ALOHA,
            "demonstrations": 1,
            "batch": 16,
            "evaluation": Evaluation(episodes=1),
        },
        tuned=_TUNED_ON_LIBERO,
    ),
    "cpu": replace(
        _CPU,
        policy=replace(_SMALL, **_TWO_ARMS),
        config={
            **_ON_ALOHA,
            "demonstrations": 20,
            "evaluation": Evaluation(episodes=100, at_once=50),
        },
        tuned=_TUNED_ON_LIBERO,
    ),
}


# --- with images --------------------------------------------------------------------------------

IMAGES = "adamoe-images"
_BESIDE_IMAGES = {"state": 4, "image_width": FEATURES, "cameras": 1}
# four easy tasks and two hard ones, whose objects the camera shows
_SEEN = ("button-press-topdown", "door-open", "drawer-open", "hammer", "push-wall", "window-open")
_IMAGES_SCALES = {
    "smoke": replace(
        _SMOKE,
        policy=replace(_SMOKE.policy, **_BESIDE_IMAGES),
        config={**_SMOKE.config, "experiment": IMAGES, "state": "robot", "images": Images()},
        tuned=("dense", "adamoe"),
    ),
    "cpu": replace(
        _CPU,
        policy=replace(_SMALL, **_BESIDE_IMAGES),
        config={
            "experiment": IMAGES,
            "tasks": _SEEN,
            "demonstrations": 20,
            "state": "robot",
            "images": Images(),
            "evaluation": Evaluation(at_once=8),  # each environment has a renderer
        },
        tuned=("dense", "adamoe"),
    ),
}


# --- the grids ----------------------------------------------------------------------------------

_SCALES: Mapping[str, Mapping[str, _Scale]] = {
    EXPERIMENT: {"smoke": _SMOKE, "cpu": _CPU, "gpu": _GPU, "paper": _PAPER},
    IMAGES: _IMAGES_SCALES,
    LIBERO: _LIBERO_SCALES,
    ALOHA: _ALOHA_SCALES,
}


def grid(part: str, profile: str) -> dict[str, RobotConfig]:
    """The arms of a part at a profile, by name, all with seed 0.

    At cpu there is ``dense-easy`` too, a dense policy alone on the easy suite, asked with
    the instructions that it was trained on. At gpu the policies
    see images and the robot's own state; at paper the action expert is pi0's, and demonstrations
    come from a folder: scores of its tasks need their simulator.

    ``adamoe-images`` has ``dense-parent``, ``dense`` and ``adamoe`` at smoke and cpu, in the sizes
    of the part, on tasks that are seen through one camera.

    ``adamoe-libero`` has ``dense-parent``, ``dense``, ``adamoe`` and ``vanilla-moe`` on
    LIBERO-Object at smoke and cpu, in the sizes of the part and the paper's way to evaluate: five
    actions carried out, then a new plan. At cpu it learns from 20 demonstrations a task, with
    noise; 12 attempts at each task are what keeps a seed at about half an hour on one core, most of
    it in the simulator.

    ``adamoe-aloha`` has the same arms at the same profiles on the task of two arms. A plan has 16
    actions there, a third of a second, and half of them are carried out; noise goes to all joints.

    Raises:
        ValueError: When the part or the profile is unknown, or the part has none of that name.
    """
    if part not in _SCALES:
        raise ValueError(unknown("part", part, _SCALES))
    name, scales = get_profile(profile).name, _SCALES[part]
    if name not in scales:
        known = ", ".join(scales)
        raise ValueError(f"{part} has no setting for {name!r}; its profiles: {known}")
    arms = scales[name].arms()
    if (part, name) == (EXPERIMENT, "cpu"):
        arms["dense-easy"] = replace(_EASY.arms()["dense-parent"], variant="dense-easy")
    return arms
