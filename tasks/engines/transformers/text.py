"""Text generation with a causal language model of Transformers, on the CPU or on GPUs.

Requests join a running batch as soon as there is room and leave it when they end: a long answer holds up nobody.
Models whose state is more than keys and values run in whole batches, and beam search runs request by request.

In float32 a greedy answer does not depend on the rows beside it, but for scores that are equal up to rounding (about
1e-6 of their size). In bfloat16 and float16 such near ties are common; `EngineOptions(max_num_seqs=1)` runs every
request alone, which makes its text independent of the others at any precision.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.answers import Answer
from prefect_huggingface.tasks.engines.prompts import PromptWriter
from prefect_huggingface.tasks.engines.transformers.answer_engine import AnswerEngine
from prefect_huggingface.tasks.engines.transformers.dense_batch import DenseBatch, can_join
from prefect_huggingface.tasks.engines.transformers.loading import load_tokenizer, load_torch_model
from prefect_huggingface.tasks.engines.transformers.sampling import choose_tokens, log_probabilities
from prefect_huggingface.tasks.engines.transformers.sizes import EngineSizes, free_cached_memory, is_out_of_memory
from prefect_huggingface.tasks.engines.transformers.text_jobs import TextJobs
from prefect_huggingface.tasks.engines.transformers.tokenization import pad_token
from prefect_huggingface.tasks.engines.transformers.whole_batches import (
    padded_inputs,
    prepare_model,
    run_beams,
    run_whole_batch,
)

logger = get_logger(__name__)


class TorchTextEngine(AnswerEngine):
    """Causal language model in one thread, with a batch that requests join and leave."""

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Load a model.

        Args:
            path: Folder of the snapshot.
            model: Settings.

        Raises:
            ModelSourceError: If the folder holds no weights that may be loaded.
            EngineError: If the settings do not fit this machine or this model.
        """
        loaded = load_torch_model(path, model, "AutoModelForCausalLM")
        self._start(loaded, load_tokenizer(path, model), PromptWriter.of_folder(path, model.chat_template), model)

    def _start(self, loaded: Any, tokenizer: Any, writer: PromptWriter, model: LocalModel) -> None:
        jobs = TextJobs(loaded, tokenizer, writer, model.options)
        pad = pad_token(tokenizer, jobs.end_ids)
        self._model = prepare_model(loaded, pad)
        self._batch = DenseBatch(self._model, pad)
        self._joinable = can_join(self._model)
        self._at_once = 0
        super().__init__(jobs, EngineSizes.of(loaded, model.engine))

    def _forget(self) -> None:
        super()._forget()
        self._batch.clear()

    def _free(self) -> None:
        del self._model, self._batch

    def _turn(self) -> None:
        import torch

        self._end_what_must()
        try:
            with torch.inference_mode():
                self._admit()
                self._at_once = len(self._batch.answers)
                if self._batch.answers:
                    self._advance(self._batch.answers, self._batch.step())
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            self._make_room()
        self._leave()

    def _admit(self) -> None:
        """Let as many answers join as there is room for."""
        while self._waiting:
            if self._waiting[0].job.options.num_beams > 1:
                self._at_once = 1
                self._search(self._waiting[0].job.answers)
                continue
            self._sizes.bytes_per_token = self._batch.bytes_per_token or self._sizes.bytes_per_token
            room = self._sizes.room(self._batch.answers, self._waiting)
            if not room:
                return
            answers = [self._waiting.popleft() for _ in range(room)]
            self._at_once = len(self._batch.answers) + room
            try:
                self._begin(answers)
            except BaseException:
                self._waiting.extendleft(answer for answer in reversed(answers) if answer not in self._batch.answers)
                raise
            self._leave()

    def _begin(self, answers: list[Answer]) -> None:
        if self._joinable:
            self._advance(answers, self._batch.join(answers))
        else:
            inputs = padded_inputs([answer.all_tokens for answer in answers], self._model, left=True)
            run_whole_batch(self._model, answers, inputs, self._jobs.take)

    def _search(self, answers: list[Answer]) -> None:
        """Run one request with beam search."""
        job = answers[0].job
        inputs = padded_inputs([job.prompt_ids], self._model, left=True)
        run_beams(self._model, job, inputs, self._jobs.take, self._jobs.tokenizer.decode)
        self._leave()

    def _advance(self, answers: list[Answer], scores: Any) -> None:
        """Give each answer its next token."""
        tokens = choose_tokens([answer.chooser for answer in answers], scores)
        asked = [row for row, answer in enumerate(answers) if answer.wants_logprobs]
        logprobs = dict(zip(asked, log_probabilities(scores, asked, tokens), strict=True))
        for row, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
            self._jobs.take(answer, token, logprobs.get(row))

    def _leave(self) -> None:
        """Complete the jobs that are done and take their answers out."""
        self._batch.leave({row for row, answer in enumerate(self._batch.answers) if answer.finish_reason is not None})
        super()._leave()

    def _make_room(self) -> None:
        """Go on with fewer answers at once after the memory ran out; the others go on from where they are later."""
        answers = self._batch.clear()
        free_cached_memory()
        self._waiting.extendleft(reversed(answers))
        if self._at_once > 1:
            self._sizes.lower(self._at_once)
            logger.warning("The memory ran out with %d answers at once; going on with fewer.", self._at_once)
        else:
            self._give_up(self._waiting[0])

    def _give_up(self, answer: Answer) -> None:
        """Fail a request that does not fit, even alone."""
        del self._running[answer.job]
        self._waiting = deque(other for other in self._waiting if other.job is not answer.job)
        answer.job.submission.fail(
            "out_of_cache",
            "The request does not fit into the memory of the device, even alone. "
            "Shorten the prompt, lower `max_new_tokens`, or use a larger device.",
        )
