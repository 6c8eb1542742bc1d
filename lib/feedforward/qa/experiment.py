"""The arms of the robust question answering part: which readers, trained on what, for how long.

Every arm is a reader of one form that is trained on the in-domain questions, and then, except
where its name ends in ``-zero-shot``, on the few out-of-domain ones. All arms of a profile have the
same number of steps at the same batch in each stage (``mixed`` has those of both in one, and where
a name ends in ``-long`` the second has more), whatever their augmentation adds to the windows: what
is compared is what is seen, not how much. The chapters of ``book/robust-qa`` explain them.

At the profile ``cpu`` the in-domain sets are sampled, for training and for scoring, so that the
arms with three seeds fit in a few hours: as many questions of each set, one of every passage before
a second one of any, chosen by a hash of ids and passages. So every arm and seed sees the same
questions, and scores the same. The out-of-domain questions are all used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from feedforward.profiles import get_profile, unknown
from feedforward.qa.accounting import plan
from feedforward.qa.evaluation import Decoding, measure
from feedforward.qa.model import ReaderConfig
from feedforward.qa.runs import (
    EXPERIMENT,
    LOCAL,
    QuestionAnsweringConfig,
    RoutingTrace,
    load_data,
    run,
    trace_routing,
    trained_reader,
)
from feedforward.qa.stages import Augmentation, Stage
from feedforward.training import TrainingConfig

__all__ = [
    "ARCHITECTURES",
    "Augmentation",
    "Decoding",
    "QuestionAnsweringConfig",
    "RoutingTrace",
    "Stage",
    "grid",
    "load_data",
    "measure",
    "plan",
    "run",
    "trace_routing",
    "trained_reader",
]

#: The readers by the names of their arms; the dense one's arms are ``baseline`` and ``tuned``.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "dense": {"form": "dense"},
    "moe-1": {"form": "moe-head", "experts": 1, "k": 1},
    "moe-4": {"form": "moe-head", "experts": 4},
    "moe": {"form": "moe-head", "experts": 8},
    "switch": {"form": "switch", "experts": 4, "layers": (2, 4)},
    "mixture": {"form": "mixture", "experts": 3},
    "dense-matched": {"form": "dense-head", "experts": 8, "match": "total"},
}
_LONGER = ("tuned", "moe", "eda", "back-translation")
_REPEATS = 5  # answers of a reader that may answer differently each time
# of the released reader: how its gate starts, and its capacity without the factor k
_RELEASED_GATE = 1.0
_CAPACITY = {"capacity_factor": 0.625, "eval_capacity_factor": 1.0}


@dataclass(frozen=True)
class _Scale:
    """What the arms of a profile share.

    Args:
        inside: The stage on in-domain questions.
        outside: The stage on out-of-domain questions.
        config: Fields of the configuration.
        reader: Fields of every reader.
        readers: By architecture.
        translates: Whether back translation is among the arms; it needs an engine.
        engine: Which one.
        evaluations: Points at which weights may be chosen.
        longer: Steps of the second stage of the arms ``-long``; None for no such arms.
        twin: Whether ``tuned-twin`` is among the arms: ``tuned`` under another name, to be run on
            another kind of machine.
    """

    inside: Stage
    outside: Stage
    config: Mapping[str, Any] = field(default_factory=dict)
    reader: Mapping[str, Any] = field(default_factory=dict)
    readers: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: ARCHITECTURES)
    translates: bool = True
    engine: str = "apertium"
    evaluations: int = 7
    longer: int | None = None
    twin: bool = False

    def arm(self, variant: str, reader: Mapping[str, Any], *stages: Stage, **changes):
        made = ReaderConfig(**{**self.reader, **reader})
        return QuestionAnsweringConfig(variant, made, stages, **{**self.config, **changes})

    def tuned(self, variant: str, reader: Mapping[str, Any], changes=(), **outside):
        """In two stages, with changes to the configuration, and to the second stage."""
        stages = self.inside, replace(self.outside, **outside)
        return self.arm(variant, reader, *stages, **dict(changes))

    def balanced(self, variant: str, reader: Mapping[str, Any], balance: float):
        """In two stages with another weight of the balance loss."""
        stages = (replace(stage, balance=balance) for stage in (self.inside, self.outside))
        return self.arm(variant, reader, *stages)

    def choosing(self, choice: str) -> dict[str, Any]:
        """The changes of a stage that chooses among the weights at some points."""
        training = self.outside.training
        every = max(1, training.steps // self.evaluations)
        return {"choice": choice, "training": replace(training, evaluate_every=every)}


def _arms(scale: _Scale) -> list[QuestionAnsweringConfig]:
    readers = scale.readers
    dense, moe, switch = readers["dense"], readers["moe"], readers["switch"]
    often = {"repeats": _REPEATS}
    arms = [
        scale.arm("baseline" if name == "dense" else f"{name}-zero-shot", reader, scale.inside)
        for name, reader in readers.items()
    ]
    arms += [
        scale.tuned("tuned" if name == "dense" else name, reader)
        for name, reader in readers.items()
    ]
    steps = scale.inside.training.steps + scale.outside.training.steps
    together = replace(
        scale.inside, questions="all", training=replace(scale.inside.training, steps=steps)
    )
    arms += [
        scale.arm("mixed", dense, together),
        scale.tuned("tuned-held-out", dense, **scale.choosing("held-out")),
        scale.tuned("moe-frozen", moe, frozen_experts=True),
    ]
    arms += _augmented(scale, dense, moe)
    if scale.longer is not None:
        arms += _longer(scale, arms)
    if scale.twin:
        arms.append(scale.tuned("tuned-twin", dense))
    limited = {**moe, **_CAPACITY}
    padded = {**limited, "route_padding": True}
    sure = {**moe, "gate_std": _RELEASED_GATE}
    # a gate that is neither undecided nor certain after training, when second weights are small
    between = {**moe, "gate_std": 0.1}
    arms += [
        scale.balanced("moe-unbalanced", moe, 0.0),
        scale.tuned("moe-capacity", limited),
        scale.tuned("defect-one-token", dense, {"decoding": Decoding(min_tokens=2)}),
        scale.balanced("defect-balance-weight", moe, 1.0),
        scale.tuned("moe-sure", sure, often),
        scale.tuned("defect-random-expert", {**sure, "drop_second": True}, often),
        scale.tuned("defect-random-expert-0.1", {**between, "drop_second": True}, often),
        scale.tuned("defect-routed-padding", padded, {"pad_to_length": True}),
        scale.tuned("defect-identical-experts", {**switch, "noise": 0.0}),
        scale.tuned("defect-ignored-copies", dense, augmentations=(_eda(copies=8),)),
        scale.tuned("defect-chosen-on-dev", dense, **scale.choosing("reported")),
    ]
    return arms


def _eda(strength: float = 0.3, *, copies: int = 4, **options) -> Augmentation:
    return Augmentation("eda", copies=copies, strength=strength, **options)


def _augmented(scale: _Scale, dense, moe) -> list[QuestionAnsweringConfig]:
    """The second stage with copies of its questions."""
    spanish, catalan = (
        Augmentation("back-translation", language=language, engine=scale.engine)
        for language in ("es", "fr" if scale.engine == "marian" else "ca")
    )
    made = {
        "eda-0.1": (_eda(0.1),),
        "eda": (_eda(),),
        "eda-0.5": (_eda(0.5),),
        "eda-released": (_eda(released=True),),
    }
    if scale.translates:
        made |= {
            "back-translation": (spanish,),
            f"back-translation-{catalan.language}": (catalan,),
            "eda-back-translation": (_eda(), spanish),
        }
    arms = [scale.tuned(name, dense, augmentations=those) for name, those in made.items()]
    return [*arms, scale.tuned("moe-eda", moe, augmentations=(_eda(),))]


def _longer(scale: _Scale, arms: list[QuestionAnsweringConfig]) -> list[QuestionAnsweringConfig]:
    """Some of the arms with a longer second stage, in which examples come back more often."""
    made = []
    for arm in arms:
        if arm.variant in _LONGER:
            first, second = arm.stages
            second = replace(second, training=replace(second.training, steps=scale.longer))
            made.append(replace(arm, variant=f"{arm.variant}-long", stages=(first, second)))
    return made


# --- the profiles -------------------------------------------------------------------------------


def _stages(inside: Mapping[str, Any], outside: Mapping[str, Any], **shared) -> dict[str, Stage]:
    """Both stages; what does not belong to a stage belongs to its training."""
    own = ("batch", "per_set", "epochs")
    made = {}
    for name, questions, options in (
        ("inside", "in-domain", inside),
        ("outside", "out-of-domain", outside),
    ):
        options = {**shared, **options}
        stage = {key: options.pop(key) for key in own if key in options}
        made[name] = Stage(questions, TrainingConfig(**options), **stage)
    return made


# linear to zero, as in the examples of transformers
_OURS = {"schedule": "linear", "final_lr": 0.0, "warmup": 0.1, "weight_decay": 0.01}
_SMOKE = _Scale(
    **_stages(
        {"steps": 8, "lr": 2e-4, "per_set": 64},
        {"steps": 4, "lr": 1e-4, "per_set": 24},
        precision="fp32",
        batch=4,
        log_every=2,
        checkpoint_every_seconds=None,
        **_OURS,
    ),
    config={"length": 128, "stride": 32, "scored_inside": 4, "scored_outside": 2},
    translates=False,
    evaluations=2,
)
# 3,000 of some 40,000 in-domain questions, seen about once; the others all, about once
_CPU = _Scale(
    **_stages(
        {"steps": 200, "lr": 3e-4, "per_set": 1000},
        {"steps": 70, "lr": 2e-4},
        precision="bf16",
        batch=16,
        log_every=10,
        **_OURS,
    ),
    config={"source": LOCAL, "scored_inside": 250},
    longer=350,
    twin=True,
)
_GPU = _Scale(
    **_stages(
        {"steps": 2600, "lr": 1e-4},
        {"steps": 200, "lr": 5e-5},
        precision="bf16",
        batch=32,
        log_every=20,
        **_OURS,
    ),
    config={"source": LOCAL, "length": 384, "stride": 128, "batch": 128},
)
# The released recipe; the AdamW of transformers that it used decays nothing by default.
_PAPER = _Scale(
    **_stages(
        {"steps": 5 * 150_000 // 16, "epochs": 5, "per_set": 50_000},
        {"steps": 100 * 381 // 16, "epochs": 100},
        lr=3e-5,
        warmup=0,
        schedule="constant",
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=None,
        batch=16,
        log_every=100,
        checkpoint_every_seconds=600.0,
    ),
    config={"source": "hub:mrqa", "length": 384, "stride": 128, "dropout": None},
    reader={"encoder": "distilbert-base-uncased"},
    readers={
        **ARCHITECTURES,
        "moe": {"form": "moe-head", "experts": 16},
        "switch": {"form": "switch", "experts": 16, "layers": (2, 4)},
        "stacked": {"form": "stacked", "experts": 16},
        "dense-matched": {"form": "dense-head", "experts": 16, "match": "total"},
    },
    engine="marian",
)
_RELEASED = {
    **_PAPER.readers["moe"],
    **_CAPACITY,
    "gate_std": _RELEASED_GATE,
    "drop_second": True,
    "route_padding": True,
}


def _paper() -> list[QuestionAnsweringConfig]:
    """The arms at the released recipe's scale, and the recipe itself with its defects."""
    arms = {config.variant: config for config in _arms(_PAPER)}
    three = replace(
        _PAPER.inside, epochs=3, training=replace(_PAPER.inside.training, steps=3 * 150_000 // 16)
    )
    arms["baseline"] = replace(arms["baseline"], stages=(three,))
    inside, outside = (replace(stage, balance=1.0) for stage in (_PAPER.inside, _PAPER.outside))
    chosen = _PAPER.choosing("reported") | {"augmentations": (_eda(copies=8, released=True),)}
    arms["as-released"] = _PAPER.arm(
        "as-released",
        _RELEASED,
        inside,
        replace(outside, frozen_experts=True, **chosen),
        decoding=Decoding(min_tokens=2, normalize=False),
        pad_to_length=True,
    )
    return list(arms.values())


_SCALES = {"smoke": _SMOKE, "cpu": _CPU, "gpu": _GPU}


def grid(part: str, profile: str) -> dict[str, QuestionAnsweringConfig]:
    """The arms of the part at a profile, by name, all with seed 0.

    ``baseline`` is the dense reader after the first stage and ``tuned`` after both; every other
    architecture of `ARCHITECTURES` has the same two arms, ``moe-zero-shot`` and ``moe``. At smoke
    there is no back translation, which needs an engine. At `paper` the recipe is the released one:
    three epochs for the baseline, and for the others five in domain and a hundred out of it, 16
    experts, Spanish and French by Marian. ``as-released`` has the defects
    1 to 4 and 7; the fifth is one of the stacked form, the sixth of a first stage with copies. Its
    balance loss counts both choices of a token, the released one the first alone.

    Raises:
        ValueError: When the part or the profile is unknown.
    """
    if part != EXPERIMENT:
        raise ValueError(unknown("part", part, [EXPERIMENT]))
    name = get_profile(profile).name
    arms = _paper() if name == "paper" else _arms(_SCALES[name])
    return {config.variant: config for config in arms}
