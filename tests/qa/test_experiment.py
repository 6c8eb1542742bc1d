"""Runs of readers in stages: shared, resumed exactly, blind to what is reported until the end."""

import dataclasses
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from feedforward import records
from feedforward.augment.back_translation import EngineError, TranslationCache
from feedforward.augment.lexicon import Lexicon
from feedforward.files import DataError, cache_directory
from feedforward.layers.cost import count as count_cost
from feedforward.layers.experts import MoE, collect_routing
from feedforward.profiles import load_experiment
from feedforward.qa import runs, stages
from feedforward.qa.accounting import memory, plan, reader_cost, training_flops
from feedforward.qa.data import Questions
from feedforward.qa.evaluation import (
    Decoding,
    Usage,
    Watched,
    by_domain,
    chosen_by_half,
    expert_layers,
    measure,
    pad,
    pool,
)
from feedforward.qa.experiment import grid
from feedforward.qa.model import ReaderConfig, build_reader
from feedforward.qa.runs import (
    LOCAL,
    QuestionAnsweringConfig,
    load_data,
    make_reader,
    run,
    trace_routing,
    trained_reader,
)
from feedforward.qa.schema import SPLITS, Answer, Question
from feedforward.qa.stages import (
    Augmentation,
    Stage,
    expert_parameters,
    split_off,
    stage_questions,
    subsample,
)
from feedforward.training import TrainingConfig

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NAMES = ["ada", "babbage", "lovelace", "charles", "engine", "programs", "plans", "program"]
FORMS = {
    "dense": {},
    "dense-head": {"experts": 4},
    "moe-head": {"experts": 4},
    "switch": {"experts": 4, "layers": (0, 1)},
    "stacked": {"experts": 4, "depth": 2, "heads": 2},
    "mixture": {"experts": 3},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEEDFORWARD_RESULTS", str(tmp_path / "results"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, wordpiece):
    """A tiny random BERT with its tokenizer, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    return str(folder)


def some_questions(domain, count, seed, passages=5):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        rng_of_passage = np.random.default_rng([seed, number % passages])
        words = list(rng_of_passage.choice(NAMES, 14))
        at = int(rng.integers(12))
        text = " ".join(words[at : at + 2])
        start = len(" ".join(words[:at])) + (at > 0)
        context = " ".join(words)
        asked = f"who wrote {words[at - 1]}?"
        golds = (Answer(text, start),)
        found.append(Question(f"{domain}-{seed}-{number}", asked, context, golds, domain))
    return tuple(found)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sets inside, two outside."""
    splits = {}
    for split, domains, count, seed in (
        ("indomain_train", ("alpha", "beta"), 24, 1),
        ("indomain_val", ("alpha", "beta"), 8, 2),
        ("oodomain_train", ("gamma", "delta"), 10, 3),
        ("oodomain_val", ("gamma", "delta"), 9, 4),
    ):
        splits[split] = {domain: some_questions(domain, count, seed) for domain in domains}
    return Questions("made up", **splits)


@pytest.fixture(autouse=True)
def given(data, monkeypatch):
    monkeypatch.setattr(runs, "load_data", lambda source: data)
    # building the real one takes longer than the runs, and so do these two
    lexicon = Lexicon({name: [f"{name}s"] for name in NAMES})
    monkeypatch.setattr(stages, "wordnet", lambda senses: lexicon)
    monkeypatch.setattr(records, "_git", lambda *arguments: None)
    monkeypatch.setattr(records, "_run_fingerprint", lambda run: "code")


def training(steps, **options):
    settings = {
        "lr": 1e-2, "precision": "fp32", "log_every": 2, "warmup": 0,
        "checkpoint_every_seconds": None,
    }  # fmt: skip
    return TrainingConfig(steps=steps, **settings | options)


INSIDE = Stage("in-domain", training(6), batch=4)
OUTSIDE = Stage("out-of-domain", training(4), batch=4)


@pytest.fixture
def config(encoder):
    return QuestionAnsweringConfig(
        "moe",
        ReaderConfig(encoder, "moe-head", experts=4),
        (INSIDE, OUTSIDE),
        length=32,
        stride=8,
        scored_inside=6,
        batch=8,
    )


def arm(config, variant="other", *, outside=None, reader=None, **changes):
    made = config.stages
    if outside is not None:
        made = (made[0], replace(made[1], **outside))
    reader = replace(config.reader, **(reader or {}))
    return replace(config, variant=variant, stages=made, reader=reader, **changes)


def quiet(config, **options):
    return run(config, progress=False, device="cpu", **options)


def plain(record):
    """What must not depend on the machine's speed."""
    metrics = {k: v for k, v in record.metrics.items() if k != "training seconds"}
    return metrics, record.curves


def weights_of(config):
    reader, *_ = trained_reader(config, progress=False, device="cpu")
    return {name: p.detach().clone() for name, p in reader.named_parameters()}


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_measures_what_it_says(config, data):
    record = quiet(config)
    m = record.metrics
    assert (record.experiment, record.variant, record.seed) == ("robust-qa", "moe", 0)
    for place, split, count in (
        ("in-domain", "indomain_val", 12),
        ("out-of-domain", "oodomain_val", 18),
    ):
        ids = {question.id for question in data.pooled(split)}
        for metric in ("F1", "EM"):
            items = m["items"][f"{place} {metric}"]
            assert len(items) == count
            assert items.keys() <= ids
            assert m[f"{place} {metric}"] == pytest.approx(np.mean([*items.values()]), abs=1e-3)
        own = [m[f"{domain} F1"] for domain in data[split]]
        assert m[f"{place} F1"] == pytest.approx(np.mean(own))  # sets of one size
    assert m["range of out-of-domain F1"] == 0
    assert m["expert layers"] == ["head"]
    assert set(m["load"]) == {"all", "alpha", "beta", "gamma", "delta"}
    for shares in m["load"].values():
        assert np.allclose(np.sum(shares, axis=1), 1, atol=1e-5)
    assert m["largest share"] == pytest.approx(2 * max(m["load"]["all"][0]), abs=1e-5)  # k = 2
    assert 0 < m["routing entropy"] < 1
    assert "dropped share" not in m
    reader = build_reader(config.reader)
    assert m["parameters"] == sum(p.numel() for p in reader.parameters())
    assert m["active parameters"] < m["parameters"]
    assert [stage["steps"] for stage in m["stages"]] == [6, 4]
    assert [stage["questions"] for stage in m["stages"]] == [48, 20]
    tokens = [stage["tokens"] for stage in m["stages"]]
    assert 0 < sum(tokens) <= 10 * 4 * 32
    assert record.curves["stage 1: loss"]["step"] == [2, 4, 6]
    assert record.curves["stage 2: loss"]["step"] == [2, 4]
    first = record.curves["stage 1: load, layer 0"]
    assert np.allclose(sum(np.array(first[f"expert {e}"]) for e in range(4)), 1, atol=1e-4)
    assert json.dumps(record.metrics)


@pytest.mark.parametrize("form", FORMS)
def test_readers_of_all_forms_run(config, encoder, form):
    reader = ReaderConfig(encoder, form, **FORMS[form])
    record = quiet(replace(config, reader=reader, stages=(INSIDE,)))
    layers = {
        "moe-head": ["head"],
        "switch": ["encoder layer 0", "encoder layer 1"],
        "stacked": ["stacked layer 0", "stacked layer 1"],
        "mixture": ["gate"],
    }
    assert record.metrics.get("expert layers") == layers.get(form)
    if form == "mixture":
        assert np.isclose(sum(record.metrics["load"]["all"][0]), 1, atol=1e-5)
        assert 1 / 3 <= record.metrics["largest share"] < 1
    # the accounting makes nothing and agrees
    cost = reader_cost(reader, config.length)
    assert cost.parameters == record.metrics["parameters"]
    assert cost.active_parameters == record.metrics["active parameters"]


def test_training_flops_are_the_accounting_s_for_windows_of_full_length(config):
    padded = replace(config, pad_to_length=True)
    counted = quiet(padded).metrics["training FLOPs"]
    tokens = sum(stage.training.steps * stage.batch for stage in config.stages) * config.length
    # the last batch of an epoch may be smaller
    made = sum(stage["tokens"] for stage in quiet(padded).metrics["stages"])
    assert counted == pytest.approx(training_flops(padded) * made / tokens, rel=1e-6)


def test_a_killed_run_ends_with_the_same_numbers(config, monkeypatch, tmp_path):
    chosen = {"choice": "held-out", "training": training(6, evaluate_every=2)}
    config = arm(config, outside=chosen)
    whole = quiet(config)
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "another"))
    often = replace(chosen["training"], checkpoint_every_steps=3)
    config = arm(config, outside={"training": often})
    loss, calls = runs.reading_loss, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 6 + 5:
            raise KeyboardInterrupt
        return loss(*arguments, **options)

    monkeypatch.setattr(runs, "reading_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        quiet(config)
    assert not list(cache_directory().rglob("record.json"))
    continued = quiet(config)
    assert len(calls) == 11 + 3  # steps 4 to 6 of the second stage
    assert plain(continued) == plain(whole)
    left = {path.name for path in cache_directory().rglob("*") if path.is_dir()}
    assert not left & {"checkpoints", "choice"}  # weights stay


def test_a_run_that_ended_is_loaded(config, monkeypatch):
    first = quiet(config)
    monkeypatch.setattr(runs, "train", None)
    assert quiet(config) == first
    with pytest.raises(TypeError):
        quiet(replace(config, seed=1))


# --- stages that are shared -----------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """What was trained, in order."""
    made, real = [], runs.train

    def counted(*arguments, **options):
        made.append(options["description"])
        return real(*arguments, **options)

    monkeypatch.setattr(runs, "train", counted)
    return made


def test_runs_that_begin_alike_share_the_first_stage(config, trained):
    zero_shot = quiet(replace(config, variant="zero-shot", stages=(INSIDE,)))
    quiet(arm(config, "tuned"))
    quiet(arm(config, "balanced", outside={"balance": 1.0}))
    # neither what may be an answer nor what is scored changes the weights
    one = quiet(arm(config, "one-token", decoding=Decoding(min_tokens=2), scored_inside=3))
    assert len(one.metrics["items"]["in-domain F1"]) == 6
    assert trained == [
        "zero-shot, seed 0, stage 1",
        "tuned, seed 0, stage 2",
        "balanced, seed 0, stage 2",
    ]
    quiet(arm(config, "seeded", seed=1))
    quiet(arm(config, "longer", length=40))
    assert len(trained) == 3 + 4
    assert zero_shot.metrics["stages"] == one.metrics["stages"][:1]


def test_a_shared_stage_gives_the_numbers_of_one_s_own(config, monkeypatch, tmp_path):
    quiet(replace(config, variant="first", stages=(INSIDE,)))
    shared = quiet(config)
    monkeypatch.setenv("FEEDFORWARD_CACHE", str(tmp_path / "another"))
    assert plain(quiet(config)) == plain(shared)


# --- files of one's own ---------------------------------------------------------------------------


def write_folder(place, data):
    """Questions as a folder of SQuAD files."""
    for split in SPLITS:
        for domain, questions in data[split].items():
            paragraphs = [
                {
                    "context": q.context,
                    "qas": [
                        {
                            "id": q.id,
                            "question": q.question,
                            "answers": [
                                {"text": a.text, "answer_start": a.start} for a in q.answers
                            ],
                        }
                    ],
                }
                for q in questions
            ]
            file = place / split / f"{domain}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


@pytest.mark.parametrize("named", [True, False])
def test_other_data_under_the_same_name_are_another_run(
    config, data, monkeypatch, tmp_path, trained, named
):
    monkeypatch.setattr(runs, "load_data", load_data)
    fewer = {domain: own[2:] for domain, own in data.oodomain_val.items()}
    place = tmp_path / "mine"
    contents = {"all": data, "some": replace(data, oodomain_val=fewer)}
    for name, content in contents.items():
        write_folder(tmp_path / name / "qa", content)
    one = replace(config, source=LOCAL if named else str(place / "qa"))

    def answered(name):
        if named:
            monkeypatch.setenv(LOCAL, str(tmp_path / name))
        else:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(tmp_path / name, place)
        record = records.cached(run, one, profile="cpu", progress=False, device="cpu")
        assert record == replace(quiet(one), profile="cpu")
        assert record.metrics["data"] == runs.load_data(one.source).sha256[:16]
        return len(record.metrics["items"]["out-of-domain F1"])

    assert answered("all") == 18
    assert answered("some") == 14
    assert len(trained) == 4
    assert answered("all") == 18
    assert len(trained) == 4
    # what is recorded is not taken for a run on other data, and can be loaded without any
    kept = replace(quiet(one), profile="cpu")
    kept.save(records.result_path(kept.experiment, "cpu", kept.variant, kept.seed))
    assert answered("some") == 14
    assert answered("all") == 18
    if named:
        monkeypatch.delenv(LOCAL)
        assert records.cached(run, one, profile="cpu", progress=False) == kept
        monkeypatch.setenv(LOCAL, str(tmp_path / "all"))
    assert trained_reader(one, progress=False, device="cpu")[2].oodomain_val == data.oodomain_val


def test_other_weights_in_the_same_folder_are_another_run(config, tmp_path, trained):
    place = tmp_path / "mine"
    shutil.copytree(config.reader.encoder, place)
    one = replace(config, reader=replace(config.reader, encoder=str(place)))
    before = quiet(one)
    first = weights_of(one)
    assert len(trained) == 2
    model = transformers.AutoModel.from_pretrained(place)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(3)
    model.save_pretrained(place)
    after = quiet(one)
    assert len(trained) == 4
    assert after.key == before.key
    assert after.metrics["encoder"] != before.metrics["encoder"]
    name = "encoder.embeddings.word_embeddings.weight"
    assert weights_of(one)[name].abs().sum() > 2 * first[name].abs().sum()
    shutil.rmtree(place)
    shutil.copytree(config.reader.encoder, place)
    assert quiet(one) == before
    assert len(trained) == 4


def test_a_run_on_what_comes_with_the_book_reads_no_folder(monkeypatch):
    monkeypatch.setattr(runs, "load_data", None)
    monkeypatch.delenv(LOCAL, raising=False)
    assert all(one.inputs() == {} for one in grid("robust-qa", "smoke").values())
    assert all(one.inputs() == {} for one in grid("robust-qa", "paper").values())


def test_the_trained_reader_is_the_measured_one(config, data, trained):
    record = quiet(config)
    reader, tokenizer, questions, again = trained_reader(config, progress=False, device="cpu")
    assert len(trained) == 2
    assert again == record
    assert questions is data
    assert not reader.training
    windows = by_domain(data.pooled("oodomain_val"), tokenizer, length=32, stride=8)
    measured = measure(reader, windows, batch=8)
    assert measured.items.score().f1 == pytest.approx(record.metrics["out-of-domain F1"])


def test_weights_that_are_damaged_say_so(config):
    quiet(config)
    for file in cache_directory().rglob("model.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="Delete it to train again"):
        weights_of(config)


def test_several_processes_are_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--shard"):
        quiet(config)


# --- what a stage does ----------------------------------------------------------------------------


def test_frozen_experts_do_not_move(config):
    before = weights_of(replace(config, stages=(INSIDE,)))
    frozen = weights_of(arm(config, outside={"frozen_experts": True}))
    free = weights_of(config)
    still = {name for name in before if torch.equal(before[name], frozen[name])}
    assert still == {"head.moe.w_in", "head.moe.w_out"}
    assert not torch.equal(before["head.moe.router.gate"], frozen["head.moe.router.gate"])
    assert not any(torch.equal(before[name], free[name]) for name in still)
    mixture = build_reader(ReaderConfig(config.reader.encoder, "mixture", experts=2))
    moving = {id(p) for p in mixture.parameters()} - {id(p) for p in expert_parameters(mixture)}
    assert moving == {id(mixture.gate.weight)}
    with pytest.raises(ValueError, match="has none"):
        arm(
            replace(config, reader=ReaderConfig(config.reader.encoder)),
            outside={"frozen_experts": True},
        )


class Sealed(dict):
    """A split that may not be read before training is over."""

    open = False

    def values(self):
        assert Sealed.open, "the questions that are reported were read"
        return super().values()

    items = values


@pytest.mark.parametrize("choice", ["last", "held-out"])
def test_nothing_is_chosen_by_what_is_reported(config, data, monkeypatch, choice):
    sealed = replace(
        data, oodomain_val=Sealed(data.oodomain_val), indomain_val=Sealed(data.indomain_val)
    )
    object.__setattr__(sealed, "sha256", data.sha256)
    monkeypatch.setattr(runs, "load_data", lambda source: sealed)
    monkeypatch.setattr(Sealed, "open", False)

    def unsealed(function, monkeypatch=monkeypatch):
        def opened(*arguments):
            with monkeypatch.context() as patch:
                patch.setattr(Sealed, "open", True)
                return function(*arguments)

        return opened

    # before training they are only counted
    for name in ("_check_questions", "_measured"):
        monkeypatch.setattr(runs, name, unsealed(getattr(runs, name)))
    chosen = {"choice": choice, "training": training(4, evaluate_every=2)}
    record = quiet(arm(config, outside=chosen))
    if choice == "held-out":
        stage = record.metrics["stages"][1]
        assert stage["held out"] > 0
        assert stage["held out"] + stage["questions"] == 20
        assert stage["chosen step"] in (2, 4)


def test_choosing_by_what_is_reported_is_seen_in_both_halves(config):
    chosen = {"choice": "reported", "training": training(6, evaluate_every=1)}
    reported = quiet(arm(config, outside=chosen)).metrics
    curve = quiet(arm(config, outside=chosen)).curves["stage 2: F1 that chooses"]["value"]
    assert reported["out-of-domain F1"] == pytest.approx(max(curve), rel=1e-4)
    assert reported["F1 on the choosing half"] >= reported["F1 on the other half"]
    assert "F1 on the choosing half" not in quiet(config).metrics


def test_halves_choose_for_themselves():
    # two points, of which each is right on the questions where the other is not
    points = [np.array([100.0, 0, 100, 0]), np.array([0.0, 100, 0, 100])]
    choosing, other = chosen_by_half(points, ["a", "a", "b", "b"])
    assert choosing + other == pytest.approx(100)  # a point has 50 on all
    assert choosing > 60
    same = [np.array([50.0, 50, 50, 50])] * 2
    assert chosen_by_half(same, list("aabb")) == (50, 50)


def test_choosing_keeps_the_best_weights(config):
    chosen = {"choice": "held-out", "training": training(8, evaluate_every=1, lr=0.1)}
    record = quiet(arm(config, outside=chosen))
    curve = record.curves["stage 2: F1 that chooses"]
    best = curve["step"][int(np.argmax(curve["value"]))]
    assert record.metrics["stages"][1]["chosen step"] == best
    shorter = {"choice": "last", "training": training(best, lr=0.1, schedule="constant")}
    long = {
        "choice": "held-out",
        "training": training(8, evaluate_every=1, lr=0.1, schedule="constant"),
    }
    longer = arm(config, "longer", outside=long)
    best = quiet(longer).metrics["stages"][1]["chosen step"]
    shorter["training"] = replace(shorter["training"], steps=best)
    # what was held out is not trained on: the same questions for the shorter one
    kept = runs.stage_questions

    def without(stage, *rest):
        if stage.questions == "out-of-domain":
            stage = replace(stage, choice="held-out", training=long["training"])
        return kept(stage, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "stage_questions", without)
        expected = weights_of(arm(config, "shorter", outside=shorter))
    actual = weights_of(longer)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_experts_dropped_at_random_answer_differently_each_time(config):
    random = arm(config, reader={"drop_second": True, "experts": 4}, repeats=3)
    assert quiet(random).metrics["range of out-of-domain F1"] >= 0
    plain_ = quiet(replace(config, repeats=3)).metrics
    assert plain_["range of out-of-domain F1"] == 0
    assert not any("without dropping" in name for name in plain_)
    reader = make_reader(random)
    with torch.no_grad():
        reader.head.moe.router.gate.mul_(30)  # second experts with little weight
    data_ = runs.load_data("")
    windows = by_domain(
        data_.pooled("oodomain_val"),
        runs.load_tokenizer(config.reader.encoder),
        length=32,
        stride=8,
    )
    torch.manual_seed(0)
    tries = [measure(reader, windows).usage["gamma"][0].dropped for _ in range(3)]
    assert len(set(tries)) > 1


def test_the_same_weights_also_answer_without_dropping(config, monkeypatch):
    seen, real = [], runs.measure

    def noted(reader, *arguments, **options):
        seen.append(real(reader, *arguments, **options))
        return seen[-1]

    monkeypatch.setattr(runs, "measure", noted)
    options = {"drop_second": True, "experts": 4, "gate_std": 0.6}
    metrics = quiet(arm(config, reader=options, repeats=2)).metrics
    dropped = [sum(layer.dropped for (layer,) in one.usage.values()) for one in seen]
    inside, *outside = dropped
    assert inside > 0
    assert min(outside[:2]) > 0
    assert outside[2:] == [0, 0]
    usages = [pool(one.usage.values())[0] for one in seen]
    assert usages[-1].lost == pytest.approx(0, abs=1e-3)
    lost = [usage.lost / usage.tokens for usage in usages[1:3]]
    assert metrics["dropped weight"] == pytest.approx(np.mean(lost))
    assert 0 < metrics["dropped weight"] < 0.2
    scores = [one.items.score() for one in seen]
    assert metrics["range of out-of-domain F1 without dropping"] == 0
    assert metrics["out-of-domain F1 without dropping"] == scores[-1].f1
    assert metrics["out-of-domain EM without dropping"] == scores[-1].em
    assert metrics["out-of-domain F1"] == pytest.approx((scores[1].f1 + scores[2].f1) / 2)


def test_answers_at_random_do_not_depend_on_what_ran_before(config, monkeypatch):
    drawn, real = [], runs.measure

    def noted(*arguments, **options):
        drawn.append(torch.get_rng_state()[:16].tolist())
        return real(*arguments, **options)

    monkeypatch.setattr(runs, "measure", noted)
    random = arm(config, reader={"drop_second": True, "gate_std": 1.0}, repeats=2)
    first = quiet(random)
    (file,) = cache_directory().rglob("record.json")
    file.unlink()
    torch.manual_seed(123)  # the stages are loaded, and no training leaves its random numbers
    assert plain(quiet(random)) == plain(first)
    assert len(drawn) == 2 * 5
    assert drawn[:5] == drawn[5:]


def test_padding_that_is_routed_takes_the_capacity_of_real_tokens(config):
    limits = {"capacity_factor": 0.6, "eval_capacity_factor": 0.6}
    kept = quiet(arm(config, "capacity", reader=limits)).metrics
    routed = arm(config, "padded", reader=limits | {"route_padding": True}, pad_to_length=True)
    padded = quiet(routed).metrics
    assert kept["dropped share"] == kept["dropped share without padding"] > 0
    assert 0 <= padded["dropped share without padding"] < padded["dropped share"] < 1
    for metrics in (kept, padded):
        ((dropped, crowded),) = metrics["dropped share by domain"]["all"]
        assert dropped == pytest.approx(metrics["dropped share"], abs=1e-6)
        assert crowded == pytest.approx(metrics["dropped share without padding"], abs=1e-6)


@pytest.mark.parametrize("factor", [0.3, 0.6, 1.0])
def test_what_padding_takes_is_what_the_layer_would_serve_without_it(config, data, factor):
    limits = {"capacity_factor": 2.0, "eval_capacity_factor": factor, "route_padding": True}
    reader = make_reader(arm(config, reader=limits))
    tokenizer = runs.load_tokenizer(config.reader.encoder)
    windows = by_domain(data.pooled("oodomain_val"), tokenizer, length=32, stride=8)["gamma"]
    batch = pad(windows.batch(range(8)), 48, tokenizer.pad_token_id)
    inputs = {name: value for name, value in batch.items() if "positions" not in name}
    watched = Watched(reader, bf16=False)
    with torch.no_grad():
        watched(**inputs)
        real = inputs["attention_mask"].bool()
        # the same number of places, counted in real tokens
        moe = reader.head.moe
        places = math.ceil(factor * real.numel() * moe.router.k / moe.experts)
        moe.capacity_factor = (places - 0.5) * moe.experts / moe.router.k / int(real.sum())
        reader.route_padding = False
        with collect_routing(reader) as routings:
            reader(**inputs)
    (usage,) = watched.usage
    assert usage.crowded == int((routings[0].weights[real.flatten()] == 0).sum())
    assert usage.crowded <= usage.dropped


def test_steps_are_equal_whatever_augmentation_adds(config):
    eda = (Augmentation("eda", copies=3, strength=0.5),)
    plain_, more = quiet(config), quiet(arm(config, "eda", outside={"augmentations": eda}))
    stages_ = [record.metrics["stages"][1] for record in (plain_, more)]
    assert stages_[0]["steps"] == stages_[1]["steps"] == 4
    assert stages_[1]["questions"] == 4 * stages_[0]["questions"]
    (report,) = stages_[1]["augmentation"]
    assert report["copies"] == 60
    assert report["lost"] == 0


def test_epochs_count_the_windows_of_questions_and_not_of_copies(config):
    eda = (Augmentation("eda", copies=3),)
    twice = quiet(arm(config, outside={"epochs": 2, "augmentations": eda}))
    assert twice.metrics["stages"][1]["steps"] == 2 * 5  # 20 windows in batches of 4


# --- questions ------------------------------------------------------------------------------------


def test_a_sample_is_spread_over_the_passages(data):
    questions = data.indomain_train["alpha"]
    assert len({q.context for q in questions}) == 5
    some = subsample(questions, 7)
    assert len(some) == len(set(some)) == 7
    counts = [sum(q.context == c for q in some) for c in {q.context for q in some}]
    assert sorted(counts) == [1, 1, 1, 2, 2]
    assert subsample(tuple(reversed(questions)), 7) == some
    assert set(subsample(questions, None)) == set(questions)
    assert subsample(questions, 3) == some[:3]


def test_what_is_held_out_shares_no_passage(data):
    train, held = split_off(data.oodomain_train["gamma"], 0.2)
    assert len(train) + len(held) == 10
    assert not {q.context for q in train} & {q.context for q in held}
    assert len({q.context for q in held}) == 1
    _, most = split_off(data.oodomain_train["gamma"], 0.99)
    assert len({q.context for q in most}) == 4
    with pytest.raises(DataError, match="one passage"):
        split_off(data.oodomain_train["gamma"][:1], 0.2)


def test_copies_are_of_training_questions_outside_alone(data):
    stage = Stage(
        "all", training(4, evaluate_every=2), choice="held-out", per_set=8,
        augmentations=(Augmentation("eda", copies=2),),
    )  # fmt: skip
    drawn = stage_questions(stage, data, 0)
    copies = [q for q in drawn.train if "#" in q.id]
    assert {q.domain for q in copies} == {"gamma", "delta"}
    held = {q.id for q in drawn.held_out}
    assert held
    assert not held & {q.id.split("#")[0] for q in drawn.train}
    outside = [q for q in drawn.plain if q.domain in ("gamma", "delta")]
    assert len(copies) == 2 * len(outside)
    assert stage_questions(stage, data, 0) == drawn
    assert len(drawn.train) == len(drawn.plain) + len(copies)


def test_the_released_form_replaces_the_questions(data):
    stage = replace(OUTSIDE, augmentations=(Augmentation("eda", copies=2, released=True),))
    drawn = stage_questions(stage, data, 0)
    assert {q.id[-2:] for q in drawn.train} == {"#0", "#1", "#2"}
    assert len(drawn.plain) == 20


def test_back_translation_joins_eda(data, monkeypatch):
    monkeypatch.setattr(
        TranslationCache, "translate", lambda self, engine, texts: {t: t for t in texts}
    )
    both = (Augmentation("eda", copies=2), Augmentation("back-translation", language="ca"))
    drawn = stage_questions(replace(OUTSIDE, augmentations=both), data, 0)
    assert len(drawn.train) == 20 * (1 + 2 + 1)
    assert [report["copies"] for report in drawn.reports] == [40, 20]
    names = [Augmentation("back-translation", language="fr", engine="marian")._engine().name]
    names.append(both[1]._engine().name)
    assert names == [
        "marian Helsinki-NLP/opus-mt-en-fr > marian Helsinki-NLP/opus-mt-fr-en",
        "apertium eng-cat > apertium cat-eng",
    ]


def test_a_stage_without_questions_says_so(data):
    empty = replace(data, oodomain_train={})
    with pytest.raises(DataError, match="no out-of-domain questions"):
        stage_questions(OUTSIDE, empty, 0)


# --- routing, token by token ----------------------------------------------------------------------


def test_routing_is_traced_token_by_token(config, data):
    switch = replace(
        config, reader=ReaderConfig(config.reader.encoder, **{"form": "switch"} | FORMS["switch"])
    )
    reader = make_reader(switch)
    tokenizer = runs.load_tokenizer(config.reader.encoder)
    question = data.oodomain_val["gamma"][0]
    trace = trace_routing(reader, tokenizer, question, length=32, stride=8)
    assert trace.layers == ("encoder layer 0", "encoder layer 1")
    count = len(trace.tokens)
    assert (trace.tokens[0], trace.tokens[-1]) == ("[CLS]", "[SEP]")
    assert trace.indices.shape == trace.weights.shape == (2, count, 1)
    assert trace.probabilities.shape == (2, count, 4)
    chosen = trace.probabilities.gather(-1, trace.indices)[..., 0]
    assert torch.equal(chosen, trace.probabilities.max(-1).values)
    passage = "".join(trace.tokens[trace.passage]).replace("##", "")
    assert passage == question.context.replace(" ", "")[: len(passage)]
    assert trace.domain == "gamma"
    for form in ("dense", "mixture"):
        other = build_reader(ReaderConfig(config.reader.encoder, form, **FORMS[form]))
        with pytest.raises(ValueError, match="no experts for single tokens"):
            trace_routing(other, tokenizer, question)


def test_usage_counts_real_tokens():
    usage = Usage(2)
    usage.add(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([3, 1]), dropped=1)
    assert usage.load == [0.75, 0.25]
    assert usage.largest_share == 1.5  # two choices a token
    assert usage.routing_entropy == pytest.approx(0.5)
    assert usage.dropped_share == 0.25
    both = usage + usage
    assert (both.tokens, both.dropped, both.load) == (4, 2, usage.load)
    assert Usage(1).routing_entropy == 0


# --- the arms -------------------------------------------------------------------------------------


def test_every_arm_that_the_claims_need_is_in_the_grid():
    from feedforward.claims import load_claims

    needed = {
        one
        for claim in load_claims()
        for statistic in claim.statistics
        if statistic.experiment == "robust-qa"
        for one in statistic.arms
    }
    assert needed
    for profile in ("cpu", "gpu", "paper"):
        assert needed <= grid("robust-qa", profile).keys()
    experiment = load_experiment("robust-qa")
    assert experiment.grid is grid


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_the_arms_of_a_profile_have_equal_steps(profile):
    arms = {
        name: arm for name, arm in grid("robust-qa", profile).items() if not name.endswith("-long")
    }
    shapes = {
        tuple((s.training.steps, s.batch, s.training.lr) for s in a.stages) for a in arms.values()
    }
    two = next(shape for shape in shapes if len(shape) == 2)
    assert shapes - {two, two[:1]} == {((two[0][0] + two[1][0], two[0][1], two[0][2]),)}
    firsts = {(a.reader, a.stages[0]) for name, a in arms.items() if name != "mixed"}
    # every architecture, what changes both stages, and nothing else begins differently
    assert len(firsts) == 7 + 8
    assert len({a.source for a in arms.values()}) == 1


def test_a_longer_arm_differs_in_the_steps_of_its_second_stage_alone():
    arms = grid("robust-qa", "cpu")
    longer = {name: arm for name, arm in arms.items() if name.endswith("-long")}
    assert set(longer) == {"tuned-long", "moe-long", "eda-long", "back-translation-long"}
    steps = {arm.stages[1].training.steps for arm in longer.values()}
    short = arms["tuned"].stages[1].training
    assert steps == {5 * short.steps}
    for name, arm in longer.items():
        first, second = arm.stages
        again = replace(second, training=replace(second.training, steps=short.steps))
        of = name.removesuffix("-long")
        assert replace(arm, variant=of, stages=(first, again)) == arms[of]
    assert not any(name.endswith("-long") for name in grid("robust-qa", "gpu"))


def test_the_twin_differs_in_its_name_alone():
    arms = grid("robust-qa", "cpu")
    assert replace(arms["tuned-twin"], variant="tuned") == arms["tuned"]
    assert "tuned-twin" not in grid("robust-qa", "gpu")


def test_a_defect_differs_from_its_reference_in_that_alone():
    arms = grid("robust-qa", "cpu")

    def differences(one, other):
        a, b = (dataclasses.asdict(arms[name]) for name in (one, other))
        found = {k for k in a if a[k] != b[k]} - {"variant", "reader", "stages"}
        found |= {k for k in a["reader"] if a["reader"][k] != b["reader"][k]}
        for x, y in zip(a["stages"], b["stages"], strict=True):
            found |= {k for k in x if x[k] != y[k]}
        return found

    assert differences("defect-one-token", "tuned") == {"decoding"}
    assert differences("defect-balance-weight", "moe") == {"balance"}
    assert differences("defect-random-expert", "moe-sure") == {"drop_second"}
    assert differences("moe-sure", "moe") == {"gate_std", "repeats"}
    assert differences("defect-random-expert-0.1", "defect-random-expert") == {"gate_std"}
    assert differences("defect-routed-padding", "moe-capacity") == {
        "route_padding",
        "pad_to_length",
    }
    assert differences("defect-identical-experts", "switch") == {"noise"}
    assert differences("defect-ignored-copies", "eda") == {"augmentations"}
    assert differences("defect-chosen-on-dev", "tuned-held-out") == {"choice"}


def test_the_plan_of_the_paper_is_the_released_recipe():
    arms = grid("robust-qa", "paper")
    baseline = arms["baseline"]
    assert (baseline.length, baseline.stride, baseline.source) == (384, 128, "hub:mrqa")
    (stage,) = baseline.stages
    assert (stage.epochs, stage.batch, stage.per_set) == (3, 16, 50_000)
    assert (stage.training.lr, stage.training.schedule) == (3e-5, "constant")
    released = arms["as-released"]
    assert released.decoding == Decoding(min_tokens=2, normalize=False)
    assert released.stages[1].choice == "reported"
    shown = plan("paper", arms.values())
    rows = {row[0]: row for row in shown.rows}
    assert rows["baseline"][1] == "66.4"  # million parameters of DistilBERT
    assert rows["moe"][1] == f"{(66_362_880 + 16 * 2 * 768 * 3072 + 16 * 768 + 1538) / 1e6:.1f}"
    assert shown.commands
    assert "as-released" in shown.commands[0]
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert memory(arms["moe"]) > memory(baseline)
    assert "GiB" not in plan("cpu", [replace(baseline)]).columns


SMALL = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=8),
    "albert": transformers.AlbertConfig(**SMALL, embedding_size=8),
    "albert-2": transformers.AlbertConfig(**SMALL, embedding_size=8, num_hidden_groups=2),
    "deberta": transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type="c2p"),
    "modernbert": transformers.ModernBertConfig(**SMALL, pad_token_id=0),
    "mpnet": transformers.MPNetConfig(**SMALL),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_on_any_encoder_are_counted_as_they_are(family, tmp_path):
    transformers.AutoModel.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    for form, options in FORMS.items():
        reader = ReaderConfig(str(tmp_path), form, **options)
        if form == "switch" and family.startswith("albert"):
            for make in (build_reader, lambda reader: reader_cost(reader, 32)):
                with pytest.raises(ValueError, match="the 4 layers of AlbertModel share"):
                    make(reader)
            continue
        made, planned = count_cost(build_reader(reader)), reader_cost(reader, 32)
        assert planned.parameters == made.parameters, form
        assert planned.active_parameters == made.active_parameters, form


@pytest.mark.parametrize("family", ["electra", "albert", "albert-2", "modernbert", "mpnet"])
def test_planned_flops_are_those_of_a_forward_pass(family, tmp_path):
    transformers.AutoModel.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    planned = reader_cost(ReaderConfig(str(tmp_path)), 32)
    reader = build_reader(ReaderConfig(str(tmp_path)))
    # the counter does not know the fused attention of processors
    eager = runs._attention(reader, "eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), eager:
        reader(torch.ones(1, 32, dtype=torch.long))
    assert planned.flops == counter.get_total_flops() / 32


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": "inside"}, "no questions 'inside'"),
        ({"choice": "first"}, "no choice 'first'"),
        ({"choice": "held-out"}, "evaluate_every"),
        ({"batch": 0}, "batch is 0"),
        ({"per_set": 0}, "per_set is 0"),
        ({"balance": -1.0}, "balance is -1"),
        ({"held_out": 1.0}, "held_out is 1"),
        ({"questions": "in-domain", "augmentations": (Augmentation("eda"),)}, "has none"),
    ],
)
def test_stages_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(OUTSIDE, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "crop"}, "no kind 'crop'"),
        ({"kind": "eda", "copies": 0}, "copies is 0"),
        ({"kind": "eda", "strength": 1.5}, "strength 1.5"),
        ({"kind": "back-translation", "copies": 2}, "all the same"),
        ({"kind": "back-translation", "language": "fr"}, "language of Apertium"),
    ],
)
def test_augmentations_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_windows_that_are_longer_than_the_encoder_reads(config, data, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    with pytest.raises(ValueError, match="has 65 tokens, and BertModel positions for 64; set its"):
        quiet(replace(config, length=65))
    tokenizer = runs.load_tokenizer(config.reader.encoder)
    question = replace(data.pooled("oodomain_val")[0], context="ada wrote plans " * 40, answers=())
    windows = by_domain([question], tokenizer, length=80, stride=8)
    for reader in (make_reader(config), make_reader(arm(config, reader={"form": "mixture"}))):
        with pytest.raises(ValueError, match="has 80 tokens, and BertModel positions for 64"):
            measure(reader, windows)
        with pytest.raises(ValueError, match="has 65 tokens"):
            measure(reader, by_domain([question], tokenizer, length=32, stride=8), padded=(65, 0))
    with pytest.raises(ValueError, match="has 80 tokens"):
        trace_routing(make_reader(config), tokenizer, question, length=80, stride=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ()}, "stages is empty"),
        ({"repeats": 0}, "repeats is 0"),
        ({"scored_inside": 0}, "scored_inside is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
    ],
)
def test_runs_that_cannot_be_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)
    with pytest.raises(ValueError, match="from 3 to 2 tokens"):
        Decoding(3, 2)
    with pytest.raises(ValueError, match="no part"):
        grid("robustqa", "cpu")


@pytest.mark.parametrize("split", ["indomain_val", "oodomain_val"])
def test_what_cannot_be_scored_is_told_before_training(config, data, monkeypatch, trained, split):
    asked, *_ = data[split].values()
    unanswered = {"gamma": tuple(replace(question, answers=()) for question in asked)}
    for own, message in (
        ({}, f"has no questions in {split}, which a run reports"),
        (unanswered, rf"of the \d questions of {split} have no accepted answer"),
    ):
        monkeypatch.setattr(runs, "load_data", lambda _, own=own: replace(data, **{split: own}))
        with pytest.raises(DataError, match=message):
            quiet(config)
    assert not trained


def test_a_missing_engine_is_told_before_training(config, monkeypatch, trained):
    monkeypatch.setenv("PATH", "/nowhere")
    translated = arm(config, outside={"augmentations": (Augmentation("back-translation"),)})
    with pytest.raises(EngineError, match="apertium"):
        quiet(translated)
    assert not trained


def test_data_of_one_s_own_that_are_missing_say_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv(LOCAL, raising=False)
    with pytest.raises(DataError, match=f"{LOCAL} is not set"):
        load_data(LOCAL)
    monkeypatch.setenv(LOCAL, str(tmp_path))
    with pytest.raises(DataError, match="has no folder qa"):
        load_data(LOCAL)
    folder = tmp_path / "qa" / "oodomain_val"
    folder.mkdir(parents=True)
    (folder / "race.json").write_text(json.dumps({"data": []}))
    assert load_data(LOCAL).oodomain_val == {"race": ()}


def test_experts_are_found_where_they_are(config):
    reader = make_reader(config)
    assert expert_layers(reader) == ("head",)
    assert sum(isinstance(module, MoE) for module in reader.modules()) == 1
    assert list(expert_parameters(reader))
    assert stages.subsample is subsample
