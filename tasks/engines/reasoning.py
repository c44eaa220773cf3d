"""Reasoning of a model, kept apart from its answer: which tags enclose it, and how a stream is split at them.

The tags must be visible in the text that is split, also where the tokenizer calls them special (`visible_marks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prefect_huggingface.tasks.engines.detokenizer import partial_length

HARMONY_FINAL = "<|start|>assistant<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models encloses its reasoning.

    Attributes:
        start: Tag before the reasoning.
        end: Tag after it.
        starts_open: Whether the prompt ends within the reasoning, so that the model writes only the closing tag.
        answer_marks: Marks that may stand before the answer and are no part of it.
        closing: Text that ends the reasoning and begins the answer, for a model that has thought long enough; empty
            for the tag on a line of its own.
    """

    start: str
    end: str
    starts_open: bool = False
    answer_marks: tuple[str, ...] = ()
    closing: str = ""

    @property
    def visible_marks(self) -> tuple[str, ...]:
        """Texts that decoding must keep, even where they are special tokens."""
        return (self.start, self.end, *self.answer_marks)


# The first format whose closing tag stands in the template is the one of the model.
FORMATS = (
    ReasoningFormat("<think>", "</think>"),  # Qwen 3, DeepSeek-R1, GLM-4.5, SmolLM3, Phi-4-reasoning, LFM2
    ReasoningFormat("[THINK]", "[/THINK]", closing="[/THINK]"),  # Magistral
    ReasoningFormat(  # gpt-oss
        "<|channel|>analysis<|message|>",
        "<|end|>",
        answer_marks=(HARMONY_FINAL, "<|channel|>final<|message|>", "<|start|>assistant"),
        closing=f"<|end|>{HARMONY_FINAL}",
    ),
    ReasoningFormat("<seed:think>", "</seed:think>"),  # Seed-OSS
    ReasoningFormat(  # Command A
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        answer_marks=("<|START_RESPONSE|>",),
        closing="<|END_THINKING|><|START_RESPONSE|>",
    ),
    ReasoningFormat("<|inner_prefix|>", "<|inner_suffix|>", closing="<|inner_suffix|>"),  # Apertus
    ReasoningFormat("<thought>", "</thought>"),  # EXAONE Deep
    ReasoningFormat("◁think▷", "◁/think▷"),  # Kimi
    ReasoningFormat("<reasoning>", "</reasoning>"),
)


def find_reasoning_format(
    templates: Iterable[str], prompt: str = "", tags: Sequence[str] | None = None
) -> ReasoningFormat | None:
    """Return how a model encloses its reasoning, or None where it does not reason.

    Args:
        templates: Sources of the model's chat templates.
        prompt: Rendered prompt, which tells whether the answer begins within the reasoning.
        tags: Opening and closing tag in place of what the templates show. An empty sequence means no reasoning.
    """
    if tags is not None:
        found = ReasoningFormat(tags[0], tags[1]) if tags else None
    else:
        source = "\n".join(templates)
        found = next((known for known in FORMATS if all(part in source for part in _signature(known))), None)
    # The prompt itself may have opened the reasoning.
    return replace(found, starts_open=prompt.rstrip().endswith(found.start)) if found is not None else None


def _signature(known: ReasoningFormat) -> tuple[str, ...]:
    # A template of gpt-oss makes its tags of parts; `<|end|>` alone is the end of a turn in many families.
    return ("<|channel|>", "analysis", "<|message|>") if known.start.startswith("<|channel|>") else (known.end,)


class ReasoningSplitter:
    """Splits the text of an answer into reasoning and answer, piece by piece.

    Reasoning stands at the beginning, once or several times; a tag further on is text of the answer. Whitespace
    around the reasoning belongs to neither. Reasoning without an end is all reasoning.
    """

    def __init__(self, reasoning_format: ReasoningFormat) -> None:
        self._format = reasoning_format
        self._state: Literal["before", "inside", "answer"] = "inside" if reasoning_format.starts_open else "before"
        self._buffer = ""
        self._has_split = reasoning_format.starts_open
        self._has_reasoning = False

    def feed(self, text: str) -> tuple[str, str]:
        """Return the new reasoning and the new text of the answer that a piece of text brings."""
        self._buffer += text
        reasoning: list[str] = []
        while self._state != "answer":
            step = self._enter() if self._state == "before" else self._leave(reasoning)
            if not step:
                return "".join(reasoning), ""
        answer, self._buffer = self._buffer, ""
        return "".join(reasoning), answer

    def finish(self) -> tuple[str, str]:
        """Return what was held back: the beginning of a tag that did not come."""
        rest, self._buffer = self._buffer, ""
        if self._state == "inside":
            return rest.rstrip() if self._has_reasoning else rest.strip(), ""
        return "", rest.lstrip() if self._has_split else rest

    def _enter(self) -> bool:
        """Take what stands before the answer; return False where more text is needed."""
        marks = (self._format.start, *self._format.answer_marks)
        text = self._buffer.lstrip()
        if any(len(text) < len(mark) and mark.startswith(text) for mark in marks):
            return False
        found = max((mark for mark in marks if text.startswith(mark)), key=len, default=None)
        if found is None:
            self._buffer = text if self._has_split else self._buffer
            self._state = "answer"
            return True
        self._has_split = True
        self._buffer = text[len(found) :]
        if found == self._format.start:
            self._state = "inside"
        return True

    def _leave(self, reasoning: list[str]) -> bool:
        """Take the reasoning up to its closing tag; return False where more text is needed."""
        start, end = self._format.start, self._format.end
        if not self._has_reasoning:
            # The model may repeat the opening tag of the prompt.
            text = self._buffer.lstrip()
            if text.startswith(start):
                text = text[len(start) :].lstrip()
            elif start.startswith(text) and not end.startswith(text):
                return False
            self._buffer = text
        thought, tag, rest = self._buffer.partition(end)
        if tag:
            self._add(reasoning, thought.rstrip())
            self._buffer, self._state = rest, "before"
            return True
        kept = _held_back(self._buffer, end)
        self._add(reasoning, self._buffer[: len(self._buffer) - kept])
        self._buffer = self._buffer[len(self._buffer) - kept :]
        return False

    def _add(self, reasoning: list[str], text: str) -> None:
        if text:
            reasoning.append(text)
            self._has_reasoning = True


def _held_back(text: str, tag: str) -> int:
    """Return the length of the end of a text that may be whitespace before a tag, or the beginning of the tag."""
    length = partial_length(text, [tag])
    before = text[: len(text) - length]
    return length + len(before) - len(before.rstrip())
