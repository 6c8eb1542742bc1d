"""Generation against a loop without a cache, and the choice of tokens against its definition."""

import copy
import math

import pytest
import torch

from feedforward import BlockDense, BlockShuffle, LowRank, PreMerged, premerge
from feedforward.lm import decoding
from feedforward.lm.decoding import (
    Throughput,
    compare_throughput,
    generate,
    max_throughput,
    premerge_decoder,
    sample,
)
from feedforward.lm.model import Decoder, DecoderConfig

# wide enough weights that greedy decoding does not say the same token for ever
SMALL = {
    "vocabulary": 61, "width": 32, "layers": 3, "heads": 4, "context": 24, "std": 0.4, "tied": False
}  # fmt: skip
KINDS = {
    "dense": {},
    "swiglu": {"gated": True, "activation": "silu", "norm": "rms", "bias": False, "hidden": 48},
    "grouped": {"kv_heads": 2, "head_width": 4, "tied": True},
    "learned": {"positions": "learned"},
    "lowrank": {"ffn": "lowrank", "rank": 8},
    "blockshuffle": {"ffn": "blockshuffle", "blocks": 4},
    "blockdense": {"ffn": "blockdense", "rank": 16, "blocks": 4},
    "wide": {"ffn": "lowrank", "rank": 16, "kv_heads": 1, "heads": 2, "head_width": 8},
    "moe": {"ffn": "moe", "experts": 4, "k": 2},
    "switch": {"ffn": "switch", "experts": 4},
}
every_kind = pytest.mark.parametrize("name", KINDS)
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}


def decoder(name: str = "dense", **changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**SMALL | KINDS[name] | changes)).eval()


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (length,), generator=generator) for length in lengths]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def token_by_token(model: Decoder, prompt: torch.Tensor, length: int, **options) -> torch.Tensor:
    """The plainest way: one row, the whole sequence through the model for each token."""
    row = prompt[None]
    for _ in range(length):
        row = torch.cat((row, sample(model(row)[:, -1], **options)[None]), dim=1)
    return row[0]


@every_kind
@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_with_and_without_the_cache_the_tokens_are_the_same(name, options):
    model, rows = decoder(name), prompts(5, 1, 9, 5)
    for given in (rows, torch.stack(prompts(6, 6, 6))):
        with_cache = generate(model, given, 12, **options, generator=seeded())
        without = generate(model, given, 12, **options, generator=seeded(), cache=False)
        for ours, theirs in zip(with_cache, without, strict=True):
            assert torch.equal(ours, theirs)
    # and those of each row alone, without padding
    each = generate(model, rows, 12, **options, generator=list(map(seeded, range(4))))
    for seed, (prompt, row) in enumerate(zip(rows, each, strict=True)):
        alone = token_by_token(model, prompt, 12, **options, generator=seeded(seed))
        assert torch.equal(row, alone)
    assert len({tuple(row[-12:].tolist()) for row in each}) > 1


def test_a_step_computes_the_new_token_alone(monkeypatch):
    model, seen = decoder(), []
    states = model.states
    monkeypatch.setattr(
        model, "states", lambda new, **how: (seen.append(new.shape), states(new, **how))[1]
    )
    generate(model, prompts(4, 7), 4)
    assert seen == [(2, 7), (2, 1), (2, 1), (2, 1)]
    seen.clear()
    generate(model, prompts(4, 7), 2, cache=False)
    assert seen == [(2, 7), (2, 8)]


def test_a_generator_decides_the_draws():
    model, rows = decoder(), torch.stack(prompts(4, 4, 4))
    first, again, other = (generate(model, rows, 12, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    first = generate(model, rows, 12)
    torch.manual_seed(3)
    assert torch.equal(first, generate(model, rows, 12))
    same = generate(model, rows[:1].repeat(2, 1), 12, generator=[seeded(5), seeded(5)])
    assert torch.equal(same[0], same[1])


def test_the_mode_of_the_model_is_kept_whatever_happens(monkeypatch):
    model = decoder("switch", jitter=0.9).train()
    rows = prompts(4, 6)
    greedy = generate(model, rows, 8, temperature=0)
    assert model.training
    model.eval()
    for row, again in zip(greedy, generate(model, rows, 8, temperature=0), strict=True):
        assert torch.equal(row, again)
    assert not model.training
    model.train()
    monkeypatch.setattr(decoding, "sample", lambda *_, **__: 1 / 0)
    model.blocks[0].eval()
    with pytest.raises(ZeroDivisionError):
        generate(model, rows, 8)
    assert model.training
    assert not any(module.training for module in model.blocks[0].modules())


def test_the_least_temperature_and_one_token_are_greedy():
    logits = torch.randn(2000, 500, generator=seeded()).bfloat16()  # with equal ones
    greedy = logits.argmax(-1)
    assert torch.equal(sample(logits, top_k=1), greedy)
    distinct = torch.stack([torch.randperm(50, generator=seeded(s)) for s in range(20)]).float()
    assert torch.equal(sample(distinct, temperature=1e-50), distinct.argmax(-1))


def test_no_more_tokens_than_were_asked_for_are_drawn_from():
    drawn = torch.cat([sample(torch.zeros(200, 9), top_k=2, generator=seeded(s)) for s in range(9)])
    assert len(drawn.unique()) == 2


@pytest.mark.parametrize(
    "options", [{"temperature": -1e-3}, {"temperature": math.inf}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_sampling_refuses_what_has_no_meaning(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is"):
        sample(torch.randn(2, 5), **options)


def test_every_module_keeps_its_own_mode():
    model = decoder("switch", jitter=0.9)
    greedy = generate(model.eval(), prompts(4), 8, temperature=0)
    for parent in (True, False):
        model.train(parent)
        model.blocks[0].train(not parent)  # frozen in a training model, or the other way round
        model.blocks[0].ffn.train(parent)
        modes = [module.training for module in model.modules()]
        assert torch.equal(generate(model, prompts(4), 8, temperature=0)[0], greedy[0])
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46, 1e-320])
def test_no_temperature_is_too_small(temperature):
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, temperature=temperature), logits.argmax(-1))
    model, rows = decoder(), prompts(4, 2)
    greedy = generate(model, rows, 5, temperature=0)
    for row, other in zip(generate(model, rows, 5, temperature=temperature), greedy, strict=True):
        assert torch.equal(row, other)


def test_no_more_tokens_than_top_k_are_drawn_where_scores_are_equal():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(400, 1)
    assert torch.equal(sample(logits, top_k=1), sample(logits, temperature=0))
    for top_k in (2, 3):
        drawn = sample(logits, top_k=top_k, generator=torch.Generator().manual_seed(0))
        assert len(drawn.unique()) == top_k
        assert set(drawn.tolist()) <= {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logits": torch.zeros(5)}, r"shape \(5,\); give \(B, vocabulary\)"),
        ({"temperature": -1e-3}, "temperature is -0.001"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 rows"),
        ({"logits": torch.tensor([[0.0, 1.0], [math.nan, 1.0]])}, "in row 1 is nan; .*finite"),
        ({"logits": torch.tensor([[math.inf, 1.0], [0.0, 1.0]])}, "in row 0 is inf"),
        ({"logits": torch.full((2, 5), -math.inf)}, "in row 0 is -inf"),
    ],
)
@pytest.mark.parametrize(
    "way", [{}, {"temperature": 0}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}]
)
def test_what_cannot_be_drawn_is_refused(changes, says, way):
    with pytest.raises(ValueError, match=says):
        sample(**{"logits": torch.zeros(2, 5)} | way | changes)


def test_tokens_may_be_impossible_and_scores_large():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf], [6e4, 0.0, -math.inf]]).half()
    for way in ({}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}):
        # the sum of the largest is too large for half precision
        assert sample(logits.repeat(4, 1), **way).tolist() == [1, 0] * 4


def test_a_model_that_is_broken_writes_nothing():
    model = decoder()
    with torch.no_grad():
        model.blocks[1].ffn.up.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="in row 0 is nan"):
        generate(model, [[1, 2, 3]], 2)


def test_a_row_ends_at_the_stop_token():
    model, rows = decoder(), prompts(4, 2, 6)
    free = generate(model, rows, 15, temperature=0)
    added = [row[-15:].tolist() for row in free]
    # the first row ends early, the others where they meet the token, if at all
    stop = next(token for i, token in enumerate(added[0]) if i > 1 and token not in added[0][:i])
    ends = [line.index(stop) + 1 if stop in line else 15 for line in added]
    stopped = generate(model, rows, 15, temperature=0, stop=stop)
    for prompt, row, whole, end in zip(rows, stopped, free, ends, strict=True):
        assert torch.equal(row, whole[: len(prompt) + end])
    # a tensor stays one: what comes after the end is filled up
    square = torch.stack([rows[0], rows[0]])
    square = generate(model, square, 15, temperature=0, stop=stop)
    assert square.shape == (2, 4 + ends[0])
    pair = torch.stack([rows[0], prompts(4, 2, 6, 4)[3]])
    free, stopped = (generate(model, pair, 15, temperature=0, stop=s) for s in (None, stop))
    assert torch.equal(stopped[0, : 4 + ends[0]], free[0, : 4 + ends[0]])
    assert (stopped[0, 4 + ends[0] :] == stop).all()
    # a stop token inside a prompt ends nothing
    model = decoder()
    rows = [torch.tensor([stop, stop, 3]), torch.tensor([5])]
    free, stopped = (generate(model, rows, 1, temperature=0, stop=s) for s in (None, stop))
    assert [row.tolist() for row in free] == [row.tolist() for row in stopped]


def test_prompts_may_be_lists_and_nothing_may_be_added():
    model = decoder()
    as_lists = generate(model, [[1, 2, 3], [4]], 3, temperature=0)
    as_tensors = generate(model, [torch.tensor([1, 2, 3]), torch.tensor([4])], 3, temperature=0)
    assert [row.tolist() for row in as_lists] == [row.tolist() for row in as_tensors]
    tokens = torch.stack(prompts(3, 3))
    assert torch.equal(generate(model, tokens, 0), tokens)
    assert torch.equal(generate(model, tokens.int(), 2)[:, :3], tokens)
    full = generate(model, tokens, 21)  # up to the end of the context
    assert full.shape == (2, 24)


def test_autocast_keeps_the_cache_in_its_type():
    model, tokens = decoder("grouped"), torch.stack(prompts(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        pair = [generate(model, tokens, 6, temperature=0, cache=cache) for cache in (True, False)]
    assert pair[0].shape == pair[1].shape == (2, 10)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, r"\(2, 0\).*T >= 1"),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, r"\(3,\).*give \(B, T\)"),
        ({"tokens": []}, "one or more"),
        ({"tokens": [[1, 2], []]}, r"\(0,\).*T >= 1"),
        ({"tokens": [[1, 61]]}, "from 0 to 60; .* to 61"),
        ({"tokens": [[-1, 6]]}, "from -1 to 6"),
        ({"tokens": [[1.5]]}, "float32"),
        ({"length": -1}, "length is -1"),
        ({"length": 2.0}, r"length is 2\.0; .*whole number"),
        ({"length": 22}, "3 tokens and 22 new ones .* context of 24: add at most 21"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop": 61}, "stop is 61"),
        ({"stop": 1.5}, r"stop is 1\.5"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 rows"),
    ],
)
def test_what_cannot_be_generated_is_refused(changes, says):
    arguments = {"tokens": [[1, 2, 3], [4]], "length": 2} | changes
    with pytest.raises(ValueError, match=says):
        generate(decoder(), **arguments)


# the choice of a token


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    draws = sample(logits.expand(40_000, -1), **options, generator=seeded())
    return draws.bincount(minlength=logits.shape[-1]) / len(draws)


def test_tokens_are_drawn_with_their_probabilities():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log() + 5.0
    assert sample(logits[None], temperature=0).tolist() == [0]
    close = {"atol": 0.01, "rtol": 0}
    torch.testing.assert_close(frequencies(logits), probabilities, **close)
    sharper = probabilities.square() / probabilities.square().sum()
    torch.testing.assert_close(frequencies(logits, temperature=0.5), sharper, **close)
    of_two = torch.tensor([4, 3, 0, 0]) / 7
    torch.testing.assert_close(frequencies(logits, top_k=2), of_two, **close)
    # the fewest tokens that reach the probability: 0.4 + 0.3 for 0.65, and all four for 0.91
    torch.testing.assert_close(frequencies(logits, top_p=0.65), of_two, **close)
    torch.testing.assert_close(frequencies(logits, top_p=0.91), probabilities, **close)
    assert frequencies(logits, top_p=1e-6)[0] == 1
    # of three tokens, 4/9 and 3/9 reach 0.7
    torch.testing.assert_close(frequencies(logits, top_k=3, top_p=0.7), of_two, **close)
    assert frequencies(logits, temperature=1e-30)[0] == 1
    torch.testing.assert_close(frequencies(logits, top_k=9), probabilities, **close)


def test_rows_are_drawn_apart():
    logits = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]])
    assert sample(logits).tolist() == [1, 0]
    flat = torch.zeros(64, 61)
    drawn = sample(flat, generator=[seeded(seed) for seed in range(64)])
    assert len(drawn.unique()) > 20
    alone = [sample(flat[:1], generator=[seeded(seed)]).item() for seed in range(64)]
    assert drawn.tolist() == alone


# pre-merged layers


STRUCTURED = ("lowrank", "blockshuffle", "blockdense", "wide")


def ways_taken(model: Decoder, monkeypatch) -> list[tuple[str, int]]:
    """Fills with the way and the tokens of each product of a pre-merged layer."""
    taken = []
    for kind in (LowRank, BlockShuffle, BlockDense):
        original = kind._multiply
        monkeypatch.setattr(
            kind,
            "_multiply",
            lambda self, x, original=original: (
                taken.append(("structured", len(x))),
                original(self, x),
            )[1],
        )
    for module in model.modules():
        if isinstance(module, PreMerged):
            module.register_forward_pre_hook(
                lambda module, args: taken.append(("called", args[0].shape[:-1].numel()))
            )
    return taken


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_premerged_model_generates_the_same(name, monkeypatch):
    model, rows = decoder(name), prompts(5, 1, 9)
    merged = premerge(copy.deepcopy(model), threshold=3)
    layers = [module for module in merged.modules() if isinstance(module, PreMerged)]
    assert len(layers) == 4  # the first block is dense
    for dtype, close in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        one, two = (copy.deepcopy(each).to(dtype) for each in (model, merged))
        with torch.no_grad():
            for tokens in (torch.stack(prompts(1, 1)), torch.stack(prompts(8, 8))):
                torch.testing.assert_close(two(tokens), one(tokens), rtol=close, atol=close)
    for options in ({"temperature": 0}, SAMPLED):
        pair = [generate(each, rows, 8, **options, generator=seeded()) for each in (model, merged)]
        for plain, ours in zip(*pair, strict=True):
            assert torch.equal(plain, ours)
    # the prompts go through V and U, the steps through the dense weight, and too many rows do not
    taken = ways_taken(merged, monkeypatch)
    generate(merged, rows, 3)
    assert taken == 4 * [("called", 27), ("structured", 27)] + 8 * [("called", 3)]
    taken.clear()
    generate(merged, prompts(1, 1, 1, 1), 2)
    assert taken == 8 * [("called", 4), ("structured", 4)]


def test_thresholds_are_measured_in_steps_of_decoding(monkeypatch):
    model, seen = decoder("lowrank"), []
    states = model.states
    monkeypatch.setattr(
        model, "states", lambda new, **how: (seen.append(new.shape), states(new, **how))[1]
    )
    monkeypatch.setattr(
        decoding, "premerge", lambda model, *, run, largest: (run(3), run(largest), model)[-1]
    )
    assert premerge_decoder(model, largest=5) is model
    assert seen == 4 * [(3, 1)] + 4 * [(5, 1)]
    monkeypatch.undo()
    tokens = torch.stack(prompts(4, 4))
    plain = generate(model, tokens, 6, temperature=0)
    premerge_decoder(model, largest=1)
    assert torch.equal(generate(model, tokens, 6, temperature=0), plain)
    with pytest.raises(ValueError, match="eval mode"):
        premerge_decoder(decoder("lowrank").train())
    with pytest.raises(ValueError, match="no structured layer"):
        premerge_decoder(decoder("dense"))


# throughput


def timed(monkeypatch, seconds) -> list[list[str]]:
    """Gives a batch of `name` the time ``seconds(name, batch)``, or lets it find no memory (None).

    Returns the names that were timed together.
    """
    together = []

    def fake_generate(model, tokens, length, *, temperature):
        assert (tokens.shape[1], length, temperature) == (4, 3, 0)
        if seconds(model.name, len(tokens)) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def fake_interleaved(runs, *, device, rounds):
        together.append(list(runs))
        sizes = {name: (run.args[0].name, len(run.args[1])) for name, run in runs.items()}
        return {name: [0.0, seconds(*size), 99.0] for name, size in sizes.items()}

    monkeypatch.setattr(decoding, "generate", fake_generate)
    monkeypatch.setattr(decoding, "interleaved", fake_interleaved)
    return together


def named(*names: str) -> dict[str, Decoder]:
    models = {name: decoder() for name in names}
    for name, model in models.items():
        model.name = name
    return models


def test_the_search_ends_where_more_rows_do_not_pay(monkeypatch):
    times = {
        "even": lambda batch: 1.0,  # twice the rows, twice the tokens
        "falls": lambda batch: 1.0 if batch <= 4 else batch / 2,
        "full": lambda batch: 1.0 if batch <= 2 else None,
        "none": lambda batch: None,
    }
    together = timed(monkeypatch, lambda name, batch: times[name](batch))
    found = compare_throughput(named(*times), prompt=4, length=3, batches=(1, 2, 4, 8, 16))
    assert {name: (t.best, t.maximum, t.stopped) for name, t in found.items()} == {
        "even": (16, 48.0, "batches"),
        "falls": (4, 12.0, "slower"),
        "full": (2, 6.0, "memory"),
        "none": (None, 0.0, "memory"),
    }
    assert found["falls"].seconds == {1: 1.0, 2: 1.0, 4: 1.0, 8: 4.0}
    assert found["falls"].tokens_per_second == {1: 3.0, 2: 6.0, 4: 12.0, 8: 6.0}
    assert together == [["even", "falls", "full"]] * 2 + [["even", "falls"]] * 2 + [["even"]]


def test_a_little_slower_does_not_end_the_search(monkeypatch):
    rates = {1: 10.0, 2: 9.6, 4: 9.6, 8: 11.0, 16: 10.0, 32: 50.0}
    timed(monkeypatch, lambda name, batch: 3 * batch / rates[batch])
    (model,) = named("only").values()
    found = max_throughput(model, prompt=4, length=3, batches=tuple(rates))
    assert (found.best, found.stopped) == (8, "slower")
    assert found.tokens_per_second == pytest.approx({b: r for b, r in rates.items() if b <= 16})


def test_only_a_lack_of_memory_is_caught(monkeypatch):
    message = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"

    def failing(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(decoding, "generate", failing)
    assert max_throughput(decoder(), prompt=4, length=3).stopped == "memory"
    message = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        max_throughput(decoder(), prompt=4, length=3)


def test_models_are_really_timed():
    models = {"dense": decoder(), "structured": decoder("lowrank")}
    found = compare_throughput(models, prompt=3, length=2, batches=[1, 2])
    for throughput in found.values():
        assert isinstance(throughput, Throughput)
        assert all(seconds > 0 for seconds in throughput.seconds.values())
        assert throughput.maximum == max(throughput.tokens_per_second.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": {}}, "models are on none"),
        ({"prompt": 0}, "prompt 0"),
        ({"length": 0}, "length 0"),
        ({"rounds": 2}, "rounds 2"),
        ({"batches": ()}, r"batches are \(\)"),
        ({"batches": (2, 2)}, "that rise"),
        ({"batches": (0, 1)}, "from 1"),
        ({"prompt": 20, "length": 5}, "more than the context of 24"),
    ],
)
def test_what_cannot_be_timed_is_refused(changes, says):
    arguments = {"models": {"one": decoder()}, "prompt": 4, "length": 2} | changes
    with pytest.raises(ValueError, match=says):
        compare_throughput(**arguments)
    elsewhere = {"here": decoder(), "there": decoder().to("meta")}
    with pytest.raises(ValueError, match="one device"):
        compare_throughput(elsewhere, prompt=4, length=2)
