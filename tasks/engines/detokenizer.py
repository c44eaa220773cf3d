"""Text to tokens and tokens to text, at once or as the tokens come, and the search for stop strings in that text."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"
# A character has four bytes at most, so that more tokens without one are no beginning of a character.
MAX_HELD_TOKENS = 12
# Vocabularies in bytes write those without a visible character of their own as the letters from U+0100 on.
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_OF_LETTER = {chr(byte): byte for byte in VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(HIDDEN)}


class Tokenizer(ABC):
    """Tokenizer of one model; all methods may be called from any thread."""

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens and without any clean-up of spaces."""

    @abstractmethod
    def special_id(self, text: str) -> int | None:
        """Return the special token that has exactly this text, or None."""

    def open_stream(self) -> WindowDetokenizer | RustDetokenizer:
        """Return a detokenizer for a new sequence, which gives its text as the tokens come."""
        return WindowDetokenizer(self)

    def entry(self, token: int) -> str:
        """Return what stands for a token in the vocabulary, empty where that is not known."""
        return ""


class RustTokenizer(Tokenizer):
    """Tokenizer of a `tokenizer.json`: many times faster than the one of OpenVINO GenAI.

    Attributes:
        rust: Tokenizer of the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of that library, which neither cuts nor fills up from now on."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.rust = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: place for place, token in added.items() if token.special}

    @classmethod
    def of_folder(cls, folder: Path) -> RustTokenizer | None:
        """Return the tokenizer of a model folder, or None where there is none that can be read."""
        from tokenizers import Tokenizer

        with suppress(Exception):  # a file of a newer version of the library cannot be read by this one
            return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))
        return None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""
        return list(self.rust.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens and without any clean-up of spaces."""
        return str(self.rust.decode(list(token_ids), skip_special_tokens=True))

    def open_stream(self) -> WindowDetokenizer | RustDetokenizer:
        """Return a detokenizer for a new sequence."""
        return RustDetokenizer(self.rust)

    def special_id(self, text: str) -> int | None:
        """Return the special token that has exactly this text, or None."""
        return self._special.get(text)

    def entry(self, token: int) -> str:
        """Return what stands for a token in the vocabulary, empty where that is not known."""
        return str(self.rust.id_to_token(token) or "")


class GenaiTokenizer(Tokenizer):
    """Tokenizer of OpenVINO GenAI, for folders without a `tokenizer.json`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""
        tensor = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids
        return [int(token) for token in tensor.data[0]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens and without any clean-up of spaces."""
        return str(self._tokenizer.decode(list(token_ids)))

    def special_id(self, text: str) -> int | None:
        """Return the special token that has exactly this text, or None."""
        ids = self.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and self.decode(ids) == "" else None


class TransformersTokenizer(Tokenizer):
    """Tokenizer of Transformers, without padding and truncation."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # The Rust tokenizer is many times faster than its wrapper, and safe in many threads. It is a copy, since the
        # wrapper sets the padding and the truncation of its own at each call, and a pipeline is its user's.
        self._rust: RustTokenizer | None = None
        with suppress(Exception):  # not all have one, and one with parts in Python cannot be copied
            self._rust = RustTokenizer(copy.deepcopy(tokenizer.backend_tokenizer))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with or without a start token and the like."""
        if self._rust is not None and not add_special_tokens:
            return self._rust.encode(text, add_special_tokens=False)
        more = {"add_special_tokens": add_special_tokens, "padding": False, "truncation": False, "verbose": False}
        ids: list[int] = self.tokenizer(text, **more)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens and without any clean-up of spaces."""
        if self._rust is not None:
            return self._rust.decode(token_ids)
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def open_stream(self) -> WindowDetokenizer | RustDetokenizer:
        """Return a detokenizer for a new sequence."""
        return super().open_stream() if self._rust is None else self._rust.open_stream()

    def special_id(self, text: str) -> int | None:
        """Return the special token that has exactly this text, or None."""
        if self._rust is not None:
            return self._rust.special_id(text)
        return self.tokenizer.convert_tokens_to_ids(text) if text in self.tokenizer.all_special_tokens else None

    def entry(self, token: int) -> str:
        """Return what stands for a token in the vocabulary, empty where that is not known."""
        return str(self.tokenizer.convert_ids_to_tokens(token) or "")


class RustDetokenizer:
    """Detokenizer of the library of `tokenizer.json` files."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._open = DecodeStream
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def step(self, token: int) -> str:
        """Return the text that a token completes, empty where a character is still incomplete."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:
            # Some decoders take back a valid character when invalid bytes follow. What was given out stays.
            self._stream = self._open(skip_special_tokens=True)
            text = "".join(self._stream.step(self._tokenizer, one) or "" for one in self._pending)
        if text:
            self._pending.clear()
        return text or ""


class WindowDetokenizer:
    """Detokenizer for any tokenizer: new tokens are decoded together with those of the last piece of text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._known = ""
        self._settled = 0

    def step(self, token: int) -> str:
        """Return the text that a token completes, empty where a character is still incomplete."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        held = len(self._window) - self._settled
        if len(text) <= len(self._known) or (text.endswith(REPLACEMENT) and held <= MAX_HELD_TOKENS):
            return ""
        new = text[len(self._known) :]
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._known = self._tokenizer.decode(self._window)
        return new


def split_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    r"""Return the text of each token; together they are the text of all.

    The bytes of a part of a character are written as `\xf0\x9f`, where the vocabulary tells them. Elsewhere its last
    token has all of the character.
    """
    stream, texts = tokenizer.open_stream(), [""] * len(tokens)
    known, begin = "", 0
    for place, token in enumerate(tokens):
        if not (text := stream.step(token)):
            continue
        parts = [_bytes_of(tokenizer.entry(one)) for one in tokens[begin : place + 1]]
        if begin < place and b"".join(parts) == text.encode():
            texts[begin : place + 1] = [part.decode(errors="backslashreplace") for part in parts]
        else:
            texts[place] = text
        known, begin = known + text, place + 1
    if begin < len(tokens):
        # The text ends within a character. Some decoders take back a valid one when invalid bytes follow.
        whole = tokenizer.decode(tokens)
        texts[-1] = whole[len(known) :] if whole.startswith(known) else tokenizer.decode(tokens[begin:])
    return texts


def token_bytes(text: str) -> bytes:
    r"""Return the bytes of a token by its text, in which those of a part of a character stand as `\xf0`."""
    return re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), text.encode())


def _bytes_of(entry: str) -> bytes:
    """Return the bytes of an entry of a vocabulary in bytes: written as letters, or as `<0xF0>`."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", entry):
        return bytes([int(entry[3:5], 16)])
    try:
        return bytes(BYTE_OF_LETTER[letter] for letter in entry)
    except KeyError:
        return b""


class StopStrings:
    """Ends a text before the first of some stop strings.

    The first is the one that ends first, and of those that end at the same place the longest. So the place does not
    depend on the pieces in which the text comes.

    Attributes:
        found: Whether a stop string was found.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._stops = sorted({text for text in stop if text}, key=len, reverse=True)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that is certain after another piece; an end that may become a stop string is held back."""
        if self.found or not self._stops:
            return "" if self.found else text
        text, self._held = self._held + text, ""
        # What was held back holds no stop string, and is shorter than the longest.
        places = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            return text[: min(places)[1]]
        border = len(text) - partial_length(text, self._stops)
        text, self._held = text[:border], text[border:]
        return text

    def finish(self) -> str:
        """Return what is held back at the end of the text."""
        text, self._held = self._held, ""
        return text


def partial_length(text: str, marks: Sequence[str]) -> int:
    """Return the length of the end of a text that may become one of some marks."""
    for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        end = text[-length:]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
