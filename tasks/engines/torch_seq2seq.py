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
from prefect_huggingface.tasks.engines.inputs import InputProcessor
from prefect_huggingface.tasks.engines.torch_engine import TorchEngine

LANGUAGE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")


class TorchSeq2SeqEngine(TorchEngine):
    """Encoder-decoder model of Transformers in one thread."""

    auto_class = "AutoModelForSeq2SeqLM"

    def _start(self, loaded: Any, tokenizer: Any, inputs: InputProcessor, model: LocalModel) -> None:
        inputs.is_continued = False
        inputs.prefix = task_prefix(loaded.config, model.task)
        inputs.languages = Languages(tokenizer)
        super()._start(loaded, tokenizer, inputs, model)


class OpenVINOSeq2SeqEngine(TorchSeq2SeqEngine):
    """Encoder-decoder model of Optimum on OpenVINO."""

    def _load(self, path: Path, model: LocalModel) -> Any:
        from prefect_huggingface.tasks.engines.openvino_runtime import load_optimum_model

        return load_optimum_model(path, model, "OVModelForSeq2SeqLM")


class Languages:
    """The languages of a tokenizer that marks them with tokens, as those of NLLB, M2M100 and mBART do.

    The token of the prompt's language stands at its beginning or its end, that of the answer's is its first one.

    Args:
        tokenizer: Tokenizer of Transformers. It is not changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._ids = language_ids(tokenizer)
        self._tokens = frozenset(self._ids.values())

    def adapt(self, options: GenerationOptions) -> GenerationOptions:
        """Return the options with the first token of the answer.

        Raises:
            RequestError: If the tokenizer does not know a language.
        """
        for name in ("src_lang", "tgt_lang"):
            self._check(name, getattr(options, name))
        if options.tgt_lang is None:
            return options
        first = self._ids[options.tgt_lang]
        if options.forced_bos_token_id not in (None, first):
            raise RequestError(
                "invalid_option",
                f"`tgt_lang` {options.tgt_lang!r} means the first token {first}, and `forced_bos_token_id` is "
                f"{options.forced_bos_token_id}. Leave one of them out.",
            )
        return options.model_copy(update={"forced_bos_token_id": first})

    def mark_source(self, ids: list[int], options: GenerationOptions) -> list[int]:
        """Return the tokens of a prompt with that of its language."""
        if options.src_lang is None:
            return ids
        token = self._ids[options.src_lang]
        for place in (0, -1):
            if ids and ids[place] in self._tokens:
                return [token, *ids[1:]] if place == 0 else [*ids[:-1], token]
        return [token, *ids]

    def _check(self, name: str, code: str | None) -> None:
        if code is None or code in self._ids:
            return
        if not self._ids:
            text = f"The tokenizer of this model has no languages, got `{name}` {code!r}. Leave it out."
            raise RequestError("invalid_option", text)
        near = get_close_matches(code, self._ids, n=3, cutoff=0.3) or sorted(self._ids)[:3]
        raise RequestError(
            "invalid_option",
            f"`{name}` must be one of the {len(self._ids)} languages of the tokenizer, got {code!r}. "
            f"Use {', '.join(map(repr, near))} for instance.",
        )


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
