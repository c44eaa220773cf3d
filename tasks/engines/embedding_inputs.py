"""From a text, or a pair of texts, to the tokens of a model for vectors or scores, as the model's repository says.

The files are those of Sentence Transformers: `modules.json` names the steps after the model, each with a folder of its
own; `config_sentence_transformers.json` has the prompts, and `sentence_bert_config.json` the greatest length.
Rerankers that are language models are asked for a "yes" or a "no" in the form that Qwen3-Reranker was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_huggingface.blocks import EmbeddingOptions
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate, read_json, read_special_tokens
from prefect_huggingface.tasks.engines.detokenizer import RustTokenizer
from prefect_huggingface.tasks.engines.inputs import (
    InputProcessor,
    check_characters,
    check_text,
    context_length_of,
    fit_context,
    resolve_options,
    vocabulary_of,
)
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Request
from prefect_huggingface.tasks.storage.exports.vector_exports import ANSWERS, is_causal

if TYPE_CHECKING:
    import numpy as np

POOLINGS = {
    "cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last_token", "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max", "pooling_mode_lasttoken": "last_token",
}  # fmt: skip
DENSE_ACTIVATIONS = ("Identity", "Tanh")
# Their positions begin after the padding token, so that the last ones of the table are not to be had.
SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text", "longformer")
QUERY_PROMPTS, DOCUMENT_PROMPTS = ("query",), ("document", "passage", "corpus")
# The form of Qwen3-Reranker, which is part of the model: other words give other scores.
RANKING_START = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
RANKING_END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
RANKING_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """Linear layer after the pooling: `weight` of [outputs, inputs], `bias` of [outputs], and an activation."""

    weight: np.ndarray
    bias: np.ndarray | None
    activation: str


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Tokens of one text or pair, and how its vector is made.

    Attributes:
        ids: Tokens, the special ones included.
        type_ids: 0 for the first text of a pair and 1 for the second.
        options: Options of the request over those of the model.
    """

    ids: list[int]
    type_ids: list[int]
    options: EmbeddingOptions


class ModelFiles:
    """What the files of a model folder say about its vectors or scores.

    Attributes:
        config: Content of `config.json`.
        options: Options of the caller over what the files say, complete.
        dense: Linear layers after the pooling.
        prompts: Prompts by their names.
        default_prompt_name: Name of the prompt for texts that ask for none, or None.
    """

    def __init__(self, folder: Path, given: EmbeddingOptions) -> None:
        """Read the files of a checkpoint or an export.

        Raises:
            EngineError: If the vectors of the model are made in a way that is not known here.
        """
        self.folder = folder
        self.config = read_json(folder / "config.json")
        sentence = read_json(folder / "config_sentence_transformers.json")
        self.dense: tuple[DenseLayer, ...] = ()
        found: dict[str, Any] = {"pooling": "mean", "normalize": False, **self._read_modules()}
        prompts = self.prompts = {name: text or "" for name, text in (sentence.get("prompts") or {}).items()}
        self.default_prompt_name: str | None = sentence.get("default_prompt_name")
        default = prompts.get(self.default_prompt_name or "")
        found["query_prompt"] = _first(prompts, QUERY_PROMPTS, default)
        found["document_prompt"] = _first(prompts, DOCUMENT_PROMPTS, default)
        found["dimensions"] = sentence.get("truncate_dim")
        found["activation"] = given.activation or self._activation()
        given = given.model_copy(update={"max_length": self._max_length(given.max_length)})
        self.options = EmbeddingOptions(**found).merged(given)

    @property
    def is_causal(self) -> bool:
        """Whether the checkpoint is a language model, which answers with "yes" or "no"."""
        return is_causal(self.config)

    @property
    def is_scored(self) -> bool:
        """Whether the checkpoint has a head for scores."""
        return any("ForSequenceClassification" in str(name) for name in self.config.get("architectures") or [])

    @property
    def lowers_case(self) -> bool:
        """Whether texts are put into small letters first."""
        return bool(self._lengths.get("do_lower_case"))

    @cached_property
    def _lengths(self) -> dict[str, Any]:
        # The file is named after the first family that it was for, most often sentence_bert_config.json.
        places = [self.folder / "sentence_bert_config.json", *sorted(self.folder.glob("sentence_*_config.json"))]
        return next((found for path in places if (found := read_json(path))), {})

    def _read_modules(self) -> dict[str, Any]:
        """Return what the steps after the model say."""
        try:
            modules = json.loads((self.folder / "modules.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as exc:
            raise EngineError(
                f"{str(self.folder / 'modules.json')!r} cannot be read: {exc}. Download it again."
            ) from exc
        found: dict[str, Any] = {}
        for module in modules:
            kind, folder = str(module.get("type", "")).rpartition(".")[2], self.folder / str(module.get("path", ""))
            if kind == "Pooling":
                found["pooling"] = _pooling_of(read_json(folder / "config.json"), folder)
            elif kind == "Normalize":
                found["normalize"] = True
            elif kind == "Dense":
                self.dense += (_read_dense(folder),)
            elif kind not in ("Transformer", "Dropout", "LogitScore"):
                raise EngineError(
                    f"The model in {str(self.folder)!r} has a step {kind!r} that is not known here. Use another model."
                )
        return found

    def _max_length(self, given: int | None) -> int | None:
        positions = context_length_of(self.config)
        if positions is not None and self.config.get("model_type") in SHIFTED_POSITIONS:
            positions -= int(self.config.get("pad_token_id", 1)) + 1
        stated = given or self._lengths.get("max_seq_length")
        tokenizer = read_json(self.folder / "tokenizer_config.json").get("model_max_length")
        limits = [positions, stated or (tokenizer if isinstance(tokenizer, int | float) else None)]
        known = [int(limit) for limit in limits if limit]
        return min(known) if known else None

    def _activation(self) -> str:
        named = (self.config.get("sentence_transformers") or {}).get("activation_fn") or self.config.get(
            "sbert_ce_default_activation_function"
        )
        if named is None:
            # As Sentence Transformers does; a head of two outputs is the default, which configurations leave out.
            return "sigmoid" if self.is_causal or len(self.config.get("id2label") or (0, 1)) == 1 else "none"
        kind = str(named).rpartition(".")[2]
        if kind not in ("Sigmoid", "Identity"):
            raise EngineError(
                f"The model in {str(self.folder)!r} makes its scores by {named!r}, which is not known here. "
                "Set `activation` of the options to 'sigmoid' or 'none'."
            )
        return "sigmoid" if kind == "Sigmoid" else "none"


class EmbeddingInputs(InputProcessor):
    """Makes the tokens of texts and pairs of one model.

    Attributes:
        files: What the folder of the model says.
        is_ranker: Whether each request is a pair.
        pad_id: Token to fill up rows with.
    """

    def __init__(self, folder: Path, files: ModelFiles, tokenizer: RustTokenizer, is_ranker: bool) -> None:
        super().__init__(ChatTemplate({}))
        self.files, self.is_ranker = files, is_ranker
        self.tokenizer, self._rust = tokenizer, tokenizer.rust
        self.context_length, self.vocabulary = files.options.max_length, vocabulary_of(files.config)
        pad = read_special_tokens(folder).get("pad_token")
        found = None if pad is None else self._rust.token_to_id(pad)
        self.pad_id = int(files.config.get("pad_token_id") or 0) if found is None else found
        self.answer_ids = tuple(self._rust.token_to_id(answer) for answer in ANSWERS)
        self._cutting: dict[tuple[int, str], Any] = {}

    def begin(self, state: RequestState) -> None:
        """Understand a request: begin its state, or end it where it is to be skipped.

        Raises:
            RequestError: If the text is empty or too long, or its options do not fit the model.
        """
        request = state.request
        options = resolve_options(self.defaults, request)
        chosen = self.files.options.merged(request.embedding)
        self._check(request, bool(chosen.allow_empty))
        known = [length for length in (chosen.max_length, self.context_length) if length]
        limit = min(known, default=None)
        if options.context_overflow == "error":
            check_characters(f"{request.prompt}{request.pair or ''}", limit)
        encode = self._rank if self.is_ranker else self._embed
        encoded = encode(request, chosen)
        if not encoded.ids:
            raise RequestError("empty_prompt", "The text has no tokens, and the model adds none. Fill it in.")
        fitting = fit_context(encoded.ids, options, limit)
        if fitting is None:
            state.skip(len(encoded.ids))
            return
        if len(fitting) < len(encoded.ids):
            # Cut again, so that the special tokens around the text stay.
            encoded = encode(request, chosen, (len(fitting), options.context_overflow.removeprefix("truncate_")))
        self.check_ids(encoded.ids)
        state.begin(options, encoded.ids, None)
        state.encoded = encoded

    def _check(self, request: Request, allow_empty: bool) -> None:
        if self.is_ranker and request.pair is None:
            raise RequestError("invalid_prompt", "The model scores pairs of texts. Use `rerank_texts`.")
        if not self.is_ranker and (request.input_type is None or request.pair is not None):
            raise RequestError("invalid_prompt", "The model makes vectors of texts. Use `embed_texts`.")
        for text in (request.prompt, request.pair) if self.is_ranker else (request.prompt,):
            if not (allow_empty and isinstance(text, str) and not text.strip()):
                check_text(text)

    def _embed(self, request: Request, options: EmbeddingOptions, cut: tuple[int, str] | None = None) -> EncodedText:
        prompt = options.query_prompt if request.input_type == "query" else options.document_prompt
        text = f"{prompt or ''}{request.prompt}"
        return self._encode((text.lower() if self.files.lowers_case else text,), options, cut)

    def _rank(self, request: Request, options: EmbeddingOptions, cut: tuple[int, str] | None = None) -> EncodedText:
        if not self.files.is_causal:
            return self._encode((request.prompt or "", request.pair or ""), options, cut)
        start, end = self._frame
        told = options.instruction or RANKING_INSTRUCTION
        # What looks like the end of a turn in a text is text.
        text = f"<Instruct>: {told}\n<Query>: {request.prompt}\n<Document>: {request.pair}"
        middle = self._as_text.encode(text, add_special_tokens=False).ids
        if cut is not None:
            room = max(cut[0] - len(start) - len(end), 0)
            middle = middle[:room] if cut[1] == "right" else middle[len(middle) - room :]
        ids = [*start, *middle, *end]
        return EncodedText(ids, [0] * len(ids), options)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        encode = self.tokenizer.encode
        return encode(RANKING_START, add_special_tokens=False), encode(RANKING_END, add_special_tokens=False)

    @cached_property
    def _as_text(self) -> Any:
        copy = _copy_of(self._rust)
        copy.encode_special_tokens = True
        return copy

    def _encode(self, texts: tuple[str, ...], options: EmbeddingOptions, cut: tuple[int, str] | None) -> EncodedText:
        rust = self._rust
        if cut is not None and cut in self._cutting:
            rust = self._cutting[cut]
        elif cut is not None:
            # A tokenizer that cuts keeps the special tokens around a text.
            rust = self._cutting[cut] = _copy_of(self._rust)
            rust.enable_truncation(cut[0], direction=cut[1])
        encoding = rust.encode(*texts)
        return EncodedText(encoding.ids, encoding.type_ids, options)


def _copy_of(rust: Any) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(rust.to_str())


def _pooling_of(config: Mapping[str, Any], folder: Path) -> str:
    modes = config.get("pooling_mode") or [name for name, value in config.items() if name in POOLINGS and value is True]
    modes = [modes] if isinstance(modes, str) else list(modes)
    unknown = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in POOLINGS or len(unknown) > 1:
        raise EngineError(
            f"{str(folder)!r} asks for the pooling {modes or unknown}, which is none of "
            f"{', '.join(sorted(set(POOLINGS.values())))}. Use another model."
        )
    if config.get("include_prompt") is False:
        raise EngineError(f"{str(folder)!r} leaves prompts out of its pooling, which is not known here.")
    return POOLINGS[modes[0]]


def _read_dense(folder: Path) -> DenseLayer:
    config, path = read_json(folder / "config.json"), folder / "model.safetensors"
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if not path.is_file() or activation not in DENSE_ACTIVATIONS:
        raise EngineError(
            f"The layer in {str(folder)!r} needs `model.safetensors` and an activation of {DENSE_ACTIVATIONS}, got "
            f"{activation!r}. Use another model."
        )
    from safetensors.numpy import load_file

    tensors = load_file(path)
    return DenseLayer(tensors["linear.weight"], tensors.get("linear.bias"), activation)


def _first(prompts: Mapping[str, Any], names: tuple[str, ...], default: Any) -> str | None:
    found = next((prompts[name] for name in names if prompts.get(name) is not None), default)
    return None if found is None else str(found)
