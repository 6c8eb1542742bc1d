import importlib.metadata
from dataclasses import replace

import pytest
import torch
import transformers

from feedforward import MoE, ReaderConfig, build_reader, collect_routing, load_balancing_loss
from feedforward.qa import model as readers
from feedforward.qa.decoding import read
from feedforward.qa.features import prepare

from .conftest import random_questions

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

FORMS = {
    "dense": {},
    "dense-head": {"experts": 4},
    "moe-head": {"experts": 4},
    "switch": {"experts": 4, "layers": (1, -1)},
    "stacked": {"experts": 4, "depth": 2, "heads": 2},
    "mixture": {"experts": 3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random encoders, saved."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    distilbert = transformers.DistilBertConfig(
        vocab_size=300, dim=16, hidden_dim=32, n_layers=3, n_heads=2,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(bert).save_pretrained(root / "bert")
    transformers.DistilBertModel(distilbert).save_pretrained(root / "distilbert")
    return {name: str(root / name) for name in ("bert", "distilbert")}


@pytest.fixture
def build(folders):
    def make(form, encoder="bert", **options):
        return build_reader(ReaderConfig(folders[encoder], form, **FORMS[form] | options))

    return make


@pytest.fixture
def inputs():
    """Three windows of 12, 9 and 5 real tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(12) < torch.tensor([12, 9, 5])[:, None]).long()
    ids = torch.randint(1, 60, (3, 12), generator=generator) * mask
    types = ((torch.arange(12) > 3) & mask.bool()).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def real(output, inputs):
    mask = inputs["attention_mask"].bool()
    return torch.cat([output.start_logits[mask], output.end_logits[mask]])


@pytest.mark.parametrize("encoder", ["bert", "distilbert"])
@pytest.mark.parametrize("form", FORMS)
def test_every_reader_trains_all_of_its_parameters(build, inputs, form, encoder):
    reader = build(form, encoder)
    assert not reader.training
    reader.train()
    with collect_routing(reader) as routings:
        output = reader(**inputs)
    assert output.start_logits.shape == output.end_logits.shape == (3, 12)
    target = torch.tensor([4, 3, 2])
    loss = sum(
        torch.nn.functional.cross_entropy(logits, target)
        for logits in (output.start_logits, output.end_logits)
    )
    (loss + sum(map(load_balancing_loss, routings))).backward()
    gradients = {name: p.grad for name, p in reader.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in gradients.values())
    gates = [grad for name, grad in gradients.items() if "gate" in name]
    assert all(grad.abs().sum() > 0 for grad in gates)
    assert bool(gates) == (form in ("moe-head", "switch", "stacked", "mixture"))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_padding_changes_nothing(build, inputs, form):
    reader = build(form)
    short = {name: values[2:, :5] for name, values in inputs.items()}
    alone, among = reader(**short), reader(**inputs)
    for side in ("start_logits", "end_logits"):
        torch.testing.assert_close(getattr(among, side)[2, :5], getattr(alone, side)[0])


@pytest.mark.parametrize("form", ["moe-head", "switch", "stacked"])
def test_padding_is_never_routed(build, inputs, form):
    with collect_routing(reader := build(form)) as routings:
        reader(**inputs)
    assert len(routings) == (1 if form == "moe-head" else 2)
    for routing in routings:
        assert routing.mask.tolist() == inputs["attention_mask"].bool().flatten().tolist()
        assert (routing.weights[~routing.mask] == 0).all()


@pytest.mark.parametrize("form", ["moe-head", "stacked"])
def test_routed_padding_as_released_takes_part(build, inputs, form):
    with collect_routing(reader := build(form, route_padding=True)) as routings:
        reader(**inputs)
    assert all(routing.mask is None and (routing.weights > 0).all() for routing in routings)


@pytest.mark.parametrize("encoder", ["bert", "distilbert"])
def test_dense_reader_is_that_of_hugging_face(build, folders, inputs, encoder):
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folders[encoder]).eval()
    reader = build("dense", encoder)
    theirs.qa_outputs.load_state_dict(reader.qa_outputs.state_dict())
    mine = reader(**inputs)
    if encoder == "distilbert":
        del inputs["token_type_ids"]
    output = theirs(**inputs)
    torch.testing.assert_close(mine.start_logits, output.start_logits)
    torch.testing.assert_close(mine.end_logits, output.end_logits)
    count = sum(p.numel() for p in reader.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("encoder", ["bert", "distilbert"])
def test_switch_reader_starts_at_the_pretrained_encoder(build, inputs, encoder):
    dense, same = build("dense", encoder), build("switch", encoder, noise=0.0)
    same.qa_outputs.load_state_dict(dense.qa_outputs.state_dict())
    torch.testing.assert_close(
        real(same(**inputs), inputs), real(dense(**inputs), inputs), atol=1e-4, rtol=1e-3
    )
    first = next(m for m in same.modules() if isinstance(m, MoE))
    assert (first.w_in == first.w_in[:1]).all()
    noisy = next(m for m in build("switch", encoder, noise=0.1).modules() if isinstance(m, MoE))
    difference = (noisy.w_in - first.w_in).std() / first.w_in.std()
    assert 0.08 < difference < 0.12


def test_switch_layers_are_where_they_shall_be(build, tmp_path):
    def places(reader):
        layers = reader.encoder.transformer.layer
        return [i for i, at in enumerate(layers) if any(isinstance(m, MoE) for m in at.modules())]

    assert places(build("switch", "distilbert")) == [1, 2]
    six = transformers.DistilBertConfig(vocab_size=60, dim=16, hidden_dim=32, n_layers=6, n_heads=2)
    transformers.DistilBertModel(six).save_pretrained(tmp_path)
    assert places(build_reader(ReaderConfig(str(tmp_path), "switch"))) == [1, 2, 3, 4]


@pytest.mark.parametrize("form", FORMS)
def test_decoding_reads_with_every_reader(build, wordpiece, form):
    reader = build(form).train()
    features = prepare(random_questions(5, 12), wordpiece, length=32, stride=4, question_length=16)
    start, end = read(reader, features, batch=2)
    assert start.shape == end.shape == (len(features), features.lengths.max())
    assert reader.training
    reader.eval()
    window = int(features.lengths.argmin())
    alone = {k: v for k, v in features.batch([window]).items() if not k.endswith("_positions")}
    with torch.no_grad():
        output = reader(**alone)
    length = features.lengths[window]
    torch.testing.assert_close(
        output.start_logits[0, :length],
        torch.from_numpy(start[window, :length]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(("match", "hidden"), [("active", 128), ("total", 256)])
def test_dense_head_has_as_many_parameters_as_the_experts(build, match, hidden):
    control, moe = build("dense-head", match=match), build("moe-head").head.moe
    share = moe.router.k / moe.experts if match == "active" else 1
    experts = moe.w_in.numel() + moe.w_out.numel()
    assert sum(p.numel() for p in control.head.parameters()) == experts * share
    assert control.head.up.out_features == hidden


def test_mixture_of_equal_readers_is_the_reader(build, inputs):
    mixture = build("mixture")
    output = mixture(**inputs)
    for logits in (output.start_logits, output.end_logits):
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(output.gate.sum(1), torch.ones(3))
    heads = [reader.qa_outputs for reader in mixture.readers]
    assert not torch.equal(heads[0].weight, heads[1].weight)
    for head in heads[1:]:
        head.load_state_dict(heads[0].state_dict())
    one = mixture.readers[0](**inputs).start_logits
    one = one.masked_fill(inputs["attention_mask"] == 0, -torch.inf).log_softmax(1)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(mixture(**inputs).start_logits[mask], one[mask])


def test_mixture_follows_its_gate(build, inputs):
    mixture = build("mixture")
    with torch.no_grad():
        mixture.gate.weight.zero_()
    output = mixture(**inputs)
    torch.testing.assert_close(output.gate, torch.full((3, 3), 1 / 3))
    each = [reader(**inputs).end_logits[0].softmax(-1) for reader in mixture.readers]
    torch.testing.assert_close(output.end_logits[0].exp(), torch.stack(each).mean(0))


def test_second_expert_is_dropped_at_random_only_on_demand(build, inputs):
    # a gate so sure that second weights fall below 0.2
    fixed, random = build("moe-head"), build("moe-head", drop_second=True, experts=16, gate_std=2.0)
    torch.testing.assert_close(real(fixed(**inputs), inputs), real(fixed(**inputs), inputs))
    assert random.head.moe.router.gate.std().item() == pytest.approx(2.0, rel=0.2)
    torch.manual_seed(0)
    with collect_routing(random) as routings:
        first, second = (random(**inputs).start_logits for _ in range(2))
    assert not torch.equal(first, second)
    dropped = torch.stack([(r.weights[:, 1] == 0) & r.mask for r in routings])
    assert dropped.any()
    assert not dropped[:, routings[0].weights[:, 0] < 0.8].any()


def test_capacity_follows_the_mode(build, inputs):
    reader = build("moe-head", capacity_factor=0.25, eval_capacity_factor=4.0)
    dropped = []
    for mode in (True, False):
        with collect_routing(reader.train(mode)) as routings:
            reader(**inputs)
        dropped.append(int((routings[0].weights == 0)[routings[0].mask].sum()))
    assert dropped[0] > 0
    assert dropped[1] == 0


def test_stacked_experts_differ_unless_they_shall_not(build):
    for identical in (False, True):
        blocks = build("stacked", identical_experts=identical).head.blocks
        assert len(blocks) == 2
        for block in blocks:
            assert bool((block.moe.w_in == block.moe.w_in[:1]).all()) is identical


@pytest.mark.parametrize("form", FORMS)
def test_seed_decides_what_is_not_pretrained(build, form):
    state = torch.random.get_rng_state()
    one, same, other = (build(form, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(values, same[name]) for name, values in one.items())
    assert any(not torch.equal(values, other[name]) for name, values in one.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "sparse"}, "choose one of dense, dense-head"),
        ({"encoder": ""}, "encoder is empty"),
        ({"form": "moe-head", "experts": 0}, "experts is 0"),
        ({"form": "moe-head", "experts": 2, "k": 3}, "choose k from 1 to 2"),
        ({"form": "moe-head", "k": 1, "drop_second": True}, "k=2"),
        ({"form": "moe-head", "layers": (1,)}, "an option of switch"),
        ({"form": "switch", "layers": ()}, "layers is empty"),
        ({"form": "switch", "noise": -1.0}, "from 0 and finite"),
        ({"form": "switch", "noise": float("inf")}, "from 0 and finite"),
        ({"form": "moe-head", "experts": 2.5}, "experts is 2.5; give a whole number"),
        ({"form": "moe-head", "k": True}, "k is True; give a whole number"),
        ({"form": "moe-head", "gate_std": -1.0}, "gate_std is -1.0"),
        ({"form": "switch", "route_padding": True}, "moe-head and stacked"),
        ({"form": "switch", "capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"form": "dense-head", "match": "some"}, "'active' or 'total'"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ReaderConfig(**options)


def test_configurations_that_do_not_fit_the_encoder(build):
    with pytest.raises(ValueError, match="does not divide the encoder's width 16"):
        build("stacked", heads=3)
    with pytest.raises(ValueError, match="7"):
        build("switch", layers=(7,))


def test_layers_may_be_a_list_and_stay_hashable():
    config = ReaderConfig(form="switch", layers=[1, 2])
    assert hash(config) == hash(replace(config, layers=(1, 2)))


def test_embedded_encoder():
    try:
        importlib.metadata.distribution(readers.MINILM.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{readers.MINILM.package} is not installed")
    reader, tokenizer = build_reader(ReaderConfig()), readers.load_tokenizer()
    batch = tokenizer(["Who wrote it?"], ["Ada Lovelace wrote it."], return_tensors="pt")
    output = reader(**batch)
    assert output.start_logits.shape == batch["input_ids"].shape
    assert reader.encoder.config.num_hidden_layers == 6
