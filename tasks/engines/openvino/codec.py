"""Text to token ids and back for OpenVINO models, without Transformers.

The Rust tokenizer of `tokenizer.json` is many times faster than the tokenizer of OpenVINO GenAI and counts as
Transformers does. A folder without it works with the tokenizer of OpenVINO GenAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from prefect_huggingface.tasks.engines.chat_templates import read_json


class TextCodec(Protocol):
    """Tokenizer of one model; all methods may be called from any thread."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        ...


class RustCodec:
    """Tokenizer of a `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class GenaiCodec:
    """Tokenizer of OpenVINO GenAI."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""
        tensor = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids
        return [int(token) for token in tensor.data[0]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids)))


def load_rust_codec(folder: Path) -> RustCodec | None:
    """Return the Rust tokenizer of a model folder, or None where there is none that can be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return RustCodec(path)
    except Exception:
        # A file of a newer version of the library cannot be read by this one.
        return None


def read_end_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer, the main one first."""
    for name in ("generation_config.json", "config.json"):
        ends = read_json(folder / name).get("eos_token_id")
        if isinstance(ends, int):
            return (ends,)
        if isinstance(ends, list) and ends:
            return tuple(ends)
    end = int(tokenizer.get_eos_token_id())
    return (end,) if end >= 0 else ()


def read_context_length(folder: Path) -> int | None:
    """Return how many tokens prompt and answer may have together, or None where the model does not say."""
    settings = read_json(folder / "config.json")
    settings = {**settings, **(settings.get("text_config") or {})}
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = settings.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None
