"""Text generation with OpenVINO: one thread owns one continuous batch, which every caller of the process shares.

A row that fails takes nobody with it. What is wrong with a request is found before the model sees it, where that is
possible; when a step fails nevertheless, the rows in it go back to the queue, and those that were new in it are tried
one at a time, so that the one that makes steps fail is known.

In full precision (`openvino_devices.EXACT_PROPERTIES`) the greedy text of a row is the same alone, in any batch and
streamed. OpenVINO's own defaults round differently in different batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.answers import Submission
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.openvino.codec import (
    GenaiCodec,
    TextCodec,
    load_rust_codec,
    read_context_length,
    read_end_tokens,
)
from prefect_huggingface.tasks.engines.openvino.devices import choose_device, compile_properties, kv_cache_precision
from prefect_huggingface.tasks.engines.openvino.genai_options import check_options, generation_config
from prefect_huggingface.tasks.engines.openvino.genai_pipelines import GenaiPipeline, last_line
from prefect_huggingface.tasks.engines.openvino.genai_rows import CacheExhausted, Row
from prefect_huggingface.tasks.engines.openvino.scheduling import choose_sizes
from prefect_huggingface.tasks.engines.prompts import PromptWriter, fit_context, refuse_images, resolve_options
from prefect_huggingface.tasks.engines.row_queue import RowQueue
from prefect_huggingface.tasks.engines.threads import ThreadedEngine
from prefect_huggingface.tasks.records import ErrorCode

logger = get_logger(__name__)

# The pipeline keeps the interpreter to itself during a step. After a row has ended, callers get this long to react.
REACTION_SECONDS = 0.002


class OpenVINOTextEngine(ThreadedEngine):
    """Causal language model in one continuous batch."""

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load a model.

        Args:
            path: Folder of the OpenVINO model.
            model: Settings.

        Raises:
            EngineError: If OpenVINO cannot load the model with these settings.
        """
        device, properties = choose_device(model), compile_properties(model)
        self.sizes = choose_sizes(path, model.engine, kv_cache_precision(device, properties))
        self._model = model
        with ThreadPoolExecutor(1) as beside:
            # OpenVINO compiles on one core and lets other threads run meanwhile.
            codec = beside.submit(load_rust_codec, path)
            self._pipeline = GenaiPipeline(path, device, properties, self.sizes, model.engine)
        self._codec: TextCodec = codec.result() or GenaiCodec(self._pipeline.tokenizer)
        self._end_tokens = read_end_tokens(path, self._pipeline.tokenizer)
        self._context_length = read_context_length(path)
        self.prompts = PromptWriter.of_folder(path, model.chat_template)
        self._queue = RowQueue(self.sizes.sequences, self.sizes.cache_tokens, model.engine.enable_prefix_caching)
        # More than fit, so that a place that gets free is taken in the same step.
        self.in_flight = self.sizes.sequences + max(self.sizes.sequences // 2, 8)
        super().__init__()

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self._codec.encode(text, add_special_tokens=False))

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""
        return self._context_length

    def _accept(self, submission: Submission) -> None:
        assert self.prompts is not None
        refuse_images(submission.request)
        options = resolve_options(self._model.options, submission.request)
        check_options(options)
        prompt = self.prompts.write(submission.request)
        tokens = self._codec.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
        fitting = fit_context(tokens, options, self._context_length)
        if fitting is None:
            submission.skip(len(tokens))
            return
        echo = prompt.text if options.echo else ""
        self._queue.append(Row(submission, options, fitting, frozenset(self._end_tokens), self._codec, echo))

    def _under_way(self) -> list[Submission]:
        return [row.submission for row in self._queue.rows]

    def _forget(self) -> None:
        for row in self._queue.rows:
            row.leave()
        self._queue.clear()
        self._pipeline.clear()

    def _free(self) -> None:
        del self._pipeline

    def _turn(self) -> None:
        self._end_what_must()
        for row in self._queue.admit():
            self._start(row)
        if self._queue.running:
            try:
                self._pipeline.step()
            except Exception as exc:
                self._recover(exc)
                return
        self._collect()

    def _start(self, row: Row) -> None:
        try:
            row.start(self._add)
        except RequestError as exc:
            self._give_up(row, exc.code, str(exc))
        except Exception as exc:
            # What the checks did not find, the pipeline refuses before it takes the row.
            self._give_up(row, "invalid_option", f"OpenVINO refuses the request: {last_line(exc)} Change its options.")

    def _add(self, tokens: Sequence[int], options: GenerationOptions, seed: int) -> Any:
        return self._pipeline.add(tokens, generation_config(options, self._end_tokens, self._model.engine, seed))

    def _collect(self) -> None:
        """Take the new tokens, and complete the rows that are done."""
        ended = False
        for row in list(self._queue.running):
            row.proven = True
            try:
                row.collect()
            except CacheExhausted:
                self._run_alone(row)
            except RequestError as exc:
                self._give_up(row, exc.code, str(exc))
            if row.is_done:
                ended = True
                self._queue.remove(row)
                row.leave()
                row.submission.complete(row.completion())
        if ended:
            self._let_callers_react()

    def _let_callers_react(self) -> None:
        limit = time.perf_counter() + REACTION_SECONDS
        while self._inbox.empty() and not self._queue.waiting and time.perf_counter() < limit:
            time.sleep(REACTION_SECONDS / 20)

    def _end_what_must(self) -> None:
        """End the rows that were cancelled or are past their deadline."""
        for row in self._queue.rows:
            reason = row.submission.must_end
            if reason is not None:
                self._queue.remove(row)
                row.end(reason)
                row.submission.complete(row.completion())

    def _run_alone(self, row: Row) -> None:
        """Run a row again that the full cache has cut off: first with no other beside it, then no more."""
        if row.alone or len(self._queue.running) == 1:
            capacity = self.sizes.cache_tokens
            self._give_up(
                row,
                "out_of_cache",
                f"The request with {len(row.prompt_tokens)} tokens and up to {row.options.max_new_tokens} new ones "
                f"does not fit into the KV cache of {capacity or 'unknown'} tokens. Shorten it, lower "
                "`max_new_tokens`, or set a larger `cache_size_gb`.",
            )
            return
        logger.warning("The KV cache is full; a request runs again with no other beside it.")
        row.alone = True
        row.restart()
        self._queue.put_back([row])

    def _recover(self, error: Exception) -> None:
        """Clear the pipeline after a failed step, and find out which row it was."""
        rows = list(self._queue.running)
        suspects = [row for row in rows if not row.proven] or rows
        for row in rows:
            row.restart()
        self._pipeline.clear()
        self._queue.put_back(rows)
        if len(suspects) == 1:
            self._blame(suspects[0], error)
        else:
            logger.warning("A step with %d requests failed: %s Trying them again.", len(rows), last_line(error))
            self._queue.suspect(suspects)

    def _blame(self, row: Row, error: Exception) -> None:
        if row.options.response_format is not None:
            self._give_up(
                row,
                "invalid_option",
                f"The response format cannot be made a grammar: {last_line(error)} Write it in simpler terms.",
            )
        else:
            self._give_up(row, "engine_error", f"The request makes the model fail: {last_line(error)} Change it.")

    def _give_up(self, row: Row, code: ErrorCode, message: str) -> None:
        self._queue.remove(row)
        row.leave()
        row.submission.fail(code, message, prompt_tokens=len(row.prompt_tokens), generated_tokens=row.generated_tokens)
