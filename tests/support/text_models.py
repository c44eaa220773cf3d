"""A real small model that generates token by token, for the servers of the tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """One generated token. Its text is empty while a character is incomplete; `held` is the text held back so far."""

    id: int
    text: str
    held: str
    logprob: float
    special: bool


class TextModel:
    """A causal model with its tokenizer, safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.context_length: int = self._model.config.max_position_embeddings
        self._end_ids = {self.tokenizer.eos_token_id, self._model.generation_config.eos_token_id}
        self._lock = threading.Lock()

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def write_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def generate(self, prompt: Sequence[int], settings: Mapping[str, Any]) -> Iterator[Piece]:
        """Yield the tokens one by one, the end token included, up to `max_new_tokens`.

        Args:
            prompt: Tokens of the prompt.
            settings: `max_new_tokens` and, for sampling, `do_sample`, `temperature` and `seed`; `choices` are texts of
                which the answer is one.
        """
        import torch

        generator = torch.Generator().manual_seed(settings.get("seed") or 0)
        tokens, cache, new, told = list(prompt), None, [], ""
        for _ in range(settings["max_new_tokens"]):
            with self._lock, torch.inference_mode():
                output = self._model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1].float()
            if settings.get("choices"):
                logits = self._constrain(logits, new, settings["choices"])
            token = self._choose(logits, settings, generator)
            tokens = [token]
            new.append(token)
            special = token in self._end_ids
            whole = self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text = told if whole.endswith(REPLACEMENT) else whole
            yield Piece(
                token, text[len(told) :], whole[len(text) :], float(logits.log_softmax(-1)[token]), special
            )  # fmt: skip
            told = text
            if special:
                return

    def _choose(self, logits: Any, settings: Mapping[str, Any], generator: Any) -> int:
        import torch

        if not settings.get("do_sample"):
            return int(logits.argmax())
        weights = (logits / (settings.get("temperature") or 1.0)).softmax(-1)
        return int(torch.multinomial(weights, 1, generator=generator))

    def _constrain(self, logits: Any, new: list[int], choices: Sequence[str]) -> Any:
        """Forbid every token after which the answer is no beginning of a choice."""
        written = len(new)
        rows = [self.encode(choice, special=False) for choice in choices]
        allowed = {row[written] for row in rows if row[:written] == new and len(row) > written}
        if any(row == new for row in rows):
            allowed |= self._end_ids
        forbidden = [token for token in range(len(logits)) if token not in allowed]
        return logits.index_fill(0, logits.new_tensor(forbidden, dtype=int), float("-inf"))
