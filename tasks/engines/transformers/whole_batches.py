"""Runs a whole batch through `generate` of Transformers, with our own choice of tokens and our own ends.

For models that answers cannot join while they run: encoder-decoder models, models with images, models with a recurrent
state, and beam search. A row that ends early is filled up until the last one ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from prefect_huggingface.tasks.engines.answers import Answer, Job
from prefect_huggingface.tasks.engines.stopping import Decode
from prefect_huggingface.tasks.engines.transformers.loading import input_device
from prefect_huggingface.tasks.engines.transformers.sampling import choose_tokens, log_probabilities

Take = Callable[[Answer, int, float | None], None]

# What belongs to the model itself. All else of its generation settings is a matter of the request.
MODEL_SETTINGS = (
    "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "use_cache", "cache_implementation",
)  # fmt: skip


def prepare_model(loaded: Any, pad_token: int) -> Any:
    """Return a model that shares the weights of `loaded` and has no defaults for sampling, lengths and ends."""
    from transformers import GenerationConfig

    kept = {name: getattr(loaded.generation_config, name, None) for name in MODEL_SETTINGS}
    prepared = copy.copy(loaded)
    prepared.generation_config = GenerationConfig(
        pad_token_id=pad_token, **{name: value for name, value in kept.items() if value is not None}
    )
    return prepared


def run_whole_batch(model: Any, answers: Sequence[Answer], inputs: dict[str, Any], take: Take) -> None:
    """Generate answers, one per row, until all have ended.

    Args:
        model: Model of `prepare_model`.
        answers: One per row of the inputs.
        inputs: Arguments of `generate`: token ids, attention mask, images.
        take: Gives an answer its next token and, where asked for, its log probability.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    rows = _Rows(answers, take, model.generation_config.pad_token_id)
    with torch.inference_mode():
        model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(answer.tokens_left for answer in answers),
            logits_processor=LogitsProcessorList([rows.choose]),
            stopping_criteria=StoppingCriteriaList([rows.ended]),
        )


class _Rows:
    """The two hooks of `generate`: choose the tokens of the rows, and say which rows have ended."""

    def __init__(self, answers: Sequence[Answer], take: Take, pad_token: int) -> None:
        self._answers = answers
        self._take = take
        self._pad = pad_token

    def choose(self, input_ids: Any, scores: Any) -> Any:
        """Return scores that leave one token for each row."""
        import torch

        live = [row for row, answer in enumerate(self._answers) if answer.finish_reason is None]
        tokens = choose_tokens([self._answers[row].chooser for row in live], scores[live]) if live else []
        asked = [index for index, row in enumerate(live) if self._answers[row].wants_logprobs]
        logprobs = dict(zip(asked, log_probabilities(scores[live], asked, tokens) if asked else [], strict=True))
        chosen = torch.full((len(self._answers), 1), self._pad, device=scores.device)
        for index, (row, token) in enumerate(zip(live, tokens, strict=True)):
            chosen[row] = token
            self._take(self._answers[row], token, logprobs.get(index))
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)

    def ended(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return one truth value per row."""
        import torch

        for job in {id(answer.job): answer.job for answer in self._answers}.values():
            reason = None if job.is_done else job.submission.must_end
            if reason is not None:
                job.end(reason)
        return torch.tensor([answer.finish_reason is not None for answer in self._answers], device=input_ids.device)


def run_beams(model: Any, job: Job, inputs: dict[str, Any], take: Take, decode: Decode) -> None:
    """Generate the answers to one request by beam search. Their text comes at the end, in one piece.

    Args:
        model: Model of `prepare_model`.
        job: Request with its answers, the best one first.
        inputs: Arguments of `generate` for one row.
        take: Gives an answer its next token.
        decode: Gives the text of some tokens.
    """
    import torch
    from transformers import StoppingCriteriaList

    options = job.options
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    with torch.inference_mode():
        sequences = model.generate(
            **inputs,
            do_sample=False,
            num_beams=options.num_beams,
            num_return_sequences=options.n,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.min_new_tokens or None,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            eos_token_id=None if options.ignore_eos else sorted(job.end_ids),
            stopping_criteria=StoppingCriteriaList([_Interrupt(job, decode, start)]),
        )
    reason = job.submission.must_end
    for answer, sequence in zip(job.answers, sequences[:, start:].tolist(), strict=True):
        for token in sequence:
            if answer.finish_reason is None and token >= 0:
                take(answer, token, None)
    job.end(reason or "length")


class _Interrupt:
    """Ends a beam at a stop string, and all of them when the request must end."""

    def __init__(self, job: Job, decode: Decode, prompt_length: int) -> None:
        self._job = job
        self._decode = decode
        self._prompt_length = prompt_length
        # Every token but a special one has a byte or more.
        self._tail = max((len(stop.encode()) for stop in job.options.stop), default=0) + 8

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        if self._job.submission.must_end is not None:
            return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        stops = self._job.options.stop
        tails = input_ids[:, self._prompt_length :][:, -self._tail :].tolist() if stops else [[]] * len(input_ids)
        ended = [any(stop in text for stop in stops) for text in map(self._decode, tails)]
        return torch.tensor(ended, device=input_ids.device)


def padded_inputs(rows: Sequence[Sequence[int]], model: Any, *, left: bool) -> dict[str, Any]:
    """Return token ids and attention mask, [rows, longest], filled up on the left or on the right."""
    import torch

    longest, pad = max(map(len, rows)), model.generation_config.pad_token_id
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    device = input_device(model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
