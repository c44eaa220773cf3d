"""Encoder-decoder models: text to text, summaries and translations, with Transformers or with OpenVINO.

Requests are worked on in whole batches of similar length. Streaming, stop strings, deadlines and the rest mean the same
as for text generation. The prompt is what the encoder reads; the context length counts the prompt only.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.conversations import Prompt
from prefect_huggingface.tasks.engines.inputs import InputProcessor
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.torch_engine import TorchEngine
from prefect_huggingface.tasks.records import Request

LANGUAGE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")


class Seq2SeqInputs(InputProcessor):
    """Prompts with the words and the language tokens that a model wants.

    Tokenizers such as those of NLLB, M2M100 and mBART mark languages with tokens. That of the prompt's language stands
    at its beginning or its end, that of the answer's is its first token.
    """

    is_continued = False

    def learn(self, tokenizer: Any, prefix: str) -> None:
        """Take the languages of a tokenizer of Transformers, and the words that stand before a prompt."""
        self._prefix = prefix
        self._languages, self._vocabulary = language_ids(tokenizer), len(tokenizer)
        self._language_tokens = frozenset(self._languages.values())

    def _resolve(self, request: Request) -> GenerationOptions:
        options = super()._resolve(request)
        for name in ("src_lang", "tgt_lang"):
            self._check(name, getattr(options, name))
        if (options.forced_bos_token_id or 0) >= self._vocabulary:
            raise RequestError(
                "invalid_option",
                f"`forced_bos_token_id` must be a token of the model, below {self._vocabulary}, got "
                f"{options.forced_bos_token_id}. Correct it.",
            )
        if options.tgt_lang is None:
            return options
        first = self._languages[options.tgt_lang]
        if options.forced_bos_token_id not in (None, first):
            raise RequestError(
                "invalid_option",
                f"`tgt_lang` {options.tgt_lang!r} means the first token {first}, and `forced_bos_token_id` is "
                f"{options.forced_bos_token_id}. Leave one of them out.",
            )
        return options.model_copy(update={"forced_bos_token_id": first})

    def _write(self, state: RequestState) -> Prompt:
        prompt = super()._write(state)
        if prompt.text.startswith(self._prefix):
            return prompt
        first, *rest = prompt.segments
        return Prompt((self._prefix + first, *rest), prompt.add_special_tokens)

    def _tokenize(self, state: RequestState, prompt: Prompt) -> list[int]:
        ids, language = super()._tokenize(state, prompt), state.options.src_lang
        if language is None:
            return ids
        token = self._languages[language]
        for place in (0, -1):
            if ids and ids[place] in self._language_tokens:
                return [token, *ids[1:]] if place == 0 else [*ids[:-1], token]
        return [token, *ids]

    def _reasoning_of(self, state: RequestState, prompt: Prompt) -> None:
        return None

    def _check(self, name: str, code: str | None) -> None:
        if code is None or code in self._languages:
            return
        if not self._languages:
            text = f"The tokenizer of this model has no languages, got `{name}` {code!r}. Leave it out."
            raise RequestError("invalid_option", text)
        near = get_close_matches(code, self._languages, n=3, cutoff=0.3) or sorted(self._languages)[:3]
        raise RequestError(
            "invalid_option",
            f"`{name}` must be one of the {len(self._languages)} languages of the tokenizer, got {code!r}. "
            f"Use {', '.join(map(repr, near))} for instance.",
        )


class TorchSeq2SeqEngine(TorchEngine):
    """Encoder-decoder model of Transformers in one thread."""

    auto_class = "AutoModelForSeq2SeqLM"
    inputs_class = Seq2SeqInputs

    def _start(self, loaded: Any, tokenizer: Any, inputs: InputProcessor, model: LocalModel) -> None:
        assert isinstance(inputs, Seq2SeqInputs)
        inputs.learn(tokenizer, task_prefix(loaded.config, model.task))
        super()._start(loaded, tokenizer, inputs, model)


class OpenVINOSeq2SeqEngine(TorchSeq2SeqEngine):
    """Encoder-decoder model of Optimum on OpenVINO."""

    def _load(self, path: Path, model: LocalModel) -> Any:
        from prefect_huggingface.tasks.engines.openvino_runtime import load_optimum_model

        return load_optimum_model(path, model, "OVModelForSeq2SeqLM")


def language_ids(tokenizer: Any) -> dict[str, int]:
    """Return the token of each language by its code; nothing where the tokenizer has no languages."""
    named = getattr(tokenizer, "lang_code_to_token", None)  # M2M100: 'de' is the token '__de__'
    codes = dict(named) if named else {text: text for text in tokenizer.get_added_vocab() if LANGUAGE.fullmatch(text)}
    return {code: tokenizer.convert_tokens_to_ids(token) for code, token in codes.items()}


def task_prefix(config: Any, task: str) -> str:
    """Return the words that a model such as T5 wants before the prompt of a task, empty where it says nothing.

    A model that was trained for several translations has no prefix for "translation" alone: the prompt must say which.
    """
    settings = getattr(config, "task_specific_params", None) or {}
    found = [
        str(values.get("prefix") or "")
        for name, values in settings.items()
        if isinstance(values, dict) and (name == task or (task == "translation" and name.startswith("translation_")))
    ]
    return found[0] if len(found) == 1 else ""
