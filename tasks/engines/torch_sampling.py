"""Samples the next token of each sequence of a torch batch, by the options of that sequence alone.

A random sequence depends on its own seed and scores only, not on the rows beside it: every sequence draws from a
generator of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.request_state import Sequence

if TYPE_CHECKING:
    from torch import Tensor

    from prefect_huggingface.tasks.engines.structured import Grammar

Adjustment = Callable[["Tensor"], "Tensor"]


class Sampler:
    """Samples the tokens of one sequence.

    Attributes:
        is_greedy: Whether the likeliest token is taken.
        distribution: Temperature, top-k, top-p and min-p to draw with.
        random: Gives the random numbers of the sequence.
        adjustments: Penalties and limits of the options. Each takes the scores of the next token, one float32 per token
            of the vocabulary, may change them, and returns them.
    """

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: Items[int],
        end_ids: Collection[int],
        seed: int | None = None,
        grammar: Grammar | None = None,
        least_tokens: int = 0,
    ) -> None:
        """Start before the first token.

        Args:
            options: Options of the request.
            prompt_ids: Tokens that the repetition penalty and the n-grams count as well.
            end_ids: End tokens, which stay out until enough tokens are there.
            seed: Seed of the sequence, or None to draw differently each time.
            grammar: Form that the answer must have.
            least_tokens: Number of tokens before an end token is allowed.
        """
        self._options = options
        self._tokens = list(prompt_ids)
        self._prompt_length = len(prompt_ids)
        self._end_ids = sorted(end_ids)
        self._grammar = grammar
        self._seen: Tensor | None = None
        self._ngrams: dict[tuple[int, ...], list[int]] = {}
        self._counts: Tensor | None = None
        self._least_tokens = least_tokens
        self.is_greedy = not options.do_sample
        temperature = 1.0 if options.temperature is None else options.temperature
        self.distribution = (temperature, options.top_k, options.top_p, options.min_p)
        self.random = random.Random(seed)
        self.adjustments: list[Adjustment] = []
        if options.repetition_penalty != 1.0:
            self.adjustments.append(self._penalise_repetition)
        if options.presence_penalty or options.frequency_penalty:
            self.adjustments.append(self._penalise_presence)
        if options.no_repeat_ngram_size:
            self.adjustments.append(self._forbid_repeated_ngrams)
        if grammar is not None:
            self.adjustments.append(grammar.mask)
        if least_tokens:
            self.adjustments.append(self._forbid_an_early_end)
        for end in range(1, len(self._tokens) + 1):
            self._remember_ngram(end)

    def adjust(self, scores: Tensor) -> Tensor:
        """Return the scores of the next token with the penalties and limits of the options."""
        for adjustment in self.adjustments:
            scores = adjustment(scores)
        return scores

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        if not self.adjustments:
            return
        self._tokens.append(token)
        self._remember_ngram(len(self._tokens))
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self._grammar is not None:
            self._grammar.accept(token)

    def _penalise_repetition(self, scores: Tensor) -> Tensor:
        import torch

        if self._seen is None:
            # Tokens of images may have no score.
            seen = sorted(token for token in set(self._tokens) if token < scores.shape[-1])
            self._seen = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
            self._seen[torch.tensor(seen, device=scores.device, dtype=torch.long)] = True
        penalty = self._options.repetition_penalty
        return torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)

    def _penalise_presence(self, scores: Tensor) -> Tensor:
        """Take off the penalties of the tokens that the sequence, and not its prompt, has already."""
        import torch

        if self._counts is None:
            self._counts = torch.zeros(scores.shape[-1], device=scores.device)
        options = self._options
        return scores - options.frequency_penalty * self._counts - options.presence_penalty * (self._counts > 0)

    def _remember_ngram(self, end: int) -> None:
        size = self._options.no_repeat_ngram_size
        if size and end >= size:
            *start, last = self._tokens[end - size : end]
            self._ngrams.setdefault(tuple(start), []).append(last)

    def _forbid_repeated_ngrams(self, scores: Tensor) -> Tensor:
        size = self._options.no_repeat_ngram_size
        start = tuple(self._tokens[len(self._tokens) - size + 1 :])
        if banned := [token for token in self._ngrams.get(start, ()) if token < len(scores)]:
            scores[banned] = float("-inf")
        return scores

    def _forbid_an_early_end(self, scores: Tensor) -> Tensor:
        if len(self._tokens) - self._prompt_length >= self._least_tokens:
            return scores
        held = scores.clone()
        held[[token for token in self._end_ids if token < len(scores)]] = float("-inf")
        # A form that is complete allows nothing but its end.
        return held if bool((held > float("-inf")).any()) else scores


def advance(sequences: Items[Sequence], scores: Tensor) -> None:
    """Give every sequence its next token.

    Args:
        sequences: One per row, with their samplers.
        scores: Scores of the model, [rows, vocabulary].
    """
    tokens = sample_tokens([sequence.sampler for sequence in sequences], scores)
    asked = [row for row, sequence in enumerate(sequences) if sequence.state.options.logprobs]
    logprobs = dict(zip(asked, log_probabilities(scores, asked, tokens), strict=True))
    for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
        sequence.append(token, logprobs.get(row))


def sample_tokens(samplers: Items[Sampler], scores: Tensor) -> list[int]:
    """Sample and accept the next token of every row.

    Args:
        samplers: One per row.
        scores: Scores of the model, [rows, vocabulary].
    """
    import torch

    scores = scores.float()
    changed = [row for row, sampler in enumerate(samplers) if sampler.adjustments]
    if changed:
        scores = scores.clone()
        for row in changed:
            scores[row] = samplers[row].adjust(scores[row])
    tokens: list[int] = torch.argmax(scores, dim=-1).tolist()
    groups: dict[tuple[float, int | None, float | None, float | None], list[int]] = {}
    for row, sampler in enumerate(samplers):
        if not sampler.is_greedy:
            groups.setdefault(sampler.distribution, []).append(row)
    for distribution, rows in groups.items():
        uniform = torch.tensor([samplers[row].random.random() for row in rows], dtype=torch.float64)
        for row, token in zip(rows, _draw(scores[rows], uniform, *distribution), strict=True):
            tokens[row] = token
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.accept(token)
    return tokens


def _draw(
    scores: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> list[int]:
    """Draw one token per row, with one random number in [0, 1) per row."""
    import torch

    # Apple's GPUs have no numbers in double precision.
    scores = scores.cpu() if scores.device.type == "mps" else scores
    # Without the greatest score taken off, a small temperature overflows.
    scaled = (scores - scores.amax(-1, keepdim=True)).double() / temperature
    token_ids = None
    if top_k is not None and top_k < scaled.shape[-1]:
        scaled, token_ids = torch.topk(scaled, top_k, dim=-1)
    elif top_p is not None and top_p < 1:
        scaled, token_ids = torch.sort(scaled, dim=-1, descending=True)
    shares = torch.softmax(scaled, dim=-1)
    if top_p is not None and token_ids is not None:
        # The token that crosses the limit still counts.
        shares = torch.where(torch.cumsum(shares, dim=-1) - shares < top_p, shares, 0.0)
    if min_p is not None:
        shares = torch.where(shares >= min_p * shares.amax(-1, keepdim=True), shares, 0.0)
    sums = torch.cumsum(shares, dim=-1)
    # A share of zero is never drawn: the first place whose sum is above the number has a share of its own.
    places = torch.searchsorted(sums, uniform.to(sums.device)[:, None] * sums[:, -1:], right=True)
    last = (shares > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)
    places = torch.minimum(places, last)
    chosen: list[int] = (places if token_ids is None else token_ids.gather(-1, places))[:, 0].tolist()
    return chosen


def log_probabilities(scores: Tensor, rows: Items[int], tokens: Items[int]) -> list[float]:
    """Return the log probability (nats) that the model gives to the chosen tokens of some rows.

    Args:
        scores: Scores of the model, [rows, vocabulary].
        rows: Rows that are asked for.
        tokens: Chosen token of every row of `scores`.
    """
    import torch

    if not rows:
        return []
    logs = torch.log_softmax(scores[list(rows)].float(), dim=-1)
    chosen = torch.tensor([tokens[row] for row in rows], device=logs.device)
    values: list[float] = logs.gather(-1, chosen[:, None])[:, 0].tolist()
    return values
