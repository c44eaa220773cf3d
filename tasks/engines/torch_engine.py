"""Text generation with models of Transformers, from text and from images, on the CPU or on GPUs.

Requests join a running batch as soon as there is room and leave it when they end: a long answer holds up nobody.
Models whose state is more than keys and values, and encoder-decoder models (also those of Optimum on OpenVINO), run in
whole batches, and beam search runs request by request.

In float32 a greedy answer does not depend on the requests beside it, but for scores that are equal up to rounding
(about 1e-6 of their size). In bfloat16 and float16 such near ties are common; `EngineOptions(max_num_seqs=1)` runs
every request alone, which makes its text independent of the others at any precision.

`generate_batch` of Transformers (5.5, paged attention) does not do this work: 16 prompts of 16 to 96 tokens through a
model of 135M parameters in float32 on two cores gave 0.72 to 0.90 of the tokens per second and core of the batch here,
and 256 prompts in bfloat16 on an H100 0.15. It has no options, grammars, beams or seeds of single requests.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Collection
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.conversations import Prompt
from prefect_huggingface.tasks.engines.detokenizer import TransformersTokenizer
from prefect_huggingface.tasks.engines.inputs import InputProcessor, context_length_of, longrope_border
from prefect_huggingface.tasks.engines.memory import give_back_memory
from prefect_huggingface.tasks.engines.multimodal import IN_FLIGHT, MultimodalInputProcessor
from prefect_huggingface.tasks.engines.request_state import RequestState, Sequence
from prefect_huggingface.tasks.engines.structured import GrammarCompiler
from prefect_huggingface.tasks.engines.torch_batch import (
    EngineSizes,
    can_join,
    is_out_of_memory,
    padded_inputs,
    prepare_model,
    run_beams,
    run_whole_batch,
    score_continuations,
)
from prefect_huggingface.tasks.engines.torch_graphs import group_heads, make_batch
from prefect_huggingface.tasks.engines.torch_loading import (
    avoid_attention_plans,
    check_device,
    end_tokens,
    input_device,
    input_tokens,
    load_tokenizer,
    load_torch_model,
    pad_token,
)
from prefect_huggingface.tasks.engines.torch_sampling import Sampler, advance
from prefect_huggingface.tasks.engines.worker import EngineWorker
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.records import Request

logger = get_logger(__name__)

LANGUAGE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")
OUT_OF_MEMORY = (
    "The memory of the device ran out. Shorten the prompt, lower `max_new_tokens`, or set "
    "`EngineOptions(max_num_seqs=...)` to fewer requests at once."
)


class TorchEngine(EngineWorker):
    """What the engines on Transformers have in common: sequences and beam searches that wait, and their samplers.

    The requests of a computation that fails begin again with fewer others, until the one that makes it fail is alone.

    Attributes:
        auto_class: Class of Transformers that loads the model.
        processor_class: Class of Transformers that loads its tokenizer or processor.
        inputs_class: Makes the prompts.
    """

    auto_class: str
    processor_class = "AutoTokenizer"
    inputs_class: type[InputProcessor] = InputProcessor

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load the model of a snapshot.

        Raises:
            ModelSourceError: If the folder holds no weights that may be loaded.
            EngineError: If the settings do not fit this machine or this model.
        """
        inputs = self.inputs_class.of_folder(path, model.chat_template)
        loaded = self._load(path, model)
        self._start(loaded, load_tokenizer(path, model, self.processor_class), inputs, model)

    @classmethod
    def of_loaded(cls, loaded: Any, tokenizer: Any, model: LocalModel) -> Self:
        """Return an engine of a model and a tokenizer or processor that are loaded already. They are not changed."""
        avoid_attention_plans(loaded)
        engine = cls.__new__(cls)
        engine._start(loaded, tokenizer, cls.inputs_class.of_tokenizer(tokenizer), model)
        return engine

    def _load(self, path: Path, model: LocalModel) -> Any:
        return load_torch_model(path, model, self.auto_class)

    def _start(self, loaded: Any, tokenizer: Any, inputs: InputProcessor, model: LocalModel) -> None:
        """Take what is loaded, and start the thread."""
        text_tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        inputs.defaults = model.options
        self.tokenizer = TransformersTokenizer(text_tokenizer)
        length = context_length_of(loaded.config.to_dict())
        inputs.bind(self.tokenizer, end_tokens(loaded, text_tokenizer), length, input_tokens(loaded))
        vocabulary = loaded.config.get_text_config(decoder=True).vocab_size
        self._compiler = GrammarCompiler(text_tokenizer, vocabulary, inputs.end_ids)
        self._model = prepare_model(loaded, pad_token(text_tokenizer, inputs.end_ids))
        self._sizes = EngineSizes.of(loaded, model.engine)
        self._waiting: deque[Sequence] = deque()
        self._searches: deque[RequestState] = deque()
        # In how many computations each of them was that failed.
        self._suspects: Counter[RequestState] = Counter()
        self.in_flight = max(2 * self._sizes.sequences, 16)
        super().__init__(inputs)

    def add(self, state: RequestState) -> None:
        """Queue a beam search, or the sequences of a request."""
        if state.options.num_beams > 1:
            self._searches.append(state)
            return
        for sequence in state.sequences:
            self._enqueue_sequence(sequence)

    def remove(self, state: RequestState) -> None:
        """Take a request out of the queues."""
        self._suspects.pop(state, None)
        if state in self._searches:
            self._searches.remove(state)
        self._waiting = deque(sequence for sequence in self._waiting if sequence.state is not state)

    def reset(self) -> None:
        """Drop all that waits. A device that answers nobody any more raises."""
        self._waiting.clear()
        self._searches.clear()
        self._suspects.clear()
        check_device(self._model)

    def release(self) -> None:
        """Let go of the model."""
        del self._model

    def leftovers(self) -> list[str]:
        """Return what is still in the queues."""
        states = [*self._searches, *(sequence.state for sequence in self._waiting)]
        return [f"request {state.request.id!r}" for state in states]

    def _enqueue_sequence(self, sequence: Sequence) -> None:
        """Let a sequence wait, from where it is, with a sampler for what comes next, or end its request."""
        sequence.must_resubmit = False
        state, form = sequence.state, sequence.response_format
        try:
            sequence.sampler = Sampler(
                state.options,
                sequence.context_ids if self.inputs.is_continued else (),
                state.end_ids,
                seed=sequence.seed,
                grammar=None if form is None else self._compiler.compile(form),
                least_tokens=sequence.least_tokens_left,
            )
            if state.needs_choice_scores and sequence.phase == "answer":
                self._score_choices(sequence)
        except Exception as exc:
            self._blame(state, exc)
        else:
            self._waiting.append(sequence)

    def _score_choices(self, sequence: Sequence) -> None:
        """Score the choices of a request where its answer begins, or refuse it (`RequestError`)."""
        raise RequestError(
            "invalid_option",
            f"`choice_probabilities` works with models that go on from a text, got {sequence.state.choices!r:.100}. "
            "Leave it out.",
        )

    def _resubmit(self, sequences: list[Sequence]) -> None:
        """Let the sequences that begin another phase wait for it."""
        for sequence in sequences:
            if sequence.must_resubmit and sequence.finish_reason is None:
                self._enqueue_sequence(sequence)

    def _blame(self, state: RequestState, error: Exception) -> None:
        """End a request by its own error; one of a device that answers nobody any more raises."""
        if is_out_of_memory(error):
            give_back_memory()
            state.fail("out_of_memory", OUT_OF_MEMORY)
        else:
            check_device(self._model)
            state.fail_with(error, "The request makes the model fail", "Change it.")

    def _recover(self, error: Exception, sequences: Collection[Sequence]) -> None:
        """After a computation has failed, come closer to the request that makes it fail."""
        states = [state for state in dict.fromkeys(one.state for one in sequences) if not state.is_done]
        if len(states) == 1:
            self._blame(states[0], error)
            return
        check_device(self._model)
        if not states:
            raise error
        logger.warning("A step with %d requests failed; they begin again: %s", len(states), error)
        for state in states:
            failures = self._suspects[state] + 1
            self.remove(state)
            self._suspects[state] = failures
            state.restart()
            self.add(state)

    def _first_waiting(self) -> Collection[Sequence]:
        """Return the first of those that wait which may be computed together; a suspect is so with no other."""
        if not self._suspects:
            return self._waiting
        first = self._waiting[0].state
        if first in self._suspects:
            return [*takewhile(lambda one: one.state is first, self._waiting)]
        return [*takewhile(lambda one: one.state not in self._suspects, self._waiting)]

    def step(self) -> None:
        """Run the beam search that waits longest, and a whole batch of what waits."""
        if self._searches:
            self._search()
        if self._waiting:
            self._run_whole(self._next_group())

    def _next_group(self) -> list[Sequence]:
        """Take out the sequences that run next, side by side."""
        return [self._waiting.popleft() for _ in range(self._sizes.room([], self._first_waiting()))]

    def _inputs_of(self, sequences: list[Sequence]) -> dict[str, Any]:
        """Return the arguments of `generate`, one row for each sequence."""
        rows = [sequence.context_ids for sequence in sequences]
        return padded_inputs(rows, self._model, left=self.inputs.is_continued)

    def _search(self) -> None:
        state = self._searches.popleft()
        try:
            inputs = self._inputs_of(state.sequences[:1])
            run_beams(self._model, state, inputs, self.tokenizer, self.abort_if_due)
        except Exception as exc:
            self._blame(state, exc)

    def _run_whole(self, sequences: list[Sequence]) -> None:
        """Run sequences to their ends; after the memory ran out, those that have no token yet run with fewer others."""
        try:
            run_whole_batch(self._model, sequences, self._inputs_of(sequences), self.abort_if_due)
        except Exception as exc:
            if not is_out_of_memory(exc):
                self._recover(exc, sequences)
                return
            give_back_memory()
            self._sizes.lower(len(sequences))
            for sequence in reversed(sequences):
                if not sequence.is_running:
                    continue
                # What has begun may have been streamed, and it cannot be fed with its tokens again.
                if len(sequences) > 1 and not sequence.tokens:
                    self._waiting.appendleft(sequence)
                else:
                    sequence.state.fail("out_of_memory", OUT_OF_MEMORY)
        self._resubmit(sequences)


class TorchTextEngine(TorchEngine):
    """Causal language model in one thread, with a batch that requests join and leave."""

    auto_class = "AutoModelForCausalLM"

    def _load(self, path: Path, model: LocalModel) -> Any:
        loaded = super()._load(path, model)
        if model.attn_implementation is None and "attn_implementation" not in model.model_kwargs:
            group_heads(loaded)
        return loaded

    def _start(self, loaded: Any, tokenizer: Any, inputs: InputProcessor, model: LocalModel) -> None:
        self._joinable = can_join(loaded)
        self._border = longrope_border(loaded.config.to_dict())
        # What is computed now.
        self._computed: list[Sequence] = []
        super()._start(loaded, tokenizer, inputs, model)
        self._batch = make_batch(self._model, self._sizes)

    def remove(self, state: RequestState) -> None:
        """Take a request out of the queues and out of the batch."""
        super().remove(state)
        self._batch.leave({row for row, sequence in enumerate(self._batch.sequences) if sequence.state is state})

    def reset(self) -> None:
        """Drop all that waits and runs."""
        super().reset()
        self._batch.clear()

    def release(self) -> None:
        """Let go of the model."""
        super().release()
        del self._batch

    def leftovers(self) -> list[str]:
        """Return what is still in the queues and in the batch."""
        return super().leftovers() + [f"sequence of {one.state.request.id!r}" for one in self._batch.sequences]

    def step(self) -> None:
        """Let sequences in, and give every sequence of the batch its next token."""
        import torch

        with torch.inference_mode():
            if self._searches:
                self._search()
            self._isolated(self._admit)
            self._isolated(self._generate)

    def _isolated(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as exc:
            if is_out_of_memory(exc):
                self._make_room()
            else:
                self._recover(exc, self._computed)

    def _generate(self) -> None:
        """Give every sequence of the batch its next token."""
        self._computed = [*self._batch.sequences]
        if self._computed:
            advance(self._computed, self._batch.step())
            self._leave()

    def _score_choices(self, sequence: Sequence) -> None:
        found = score_continuations(
            self._model, sequence.context_ids, sequence.state.choice_ids, self._sizes.step_tokens
        )
        sequence.state.set_choice_scores(map(sum, found))

    def _admit(self) -> None:
        """Let as many sequences join as there is room for."""
        while self._waiting:
            if not self._joinable:
                self._run_whole(self._next_group())
                return  # those that have ended are completed, and the inbox is read
            self._sizes.bytes_per_token = self._batch.bytes_per_token or self._sizes.bytes_per_token
            running, first = self._batch.sequences, self._first_waiting()
            room = self._sizes.room(running, first, self._batch.tokens_for) if self._may_join() else 0
            if not room:
                return
            self._computed = sequences = [self._waiting.popleft() for _ in range(room)]
            try:
                scores = self._batch.join(sequences)
            except BaseException:
                self._waiting.extendleft(one for one in reversed(sequences) if one not in self._batch.sequences)
                raise
            advance(sequences, scores)
            self._leave()

    def _may_join(self) -> bool:
        """Return whether the first request that waits may run beside the others. One that failed twice is alone."""
        states = {one.state for one in (self._waiting[0], *self._batch.sequences)} if self._suspects else ()
        return len(states) < 2 or all(self._suspects[state] < 2 for state in states)

    def _leave(self) -> None:
        """Take out the sequences that have ended, or go on in another phase."""
        gone = {row: one for row, one in enumerate(self._batch.sequences) if not one.is_running}
        self._batch.leave(gone)
        self._resubmit(list(gone.values()))

    def _next_group(self) -> list[Sequence]:
        side = self._side_of(self._waiting[0])
        group = [one for one in self._first_waiting() if self._side_of(one) == side]
        group = group[: self._sizes.room([], group)]
        self._waiting = deque(one for one in self._waiting if one not in group)
        return group

    def _side_of(self, sequence: Sequence) -> Any:
        """Return on which side of the border of a longrope model a sequence stays; one that crosses it is alone."""
        if self._border is None or sequence.length > self._border:
            return "above"
        return "below" if sequence.length + sequence.tokens_left <= self._border else sequence

    def _make_room(self) -> None:
        """Go on with fewer sequences at once after the memory ran out; the others go on from where they are later."""
        sequences = [sequence for sequence in self._batch.clear() if sequence.is_running]
        give_back_memory()
        self._waiting.extendleft(reversed(sequences))
        at_once = len({*sequences, *self._computed})
        if at_once > 1:
            self._sizes.lower(at_once)
            logger.warning("The memory ran out with %d sequences at once; going on with fewer.", at_once)
        elif self._waiting:
            self._waiting[0].state.fail(
                "out_of_cache",
                "The request does not fit into the memory of the device, even alone. "
                "Shorten the prompt, lower `max_new_tokens`, or use a larger device.",
            )


class TorchVisionInputs(MultimodalInputProcessor):
    """Inputs that the processor of a model makes of text and images.

    Attributes:
        processor: Processor of Transformers.
        place: Device and data type of the model.
    """

    processor: Any
    place: tuple[Any, Any]

    def _tokenize(self, state: RequestState, prompt: Prompt) -> list[int]:
        images = state.multimodal.images
        # Processors count their own token or, as that of Gemma 3, what the template writes and they make tokens of.
        marks = [mark for mark in (self.image_mark, getattr(self.processor, "image_token", None)) if mark]
        places = [prompt.text.count(mark) for mark in marks]
        if places and len(images) not in places:
            # The model would fail in the middle of its work.
            raise RequestError(
                "invalid_prompt",
                f"The prompt has {places[0]} places for images ({marks[0]!r}), and there are {len(images)} images. "
                "Give each a place, or send messages.",
            )
        try:
            inputs = self.processor(
                text=[prompt.text],
                images=images or None,
                add_special_tokens=prompt.add_special_tokens,
                return_tensors="pt",
            )
        except Exception as exc:
            raise RequestError(
                "invalid_prompt",
                f"The processor of the model refuses the text with {len(images)} images: "
                f"{type(exc).__name__}: {exc}. Check that the prompt has a place for each image.",
            ) from exc
        state.multimodal.prepared, state.multimodal.images = dict(inputs.to(*self.place)), []
        ids: list[int] = inputs["input_ids"][0].tolist()
        return ids

    def check_ids(self, ids: Collection[int]) -> None:
        """Check nothing: tokens of images need have no input of their own."""


class TorchVisionEngine(TorchEngine):
    """Model for images and text in one thread. Requests run one by one."""

    auto_class, processor_class = "AutoModelForImageTextToText", "AutoProcessor"
    inputs_class = TorchVisionInputs

    def _start(self, loaded: Any, tokenizer: Any, inputs: InputProcessor, model: LocalModel) -> None:
        assert isinstance(inputs, TorchVisionInputs)
        inputs.processor = tokenizer
        inputs.place = (input_device(loaded), loaded.dtype)
        super()._start(loaded, tokenizer, inputs, model)
        self.in_flight = IN_FLIGHT

    def _next_group(self) -> list[Sequence]:
        return [self._waiting.popleft()]

    def _inputs_of(self, sequences: list[Sequence]) -> dict[str, Any]:
        inputs: dict[str, Any] = sequences[0].state.multimodal.prepared
        return inputs


class Seq2SeqInputs(InputProcessor):
    """Prompts of an encoder, with the words and the language tokens that a model wants. The context is theirs alone.

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


def engine_of_pipeline(pipeline: Any) -> TorchEngine:
    """Return an engine that runs the model of a pipeline object, with its tokenizer and on its device.

    The weights are shared. The pipeline itself is neither used nor changed; its settings for generation are not taken
    over. Plain prompts are taken as they are, messages go through the chat template of the tokenizer.

    Args:
        pipeline: Pipeline of Transformers for text, or for images and text. Its model is one of torch, or one of
            Optimum for OpenVINO.

    Raises:
        SettingsError: If it is no such pipeline.
    """
    loaded, tokenizer = getattr(pipeline, "model", None), getattr(pipeline, "tokenizer", None)
    if loaded is None or tokenizer is None or not hasattr(loaded, "generate"):
        raise SettingsError(
            f"`pipeline` must be a text pipeline of Transformers, got {type(pipeline)!r}. "
            "Make one with transformers.pipeline('text-generation', ...)."
        )
    # The block only carries the settings of the engine; the model is there already.
    name = str(getattr(loaded, "name_or_path", None) or "").rstrip("/").rpartition("/")[2]
    model = LocalModel.model_construct(model_id=name or "pipeline", backend="torch", task=pipeline.task)
    processor = getattr(pipeline, "processor", None)
    if pipeline.task == "image-text-to-text" and processor is not None:
        return TorchVisionEngine.of_loaded(loaded, processor, model)
    if loaded.config.is_encoder_decoder:
        return TorchSeq2SeqEngine.of_loaded(loaded, tokenizer, model)
    return TorchTextEngine.of_loaded(loaded, tokenizer, model)


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
