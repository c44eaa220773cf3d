"""Text generation with OpenVINO: one thread owns one continuous batch, which every caller of the process shares.

A request that fails takes nobody with it. What is wrong with it is found before the model sees it, where that is
possible. When a step fails nevertheless, the requests in it go back to the queue, and they run with fewer and fewer
others until the one that makes steps fail is alone.

In full precision (`EXACT_PROPERTIES`) the greedy text of a request is the same alone, in any batch and
streamed. OpenVINO's own defaults round differently in different batches.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.chat_templates import read_json
from prefect_huggingface.tasks.engines.conversations import Prompt
from prefect_huggingface.tasks.engines.detokenizer import GenaiTokenizer, RustTokenizer, Tokenizer
from prefect_huggingface.tasks.engines.inputs import (
    InputProcessor,
    context_length_of,
    longrope_border,
    read_end_tokens,
    vocabulary_of,
)
from prefect_huggingface.tasks.engines.multimodal import IN_FLIGHT, MultimodalInputProcessor
from prefect_huggingface.tasks.engines.openvino_runtime import (
    NO_TOKEN,
    GenaiPipeline,
    apply_tuning,
    check_options,
    choose_device,
    compile_properties,
    generation_config,
    kv_cache_precision,
    last_line,
    scoring_config,
)
from prefect_huggingface.tasks.engines.openvino_scheduler import ScheduledRequest, Scheduler, choose_sizes
from prefect_huggingface.tasks.engines.request_state import RequestState, Sequence
from prefect_huggingface.tasks.engines.worker import EngineWorker
from prefect_huggingface.tasks.records import ErrorCode
from prefect_huggingface.tasks.storage.adapters import check_fit, get_adapters
from prefect_huggingface.tasks.storage.files import link_file

logger = get_logger(__name__)

# The pipeline keeps the interpreter to itself during a step. After a request has ended, callers get this long to react.
REACTION_SECONDS = 0.002
PREPROCESSOR_FILE = "preprocessor_config.json"


class OpenVINOTextEngine(EngineWorker):
    """Causal language model in one continuous batch."""

    inputs_class: type[InputProcessor] = InputProcessor
    tuned = staticmethod(apply_tuning)

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load the OpenVINO model of a folder.

        Raises:
            EngineError: If OpenVINO cannot load the model with these settings.
        """
        device, properties = choose_device(model), compile_properties(model)
        adapters = get_adapters(model)
        check_fit(adapters, path)
        self.sizes = choose_sizes(path, model.engine, kv_cache_precision(device, properties))
        self._options = model.engine
        with ThreadPoolExecutor(1) as beside:
            # OpenVINO compiles on one core and lets other threads run meanwhile.
            rust = beside.submit(RustTokenizer.of_folder, path)
            self._load_pipeline = partial(GenaiPipeline, path, device, properties, self.sizes, adapters=adapters)
            self._pipeline = self._load_pipeline(model.engine)
        self._scorer: GenaiPipeline | None = None
        inputs = self.read_inputs(path, model, self._pipeline.tokenizer, rust.result())
        self._vocabulary = inputs.vocabulary or NO_TOKEN
        inputs.check = lambda options: check_options(options, model.engine, self._vocabulary)
        self._scheduler = Scheduler(self.sizes.sequences, self.sizes.cache_tokens, model.engine.enable_prefix_caching)
        self._scheduled: dict[RequestState, ScheduledRequest] = {}
        self._patience = REACTION_SECONDS
        # More than fit, so that a place that gets free is taken in the same step.
        self.in_flight = self.sizes.sequences + max(self.sizes.sequences // 2, 8)
        super().__init__(inputs)

    @classmethod
    def read_inputs(cls, path: Path, model: LocalModel, genai: Any, rust: Tokenizer | None) -> InputProcessor:
        """Return what makes the prompts of a model folder.

        Args:
            path: Folder of the OpenVINO model.
            model: Model with its template and options.
            genai: Tokenizer of OpenVINO GenAI.
            rust: Tokenizer of a `tokenizer.json`, which is faster, or None where the folder has none.
        """
        inputs = cls.inputs_class.of_folder(path, model.chat_template)
        inputs.defaults = model.options
        settings = read_json(path / "config.json")
        # Across the border of longrope, text would depend on the requests beside it and on the prefix cache.
        length = longrope_border(settings) or context_length_of(settings)
        ends = read_end_tokens(path, int(genai.get_eos_token_id()))
        # GenAI 2026.4 takes tokens without a score for places in memory.
        inputs.bind(rust or GenaiTokenizer(genai), ends, length, vocabulary_of(settings))
        return inputs

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that the last step used, 0 to 1."""
        return 0.0 if self._closed else self._pipeline.cache_usage

    def add(self, state: RequestState) -> None:
        """Put a request at the end of the queue."""
        self._patience = REACTION_SECONDS
        request = self._scheduled[state] = ScheduledRequest(state)
        self._scheduler.append(request)

    def remove(self, state: RequestState) -> None:
        """Take a request out of the queue and out of the pipeline."""
        request = self._scheduled.pop(state, None)
        if request is not None:
            self._scheduler.remove(request)
            request.cancel()

    def reset(self) -> None:
        """Clear the pipeline; it is loaded again where that is not possible."""
        self._scheduler.clear()
        self._pipeline.clear()
        self._scorer = None

    def release(self) -> None:
        """Let go of the model, and before of what runs in it: OpenVINO GenAI complains about what is left."""
        for request in self._scheduled.values():
            request.cancel()
        for pipeline in filter(None, (self._pipeline, self._scorer)):
            pipeline.drain()
        del self._pipeline, self._scorer, self._load_pipeline

    def leftovers(self) -> list[str]:
        """Return what is still in the scheduler."""
        return [
            f"request {request.state.request.id!r}"
            for request in (*self._scheduled.values(), *self._scheduler.requests)
        ]

    def finished(self) -> None:
        """Let callers react before the next step. Each time that nobody does, the next gets half of the time."""
        limit = time.perf_counter() + self._patience
        self._patience /= 2
        while self._inbox.empty() and not self._scheduler.waiting and time.perf_counter() < limit:
            time.sleep(REACTION_SECONDS / 20)

    def step(self) -> None:
        """Let requests in, do one step of the model for all that run, and take the new tokens."""
        for request in self._scheduler.admit():
            self._start(request)
        if self._pipeline.has_work:
            try:
                self._pipeline.step()
            except Exception as exc:
                self._recover(exc)
                return
        if self._scorer is not None and self._scorer.has_work:
            self._step_scores()
        for request in list(self._scheduler.running):
            request.stepped_once = True
            if not self._collect(request):
                self._run_alone(request)

    def _start(self, request: ScheduledRequest) -> None:
        sequences = request.state.sequences
        try:
            for sequence in sequences[:1] if request.state.options.num_beams > 1 else sequences:
                request.handles.append(self._submit(request, sequence))
        except Exception as exc:
            self._refuse_options(request, exc)

    def _refuse_options(self, request: ScheduledRequest, error: Exception) -> None:
        """Fail a request that the checks let through and the pipeline does not take."""
        self._fail(request, "invalid_option", f"OpenVINO refuses the request: {last_line(error)} Change its options.")

    def _submit(self, request: ScheduledRequest, sequence: Sequence) -> Any:
        """Put a sequence into the pipeline, from where it is, and return its handle."""
        state = request.state
        sequence.must_resubmit = False
        config = generation_config(
            state.options,
            [token for token in state.end_ids if token < self._vocabulary],
            self._options,
            seed=sequence.seed,
            new_tokens=sequence.tokens_left,
            least_tokens=sequence.least_tokens_left,
            response_format=sequence.response_format,
        )
        if state.multimodal is not None:
            text, images = state.multimodal.prepared
            return self._pipeline.add_with_images(text, images, config)
        if state.needs_choice_scores and sequence.phase == "answer" and not request.scoring:
            self._score_choices(request, sequence)
        return self._pipeline.add(sequence.context_ids, config)

    def _collect(self, request: ScheduledRequest) -> bool:
        """Give the sequences their tokens; return False where the pipeline gave the request up for want of cache."""
        state = request.state
        for place, handle in enumerate(request.handles):
            sequences = state.sequences if state.options.num_beams > 1 else state.sequences[place : place + 1]
            if not _are_running(sequences):
                continue
            if not _read_handle(handle, sequences) and handle.get_status().name == "IGNORED":
                return False
            if not _are_running(sequences):
                # A stop string or the end of a phase; the handle gives its room back in the next step.
                handle.cancel()
            if sequences[0].must_resubmit:
                try:
                    request.handles[place] = self._submit(request, sequences[0])
                except Exception as exc:
                    self._refuse_options(request, exc)
                    break
        return True

    def _score_choices(self, request: ScheduledRequest, sequence: Sequence) -> None:
        """Have the choices of a request scored, in a pipeline of their own that is loaded when it is first needed."""
        if self._scorer is None:
            options = self._options.model_copy(
                update={"enable_prefix_caching": False, "draft_model": None, "prompt_lookup_tokens": None}
            )
            self._scorer = self._load_pipeline(options)
        for ids in request.state.choice_ids:
            handle = self._scorer.add([*sequence.context_ids, *ids], scoring_config())
            request.scoring.append((handle, len(ids)))

    def _step_scores(self) -> None:
        """Do one step of the pipeline for scores, and take those of the requests whose choices all have one."""
        assert self._scorer is not None
        requests = [request for request in self._scheduler.running if request.scoring]
        try:
            self._scorer.step()
        except Exception as exc:
            self._scorer = None
            for request in requests:
                self._fail(request, "engine_error", f"The choices cannot be scored: {last_line(exc)} Ask for fewer.")
            return
        for request in requests:
            names = {handle.get_status().name for handle, _ in request.scoring}
            if "IGNORED" in names:
                self._fail(
                    request, "out_of_cache", "The prompt with its choices does not fit the KV cache. Shorten it."
                )
            elif names == {"FINISHED"}:
                # The last log probability is that of the token after the choice.
                outputs = [(handle.read_all()[0].generated_log_probs, count) for handle, count in request.scoring]
                request.state.set_choice_scores(sum(logprobs[-count - 1 : -1]) for logprobs, count in outputs)
                request.scoring = []

    def _run_alone(self, request: ScheduledRequest) -> None:
        """Run a request again that the full cache has cut off: first with no other beside it, then no more."""
        if request.runs_alone or len(self._scheduler.running) == 1:
            capacity = self.sizes.cache_tokens
            self._fail(
                request,
                "out_of_cache",
                f"The request with {request.state.prompt_tokens} tokens and up to "
                f"{request.state.options.max_new_tokens} new ones does not fit into the KV cache of "
                f"{capacity or 'unknown'} tokens. Shorten it, lower `max_new_tokens`, or set a larger `cache_size_gb`.",
            )
            return
        logger.warning("The KV cache is full; a request runs again with no other beside it.")
        request.runs_alone = True
        self._restart([request])

    def _recover(self, error: Exception) -> None:
        """Clear the pipeline after a failed step, and come closer to the request that it was."""
        requests = list(self._scheduler.running)
        fresh = [request for request in requests if not request.stepped_once]
        logger.warning("A step with %d requests failed: %s", len(requests), last_line(error))
        self._restart(requests)
        self._pipeline.clear()
        if len(requests) == 1:
            self._blame(requests[0], error)
        elif len(fresh) > 1:
            self._scheduler.quarantine(fresh)
        else:
            # The one that was new is the likeliest; where none was, it may be any of them.
            for request in fresh or requests:
                request.runs_alone = True

    def _restart(self, requests: list[ScheduledRequest]) -> None:
        for request in requests:
            request.cancel()
            request.state.restart()
            request.stepped_once = False
        self._scheduler.put_back(requests)

    def _blame(self, request: ScheduledRequest, error: Exception) -> None:
        if request.state.options.response_format is not None:
            message = f"The response format cannot be made a grammar: {last_line(error)} Write it in simpler terms."
            self._fail(request, "invalid_option", message)
        else:
            self._fail(request, "engine_error", f"The request makes the model fail: {last_line(error)} Change it.")

    def _fail(self, request: ScheduledRequest, code: ErrorCode, message: str) -> None:
        request.state.fail(code, message)
        self.remove(request.state)


def _are_running(sequences: list[Sequence]) -> bool:
    # Asked for every request in every step: a loop is half the price of `any`.
    for sequence in sequences:
        if sequence.is_running:
            return True
    return False


def _read_handle(handle: Any, sequences: list[Sequence]) -> bool:
    """Give the sequences what a handle holds, the best answer first, and return whether there were tokens."""
    has_tokens = False
    while handle.can_read():
        outputs = list(handle.read().values())
        if len(outputs) > 1:
            outputs.sort(key=lambda output: -output.score)
        for sequence, output in zip(sequences, outputs, strict=False):
            tokens = output.generated_ids
            has_tokens = has_tokens or bool(tokens)
            for token, logprob in zip(tokens, output.generated_log_probs or [None] * len(tokens), strict=False):
                sequence.append(token, logprob)
            if sequence.is_running and output.finish_reason.name != "NONE":
                sequence.finish("length" if output.finish_reason.name == "LENGTH" else "stop")
    return has_tokens


class OpenVINOVisionInputs(MultimodalInputProcessor):
    """Prompts with the tags of OpenVINO GenAI in the places of the images."""

    def _tokenize(self, state: RequestState, prompt: Prompt) -> list[int]:
        images, text, mark = state.multimodal.images, prompt.text, self.image_mark
        tags = [f"<ov_genai_image_{number}>" for number in range(len(images))]
        for number, tag in enumerate(tags):
            # A text that has been through the template has the template's own marks.
            text = text.replace(mark, tag, 1) if mark and tag not in text else text
            if mark and tag not in text:
                raise RequestError(
                    "invalid_prompt",
                    f"The prompt has places for {number} of its {len(images)} images. Write {mark!r} where each "
                    "belongs, or give messages.",
                )
        state.multimodal.prepared, state.multimodal.images = (text, [_tensor(image) for image in images]), []
        for tag in tags:
            text = text.replace(tag, "", 1)
        return self.tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens)

    def place_images(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with a tag as text for each image."""
        tagged, count = [], 0
        for message in messages:
            parts = []
            for part in message["content"]:
                is_image = part["type"] == "image"
                # OpenVINO GenAI writes the line end after an image itself, for the models that want one.
                parts.append({"type": "text", "text": f"<ov_genai_image_{count}>"} if is_image else part)
                count += is_image
            tagged.append({**message, "content": parts})
        return tagged


class OpenVINOVisionEngine(OpenVINOTextEngine):
    """Model for images and text in one continuous batch.

    The number of prompt tokens is that of the text; OpenVINO GenAI does not tell how many tokens an image becomes.
    """

    inputs_class = OpenVINOVisionInputs

    def __init__(self, path: Path, model: LocalModel) -> None:
        self._view = link_preprocessor(path)
        try:
            super().__init__(self._view or path, model)
        except BaseException:
            self._remove_view()
            raise
        self.in_flight = IN_FLIGHT

    def release(self) -> None:
        """Let go of the model and of the folder of links."""
        super().release()
        self._remove_view()

    def _remove_view(self) -> None:
        if self._view is not None:
            shutil.rmtree(self._view, ignore_errors=True)


def link_preprocessor(path: Path) -> Path | None:
    """Return a folder of links with the settings for images where OpenVINO GenAI looks for them, None where they are.

    Newer versions of Transformers write them into the settings of the whole processor.
    """
    settings = read_json(path / "processor_config.json").get("image_processor")
    if (path / PREPROCESSOR_FILE).is_file() or not settings:
        return None
    view = Path(tempfile.mkdtemp(prefix="prefect-huggingface-images-"))
    for file in path.iterdir():
        link_file(file.resolve(), view / file.name)
    (view / PREPROCESSOR_FILE).write_text(json.dumps(settings), encoding="utf-8")
    return view


def _tensor(image: Any) -> Any:
    import numpy as np
    from openvino import Tensor

    return Tensor(np.asarray(image, dtype=np.uint8)[None])
