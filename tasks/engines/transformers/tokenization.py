"""One face for the tokenizers of Transformers: token ids of prompts, text of token ids, end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TransformersTokenizer:
    """Tokenizer of Transformers, without padding, truncation or any clean-up of spaces.

    Attributes:
        tokenizer: The tokenizer of Transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # The Rust tokenizer is many times faster than its wrapper, and safe in many threads.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        if self._backend is not None:
            return len(self._backend.encode(text, add_special_tokens=False).ids)
        return len(self.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        if self._backend is not None:
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        else:
            text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer, by the generation settings of the model or else by its tokenizer."""
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def pad_token(tokenizer: Any, ends: frozenset[int]) -> int:
    """Return a token to fill up rows with. The attention never sees it."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if isinstance(pad, int) else min(ends, default=0)


def context_length_of(config: Any) -> int | None:
    """Return how many tokens prompt and answer may have together, or None where the model does not say."""
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
