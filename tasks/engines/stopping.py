"""Turns the tokens of one answer into text as they come, and ends the text at a stop string.

All engines use `TextStream`, so that a stop string cuts the same text on each of them, streamed or not. The text of an
answer is a function of its tokens only: how the tokens are dealt out to `push` never changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of some tokens, without special tokens and without any clean-up of spaces."""

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 16
MAX_PENDING_TOKENS = 32
# A character has at most four bytes, so that a border this far from the end does not move any more.
SETTLED_TOKENS = 8


class StopFinder:
    """Finds the first of some stop strings in a text that comes in pieces.

    The first is the one that ends first, and of those that end at the same place the longest. So the place does not
    depend on the pieces. Each character is looked at once.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._stops = sorted({text for text in stop if text}, key=len, reverse=True)
        self._failures = [_failure_table(text) for text in self._stops]
        self._matched = [0] * len(self._stops)

    def __bool__(self) -> bool:
        return bool(self._stops)

    @property
    def partial_length(self) -> int:
        """Number of characters at the end of the text that may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> tuple[int, int] | None:
        """Go on with a piece of text.

        Returns:
            Where the stop string ends in this piece and how long it is, or None where there is none.
        """
        for end, character in enumerate(text, start=1):
            for index, stop in enumerate(self._stops):
                matched = self._matched[index]
                while matched and stop[matched] != character:
                    matched = self._failures[index][matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    return end, len(stop)
                self._matched[index] = matched
        return None


def _failure_table(text: str) -> list[int]:
    """Return for each position the length of the longest proper prefix that ends there (Knuth, Morris and Pratt)."""
    table = [0] * len(text)
    length = 0
    for position in range(1, len(text)):
        while length and text[position] != text[length]:
            length = table[length - 1]
        length += text[position] == text[length]
        table[position] = length
    return table


class TextStream:
    """The text of one answer, built token by token.

    Attributes:
        stopped: Whether a stop string was found. The text then ends before it.
        token_count: Number of tokens that were pushed and read.
        token_count_at_stop: Number of tokens up to the one that completed the stop string, or None.
    """

    def __init__(self, decode: Decode, stop: Iterable[str] = (), on_text: Callable[[str], None] | None = None) -> None:
        """Start an empty text.

        Args:
            decode: Gives the text of some tokens, without special tokens.
            stop: Texts that end the answer. Empty ones are ignored.
            on_text: Receives the text piece by piece. What it raises comes out of `push` and `finish`.
        """
        self._decode = decode
        self._finder = StopFinder(stop)
        self._on_text = on_text
        self._pieces: list[str] = []
        self._held = ""
        # Tokens whose text was delivered; the text of a token may depend on those before it.
        self._window: list[int] = []
        self._window_text = ""
        self._anchor = 0
        self._pending: list[int] = []
        self._finished = False
        self.stopped = False
        self.token_count = 0
        self.token_count_at_stop: int | None = None

    @property
    def text(self) -> str:
        """Text that was delivered so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_ids: Sequence[int]) -> bool:
        """Go on with the next tokens.

        Returns:
            True once a stop string was found. Tokens after it are ignored.
        """
        if self.stopped or self._finished:
            return self.stopped
        if not self._finder and self._on_text is None:
            # Nobody looks at the text before its end, where it is cheaper to decode all of it at once.
            self._pending.extend(token_ids)
            self.token_count += len(token_ids)
        else:
            self._read_each(token_ids)
        return self.stopped

    def finish(self) -> str:
        """Deliver what was held back and return the whole text."""
        if self._finished or self.stopped:
            return self.text
        if not self._finder and self._on_text is None:
            tokens, self._pending, self.token_count = self._pending, [], 0
            text = self._decode(tokens) if tokens else ""
            if REPLACEMENT not in text:
                self._pieces, self.token_count = [text], len(tokens)
            else:
                self._read_each(tokens)
        self._finished = True
        if self._pending:
            self._deliver(self._pending_text())
        if not self.stopped:
            self._emit(self._held)
        return self.text

    def _read_each(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            self._pending.append(token)
            self.token_count += 1
            text = self._pending_text()
            if not text:
                self._drop_if_silent(token)
            elif not text.endswith(REPLACEMENT):
                self._advance(text)
            elif len(self._pending) > MAX_PENDING_TOKENS:
                self._settle_beginning()
            if self.stopped:
                return

    def _pending_text(self) -> str:
        """Return the text that the pending tokens add."""
        text = self._decode([*self._window, *self._pending])
        if text.startswith(self._window_text):
            return text[len(self._window_text) :]
        # Some decoders take back a valid character when invalid bytes follow. What was delivered stays.
        self._window, self._window_text, self._anchor = [], "", 0
        return self._decode(self._pending)

    def _drop_if_silent(self, token: int) -> None:
        # A token that is empty even after itself is a special one. A lone space marker is empty only at the beginning.
        if self._decode([token, token]) == "":
            self._pending.pop()

    def _advance(self, text: str) -> None:
        """Deliver the pending tokens and move the window on."""
        self._window.extend(self._pending)
        self._window_text += text
        self._pending = []
        if len(self._window) - self._anchor >= WINDOW_TOKENS:
            rest = self._window[self._anchor :]
            rest_text = self._decode(rest)
            if rest_text:
                self._window, self._window_text = rest, rest_text
            self._anchor = len(self._window)
        self._deliver(text)

    def _settle_beginning(self) -> None:
        """Deliver the beginning of a long run of invalid bytes, so that its cost does not grow with its square."""
        whole = self._pending_text()
        for border in range(len(self._pending) - SETTLED_TOKENS, 0, -1):
            beginning, rest = self._pending[:border], self._pending[border:]
            rest_text = self._decode(rest)
            if rest_text and whole.endswith(rest_text) and self._adds_up(beginning, whole[: -len(rest_text)]):
                self._window, self._window_text, self._anchor = [], "", 0
                self._pending = rest
                self._deliver(whole[: -len(rest_text)])
                return

    def _adds_up(self, beginning: list[int], text: str) -> bool:
        return self._decode([*self._window, *beginning]) == self._window_text + text

    def _deliver(self, text: str) -> None:
        """Give out a text, but for an end that may become a stop string."""
        found = self._finder.feed(text)
        text = self._held + text
        if found is not None:
            end, length = found
            self.stopped, self.token_count_at_stop = True, self.token_count
            end += len(self._held) - length
            self._held = ""
        else:
            end = len(text) - self._finder.partial_length
            self._held = text[end:]
        self._emit(text[:end])

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            if self._on_text is not None:
                self._on_text(text)
