"""Forms of answers as grammars for the torch engines, with llguidance (the extra `structured`)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.structured import check_format

if TYPE_CHECKING:
    from torch import Tensor

# A model that may write any white space between two values can go on with it for ever.
JSON_SETTINGS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """State of one answer within a grammar."""

    def __init__(self, matcher: Any, end_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._end_ids = sorted(end_ids)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the scores with those of the tokens taken out that the grammar does not allow now.

        Args:
            scores: One per token of the vocabulary.
        """
        import numpy as np
        import torch

        if self._matcher.is_stopped():
            return _only(scores, self._end_ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[-1]].astype(bool))
        mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
        mask[: len(allowed)] = allowed
        return scores.masked_fill(~mask.to(scores.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class GrammarMaker:
    """Makes the grammars of one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: Collection[int]) -> None:
        """Take a tokenizer.

        Args:
            tokenizer: Tokenizer of Transformers.
            vocabulary: Number of scores of the model.
            end_ids: Tokens that end an answer.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._prepared: Any = None

    def make(self, form: ResponseFormat) -> Grammar:
        """Return the grammar for one answer.

        Raises:
            RequestError: If the form cannot be made a grammar, or what is needed for it is not installed.
        """
        check_format(form)
        if importlib.util.find_spec("llguidance") is None:
            raise RequestError(
                "invalid_option",
                "`response_format` needs llguidance on the torch backend, which is not installed. "
                'Install it with pip install "prefect-huggingface[structured]".',
            )
        from llguidance import LLMatcher

        matcher = LLMatcher(self._prepare(), _grammar_text(form))
        if matcher.is_error():
            raise RequestError(
                "invalid_option",
                f"The form of the answer cannot be made a grammar: {matcher.get_error()}. Write it in simpler terms.",
            )
        return Grammar(matcher, self._end_ids)

    def _prepare(self) -> Any:
        """Return the tokenizer of llguidance; it takes about a second for a large vocabulary."""
        if self._prepared is None:
            from llguidance.hf import from_tokenizer

            try:
                self._prepared = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._end_ids) or None
                )
            except ValueError as exc:
                raise RequestError(
                    "invalid_option", f"`response_format` does not work with the tokenizer of this model: {exc}."
                ) from exc
        return self._prepared


def _grammar_text(form: ResponseFormat) -> str:
    from llguidance import LLMatcher

    if form.json_schema is not None:
        text: str = LLMatcher.grammar_from_json_schema(json.dumps(form.json_schema), overrides=JSON_SETTINGS)
    elif form.regex is not None:
        text = LLMatcher.grammar_from_regex(form.regex)
    else:
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in form.choices or ())
        text = LLMatcher.grammar_from_lark(f"start: {choices}")
    return text


def _only(scores: Tensor, token_ids: list[int]) -> Tensor:
    import torch

    kept = torch.full_like(scores, float("-inf"))
    kept[token_ids] = scores[token_ids]
    return kept
