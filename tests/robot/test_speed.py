"""Times of plans: what a record holds, what is timed, and with which experts."""

from dataclasses import replace

import pytest
import torch
import yaml

from feedforward.files import checkout
from feedforward.layers.experts import collect_routing
from feedforward.profiles import load_experiment
from feedforward.robot import rollout, speed
from feedforward.robot.policy import FlowPolicy, PolicyConfig
from feedforward.robot.scores import rerouted
from feedforward.robot.speed import ARMS, PlanSpeedConfig, grid, run
from feedforward.timing import threads

DENSE = PolicyConfig(state=3, action=2, width=16, heads=2, head_width=8, hidden=24, depth=2)
SPARSE = replace(DENSE, ffn="adamoe", experts=3)


@pytest.fixture(autouse=True)
def _without_a_language_model(monkeypatch):
    width = DENSE.text_width
    states = (torch.zeros(1, 3, width), torch.ones(1, 3, dtype=torch.bool))
    monkeypatch.setattr(rollout, "token_states", lambda texts: states)


def _timed(**changes):
    given = {"batches": (1, 2), "steps": 1, "rounds": 3} | changes
    return PlanSpeedConfig("adamoe", SPARSE, DENSE, **given)


def test_a_record_holds_what_the_ledger_reads():
    record = run(_timed(), progress=False, device="cpu")
    metrics = record.metrics
    assert (record.experiment, record.variant, record.seed) == ("adamoe-speed", "adamoe", 0)
    for at in ("", " at 2"):
        ratio = metrics[f"latency{at}"] / metrics[f"dense latency{at}"]
        assert metrics[f"latency ratio{at}"] == ratio > 0
        assert metrics[f"latency{at}, p95"] >= metrics[f"latency{at}"]
    assert 1 < metrics["FLOPs over dense"] < 2  # twice the feed-forward layer, the same attention


def test_the_record_has_the_threads_that_plans_are_timed_on():
    with threads(2):
        record = run(_timed(batches=(1,)), progress=False, device="cpu")
        assert torch.get_num_threads() == 2
    assert record.provenance.threads == 1


def test_a_wider_dense_policy_is_timed_as_it_is():
    wide = PlanSpeedConfig(
        "dense-matched", replace(DENSE, hidden=48), DENSE, batches=(1,), steps=1, rounds=3
    )
    metrics = run(wide, progress=False, device="cpu").metrics
    assert metrics["latency ratio"] > 0
    assert metrics["FLOPs over dense"] > 1


@pytest.mark.parametrize("k", [1, 2])
def test_all_experts_work_in_turn(k):
    policy = FlowPolicy(replace(SPARSE, k=k)).eval()
    with collect_routing(policy) as routings, rerouted(policy, speed._in_turn):
        rollout.planning(policy, batch=3, steps=2)()
    assert len(routings) == (1 + 2) * DENSE.depth
    for routing in routings:
        counts = torch.bincount(routing.indices.flatten(), minlength=3)
        assert counts.max() - counts.min() <= 1
        assert all(len(set(row)) == k for row in routing.indices.tolist())


def test_a_plan_is_the_same_each_time():
    plan = rollout.planning(FlowPolicy(DENSE).eval(), steps=2)
    assert torch.equal(plan(), plan())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": ()}, "batches"),
        ({"batches": (0, 1)}, "batches"),
        ({"steps": 0}, "at least 1 step"),
        ({"rounds": 2}, "3 rounds"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _timed(**changes)


def test_the_reference_has_its_name_to_itself():
    with pytest.raises(ValueError, match="reference"):
        PlanSpeedConfig("dense", DENSE, DENSE)


def test_the_arms_are_those_of_the_part():
    for profile in ("smoke", "cpu", "gpu"):
        timed = grid("adamoe-speed", profile)
        assert timed.keys() >= set(ARMS)
        assert all(one.variant == name for name, one in timed.items())
        assert timed["adamoe-e8"].policy.experts == 8
        assert timed["dense-matched-total"].policy.hidden == 5 * timed["adamoe"].policy.hidden
    assert "adamoe-small" in grid("adamoe-speed", "cpu")
    assert load_experiment("adamoe-speed") is speed


@pytest.mark.parametrize(
    ("part", "profile", "message"),
    [("adamoe", "cpu", "adamoe-speed"), ("adamoe-speed", "paper", "smoke, cpu, gpu")],
)
def test_what_there_is_not(part, profile, message):
    with pytest.raises(ValueError, match=message):
        grid(part, profile)


def test_the_claims_name_what_is_timed():
    text = (checkout() / "book" / "claims.yml").read_text(encoding="utf-8")
    named = [
        one["variant"]
        for entry in yaml.safe_load(text)
        for one in entry["statistics"]
        if one.get("experiment") == "adamoe-speed"
    ]
    assert named
    assert set(named) <= grid("adamoe-speed", "cpu").keys()
