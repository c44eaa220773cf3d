"""The numbers that say how far an export is from its source."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Positions whose distributions are compared at once; a vocabulary has some hundred thousand entries.
ROW_BLOCK = 256


def compare(candidate: Any, expected: list[dict[str, Any]], ends: list[int]) -> dict[str, Any]:
    """Return how an export differs from its source. The tokens `ends` end an answer.

    Returns:
        `agreement`: share of the positions with the same most likely token; `divergence`: mean Kullback-Leibler
        divergence of the export from the source in nats; `perplexity_ratio`: perplexity of the export over that of the
        source on the given tokens; `exact_matches`: share of the greedy answers that are the same; `positions`.
    """
    agreeing = positions = matches = 0
    divergence = surprise = 0.0
    for entry in expected:
        wanted = np.load(entry["place"], mmap_mode="r")
        got = log_softmax(candidate.logits(entry["tokens"], entry["answer"]))
        targets = np.asarray(entry["targets"])
        positions += len(wanted)
        for start in range(0, len(wanted), ROW_BLOCK):
            reference, found = np.asarray(wanted[start : start + ROW_BLOCK]), got[start : start + ROW_BLOCK]
            rows, chosen = np.arange(len(reference)), targets[start : start + ROW_BLOCK]
            agreeing += int((reference.argmax(-1) == found.argmax(-1)).sum())
            divergence += float((np.exp(reference) * (reference - found)).sum())
            surprise += float((reference[rows, chosen] - found[rows, chosen]).sum())
        matches += without(candidate.answer_tokens(entry["tokens"]), ends) == without(entry["answer"], ends)
    return {
        "agreement": agreeing / positions,
        "divergence": max(divergence / positions, 0.0),
        "perplexity_ratio": math.exp(min(surprise / positions, 50.0)),
        "exact_matches": matches / len(expected),
        "positions": positions,
    }


def without(answer: list[int], ends: list[int]) -> list[int]:
    """Return an answer without the token that ended it; not every library returns that."""
    return answer[:-1] if answer and answer[-1] in ends else answer


def log_softmax(logits: Any) -> Any:
    """Return the logarithms of the probabilities (nats) of each row of logits."""
    logits = np.asarray(logits, dtype=np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
