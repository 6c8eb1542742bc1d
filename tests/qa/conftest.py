"""Small tokenizers that need no network, and questions whose answers cut every corner."""

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from feedforward.qa.schema import Answer, Question

WORDS = [
    *("ada", "lovelace", "wrote", "the", "first", "program", "for", "an", "engine", "in", "1843"),
    *("charles", "babbage", "drew", "plans", "engineering", "programs", "unbelievable", "x-ray"),
    *("1,000", "don't", "(so)", "“quoted”", "café", "cafe\u0301", "naïve", "rené", "zürich"),
    *("東京", "👩‍🚀", "🇪🇸", "."),
]


def passage(rng, words, joints=(" ", " ", " ", "  ", "\r\n", "\n\n", ", ")):
    """Random text of so many words, and the characters where each begins."""
    text, begins = "", []
    for word in rng.choice(WORDS, words):
        begins.append(len(text))
        text += f"{word}{rng.choice(joints)}"
    return text, begins


def random_questions(count, words, seed=0, answers=(1, 4)):
    """Questions on random passages; answers are stretches of whole words, some overlap."""
    rng = np.random.default_rng(seed)
    questions = []
    for number in range(count):
        context, begins = passage(rng, int(rng.integers(1, words)))
        golds = []
        for _ in range(rng.integers(*answers)):
            first = int(rng.integers(len(begins)))
            last = min(len(begins), first + int(rng.integers(1, 6)))
            end = begins[last] if last < len(begins) else len(context)
            text = context[begins[first] : end].rstrip(" ,\r\n")
            golds.append(Answer(text, begins[first]))
        asked = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
        questions.append(Question(f"q{number}", f"{asked}?", context, tuple(golds), "demo"))
    return questions


def train(tokenizer, trainer):
    known = [word for word in WORDS if word != "unbelievable"]  # which is left in pieces
    tokenizer.train_from_iterator([f"{word} {word} who?" for word in known] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def wordpiece():
    """A tokenizer like BERT's, with cutting and padding saved in it as some packages have it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend = train(backend, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def bytelevel():
    """A tokenizer like RoBERTa's: bytes, two separators, no token types."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend = train(backend, trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"},
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
    )
