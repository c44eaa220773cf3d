"""Which requests run beside each other on OpenVINO, and which wait; and the sizes of the batch.

A request is let in only where the KV cache has room for all that it can come to need. So the pipeline never runs out in
the middle, which costs it computed tokens at best.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import EngineOptions
from prefect_huggingface.tasks.engines.chat_templates import read_json
from prefect_huggingface.tasks.engines.inputs import context_length_of
from prefect_huggingface.tasks.engines.memory import available_bytes, kv_bytes_per_token
from prefect_huggingface.tasks.engines.request_state import RequestState

GIB = 2**30
# OpenVINO keeps the KV cache in blocks of this many tokens on a CPU.
BLOCK_TOKENS = 32
DEFAULT_SEQUENCES = 64
DEFAULT_BATCHED_TOKENS = 512
# Rows are seldom longer than this, also where the context of the model is.
USUAL_ROW_TOKENS = 2048
LARGEST_SHARE_OF_MEMORY = 0.3
SMALLEST_CACHE_BYTES = GIB // 4
PRECISION_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "u8": 1.125, "i8": 1.125, "u4": 0.625}
# Requests that share this many tokens at their beginning wait until the first of them has computed it for all.
SHARED_TOKENS = 2 * BLOCK_TOKENS
MAX_PREFIXES = 4096


@dataclass(frozen=True, slots=True)
class SchedulerSizes:
    """Sizes of one engine.

    Attributes:
        sequences: Number of answers that are generated side by side.
        batched_tokens: Number of tokens that one step handles.
        cache_bytes: Room for the KV cache. Memory is taken only as the cache fills.
        kv_blocks: The same in blocks, or 0 where the size of a block is not known.
    """

    sequences: int
    batched_tokens: int
    cache_bytes: int
    kv_blocks: int

    @property
    def cache_tokens(self) -> int | None:
        """Number of tokens that the cache holds, or None where it is not known."""
        return self.kv_blocks * BLOCK_TOKENS or None

    def scheduler_config(self, options: EngineOptions) -> Any:
        """Return the settings of OpenVINO GenAI for these sizes."""
        from openvino_genai import SchedulerConfig

        config = SchedulerConfig()
        config.max_num_seqs = self.sequences
        config.max_num_batched_tokens = self.batched_tokens
        config.enable_prefix_caching = options.enable_prefix_caching
        config.dynamic_split_fuse = True
        if self.kv_blocks:
            config.num_kv_blocks = self.kv_blocks
        else:
            config.cache_size = max(round(self.cache_bytes / GIB), 1)
        return config


def choose_sizes(folder: Path, options: EngineOptions, precision: str) -> SchedulerSizes:
    """Return the sizes for a model.

    Args:
        folder: Folder of the OpenVINO model.
        options: What the user gives; the rest is chosen.
        precision: Precision of the KV cache, "u8" for instance.
    """
    sequences = options.max_num_seqs or DEFAULT_SEQUENCES
    settings = read_json(folder / "config.json")
    token_bytes = kv_bytes_per_token(settings, PRECISION_BYTES.get(precision, 2.0))
    row_tokens = min(context_length_of(settings) or USUAL_ROW_TOKENS, USUAL_ROW_TOKENS)
    if options.cache_size_gb is not None:
        cache_bytes = int(options.cache_size_gb / options.processes * GIB)
    else:
        wanted = int(2 * sequences * row_tokens * token_bytes) if token_bytes else GIB
        most = int(LARGEST_SHARE_OF_MEMORY / options.processes * available_bytes())
        cache_bytes = max(min(wanted, most), SMALLEST_CACHE_BYTES)
    kv_blocks = max(int(cache_bytes / (token_bytes * BLOCK_TOKENS)), 2) if token_bytes else 0
    batched_tokens = options.max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS, sequences)
    if kv_blocks:
        # OpenVINO GenAI 2026.4 crashes when a step may take as many tokens as the cache holds, and the cache gets full.
        batched_tokens = min(batched_tokens, (kv_blocks - 1) * BLOCK_TOKENS)
    return SchedulerSizes(sequences, batched_tokens, cache_bytes, kv_blocks)


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """A request in the scheduler.

    Attributes:
        state: The request.
        handles: What the pipeline gave for each of its sequences, or one for all sequences of a beam search.
        stepped_once: Whether the pipeline has made a step with it, so that it is not what makes a step fail.
        runs_alone: Whether it is to run with no other beside it.
        prefix: Hash of its beginning, where the pipeline may share that; None where it does not.
        scoring: What it gave for each choice whose probability is asked for, with the number of the choice's tokens.
    """

    state: RequestState
    handles: list[Any] = field(default_factory=list)
    stepped_once: bool = False
    runs_alone: bool = False
    prefix: int | None = None
    scoring: list[tuple[Any, int]] = field(default_factory=list)

    @property
    def has_begun(self) -> bool:
        """Whether the prompt is computed and the first token is there."""
        return any(sequence.tokens or sequence.finish_reason for sequence in self.state.sequences)

    @property
    def reserved_tokens(self) -> int:
        """Number of tokens of the KV cache that it can come to need. Every sequence may leave a block unfilled."""
        state = self.state
        return state.num_seqs * (len(state.prompt_ids) + state.options.max_new_tokens + BLOCK_TOKENS)

    def cancel(self) -> None:
        """Take it out of the pipeline, which frees its room in the next step."""
        for handle in (*self.handles, *(handle for handle, _ in self.scoring)):
            handle.cancel()
        self.handles, self.scoring = [], []


class Scheduler:
    """Requests in the order of their submission.

    Attributes:
        waiting: Requests that are not in the pipeline.
        running: Requests that are in the pipeline.
    """

    def __init__(self, max_num_seqs: int, cache_tokens: int | None = None, shares_prefixes: bool = True) -> None:
        """Start empty, for a KV cache of so many tokens, None where that is not known."""
        self._max_num_seqs = max_num_seqs
        self._cache_tokens = cache_tokens
        self._shares_prefixes = shares_prefixes
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: dict[ScheduledRequest, None] = {}
        # Of the running requests together, so that nothing is summed for each one that waits.
        self._num_seqs = self._reserved_tokens = 0
        self._quarantined: set[ScheduledRequest] = set()
        # Prefixes that were computed, by their hashes. A wrong one costs a little time and nothing else.
        self._prefixes: dict[int, None] = {}

    @property
    def requests(self) -> list[ScheduledRequest]:
        """All requests, the running ones first."""
        return [*self.running, *self.waiting]

    def append(self, request: ScheduledRequest) -> None:
        """Put a request at the end."""
        prompt_ids = request.state.prompt_ids
        may_share = self._shares_prefixes and len(prompt_ids) > SHARED_TOKENS
        request.prefix = hash(tuple(prompt_ids[:SHARED_TOKENS])) if may_share else None
        self.waiting.append(request)

    def put_back(self, requests: Iterable[ScheduledRequest]) -> None:
        """Put running requests back to the beginning of the queue."""
        for request in reversed(list(requests)):
            if request in self.running:
                self._stop(request)
            self.waiting.appendleft(request)

    def remove(self, request: ScheduledRequest) -> None:
        """Take a request out, wherever it is."""
        self._quarantined.discard(request)
        if request in self.running:
            self._note_prefix(request)
            self._stop(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def clear(self) -> None:
        """Take all requests out."""
        self.waiting.clear()
        self.running.clear()
        self._num_seqs = self._reserved_tokens = 0
        self._quarantined.clear()

    def quarantine(self, requests: Iterable[ScheduledRequest]) -> None:
        """Have requests run for their first step with no other new one."""
        self._quarantined.update(requests)

    def admit(self) -> list[ScheduledRequest]:
        """Move the requests that may run now from the waiting to the running ones and return them."""
        if not self.waiting or any(request.runs_alone for request in self.running):
            return []
        self._quarantined.difference_update([request for request in self.running if request.stepped_once])
        return self._next_quarantined() if self._quarantined else self._next_requests()

    def _start(self, request: ScheduledRequest) -> None:
        self.running[request] = None
        self._num_seqs += request.state.num_seqs
        self._reserved_tokens += request.reserved_tokens

    def _stop(self, request: ScheduledRequest) -> None:
        del self.running[request]
        self._num_seqs -= request.state.num_seqs
        self._reserved_tokens -= request.reserved_tokens

    def _next_quarantined(self) -> list[ScheduledRequest]:
        if any(not request.stepped_once for request in self.running):
            return []
        request = next(request for request in self.waiting if request in self._quarantined)
        if not self._has_room(request):
            return []
        self.waiting.remove(request)
        self._start(request)
        return [request]

    def _next_requests(self) -> list[ScheduledRequest]:
        admitted: list[ScheduledRequest] = []
        held: list[ScheduledRequest] = []
        under_way = self._prefixes_under_way()
        while self.waiting and self._has_room(self.waiting[0]):
            request = self.waiting.popleft()
            prefix = request.prefix
            if prefix in under_way:
                held.append(request)
                continue
            admitted.append(request)
            self._start(request)
            if prefix is not None and prefix not in self._prefixes:
                under_way.add(prefix)
        self.waiting.extendleft(reversed(held))
        return admitted

    def _has_room(self, request: ScheduledRequest) -> bool:
        """Return whether a request may run beside those that run. With none it always may."""
        if not self.running:
            return True
        last = next(reversed(self.running))
        num_seqs = self._num_seqs + request.state.num_seqs
        if request.runs_alone or last.runs_alone or num_seqs > self._max_num_seqs:
            return False
        return self._cache_tokens is None or self._reserved_tokens + request.reserved_tokens <= self._cache_tokens

    def _prefixes_under_way(self) -> set[int]:
        """Return the prefixes that running requests are computing, and take note of those that they have computed."""
        under_way = set()
        for request in self.running:
            self._note_prefix(request)
            prefix = request.prefix
            if prefix is not None:
                under_way.add(prefix)
        return under_way - self._prefixes.keys()

    def _note_prefix(self, request: ScheduledRequest) -> None:
        """Take note of the prefix of a request if it is computed."""
        prefix = request.prefix
        if prefix is not None and request.has_begun:
            self._prefixes[prefix] = None
            if len(self._prefixes) > MAX_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
