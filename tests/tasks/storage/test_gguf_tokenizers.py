"""The tokenizer that is built of a GGUF file is the one that its model was trained with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.storage.gguf_tokenizers import PRE_TOKENIZERS, ROUND_TRIPS, build_tokenizer
from support.gguf_models import CONTROL, USER_DEFINED, byte_level_fields, sentence_piece_fields

# How each kind cuts these texts, as the tokenizers of GPT-2, SmolLM2, Llama 3 and Qwen2 do.
CUTS = {
    "gpt-2": {"x 1234": ["x", " 1234"], "I'M we'd": ["I", "'", "M", " we", "'d"], "a\n\nb": ["a", "\n", "\n", "b"]},
    "smollm": {"x 1234": ["x", " ", "1", "2", "3", "4"], "I'M we'd": ["I", "'", "M", " we", "'d"]},
    "llama-bpe": {"x 1234": ["x", " ", "123", "4"], "I'M we'd": ["I", "'M", " we", "'d"], "a\n\nb": ["a", "\n\n", "b"]},
    "qwen2": {"x 1234": ["x", " ", "1", "2", "3", "4"], "I'M we'd": ["I", "'M", " we", "'d"], "(a)b": ["(a", ")b"]},
}
CHARACTERS = "abc XYZ 019 \n\t .,'!?éü日本🙂 _-'s'LL"


def random_texts(count: int) -> list[str]:
    chosen = random.Random(1)
    return ["".join(chosen.choice(CHARACTERS) for _ in range(chosen.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_byte_level_tokenizers_give_every_text_back(kind: str, tiny_llama: Path) -> None:
    tokenizer = build_tokenizer(byte_level_fields(tiny_llama, kind))
    for text in (*ROUND_TRIPS, *random_texts(300)):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, cuts in CUTS.items() for text in cuts])
def test_words_are_cut_as_the_kind_says(kind: str, text: str, tiny_llama: Path) -> None:
    tokenizer = build_tokenizer(byte_level_fields(tiny_llama, kind))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == CUTS[kind][text]


def test_control_tokens_are_whole_and_are_no_text(tiny_llama: Path) -> None:
    fields = byte_level_fields(tiny_llama)
    tokenizer = build_tokenizer(fields)
    encoded = tokenizer.encode("<|user|>Hello<|end|>")
    tokens = fields["tokenizer.ggml.tokens"]
    assert encoded.ids[0] == tokens.index("<|user|>")
    assert encoded.ids[-1] == tokens.index("<|end|>")
    assert tokenizer.decode(encoded.ids) == "Hello"


@pytest.mark.parametrize(
    ("add_bos", "kind", "expected"), [(None, "gpt-2", 0), (None, "llama-bpe", 1), (True, "gpt-2", 1)]
)
def test_texts_begin_as_the_file_says(add_bos: bool | None, kind: str, expected: int, tiny_llama: Path) -> None:
    fields = byte_level_fields(tiny_llama, kind) | {"tokenizer.ggml.add_bos_token": add_bos}
    tokenizer = build_tokenizer({name: value for name, value in fields.items() if value is not None})
    with_ends, plain = (tokenizer.encode("Hello", add_special_tokens=add).ids for add in (True, False))
    assert with_ends == [0] * expected + plain


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentence_piece_tokenizers_are_those_of_sentence_piece(space_prefix: bool) -> None:
    pytest.importorskip("sentencepiece")
    fields, processor = trained(space_prefix)
    tokenizer = build_tokenizer(fields)
    for text in (*ROUND_TRIPS, *random_texts(300)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("Hello").ids[0] == processor.bos_id()


def test_sentence_piece_without_scores_is_refused() -> None:
    pytest.importorskip("sentencepiece")
    fields, _ = trained(True)
    with pytest.raises(ValueError, match="has no score or no type for each token"):
        build_tokenizer({**fields, "tokenizer.ggml.scores": []})


def test_tokens_of_the_makers_are_kept_whole() -> None:
    pytest.importorskip("sentencepiece")
    fields, _ = trained(False)
    tokens = [*fields["tokenizer.ggml.tokens"], "<start_of_turn>", "\n\n\n"]
    kinds = [*fields["tokenizer.ggml.token_type"], CONTROL, USER_DEFINED]
    scores = [*fields["tokenizer.ggml.scores"], -1000.0, -1000.0]
    own = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.scores": scores}
    tokenizer = build_tokenizer({**fields, **own})
    ids = tokenizer.encode("<start_of_turn>a\n\n\nb", add_special_tokens=False).ids
    assert ids[0] == len(tokens) - 2
    assert len(tokens) - 1 in ids
    assert tokenizer.decode(ids) == "a\n\n\nb"


def trained(space_prefix: bool) -> tuple[dict[str, Any], Any]:
    texts = [text for text in ROUND_TRIPS if text.isprintable()] * 20
    texts += ["The children understand that people everywhere should remember their mother and father."] * 20
    return sentence_piece_fields(texts, 700, space_prefix)
