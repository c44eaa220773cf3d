"""Batches of sequences on a torch model: one that sequences join and leave, whole ones, beam search; and their sizes.

In the dense batch the rows are aligned on the right, `[pad, pad, a, b]` beside `[c, d, e, f]`, and the attention mask
hides the padding. Whole batches go through `generate` of Transformers with our own sampling and our own ends: they are
for models that sequences cannot join while they run (encoder-decoder models, images, a recurrent state).
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect_huggingface.blocks import EngineOptions
from prefect_huggingface.tasks.engines.detokenizer import Tokenizer
from prefect_huggingface.tasks.engines.memory import available_bytes, kv_bytes_per_token
from prefect_huggingface.tasks.engines.request_state import RequestState, Sequence
from prefect_huggingface.tasks.engines.torch_loading import input_device
from prefect_huggingface.tasks.engines.torch_sampling import advance, log_probabilities

if TYPE_CHECKING:
    from torch import Tensor

Abort = Callable[[RequestState], None]
"""Ends a request that must end, between two tokens of a whole batch."""

# Models whose own preparation of the inputs does nothing that matters for a dynamic cache.
PLAIN_PREPARATIONS = ("bloom", "phi3", "phimoe")
ROOM_TOKENS = 64
# What belongs to the model itself. All else of its generation settings is a matter of the request.
MODEL_SETTINGS = (
    "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "use_cache", "cache_implementation",
)  # fmt: skip
CPU_SEQUENCES, CPU_STEP_TOKENS, CPU_MEMORY_SHARE = 64, 2048, 0.25
GPU_SEQUENCES, GPU_STEP_TOKENS, GPU_MEMORY_SHARE = 256, 16384, 0.8
KV_SETTINGS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
# Share of the tokens of one joint prompt computation that must not be padding, but for so many of them on a GPU: there
# they cost less than another computation.
LEAST_FILL, GPU_SPARE_TOKENS = 0.75, 2048


def layer_kinds(config: Any) -> set[str]:
    """Return the kinds of attention that a configuration lists for its layers, none where it lists nothing."""
    return set(getattr(config, "layer_types", None) or [])


def can_join(model: Any) -> bool:
    """Return whether sequences can join a running batch of this model: its only state are keys and values."""
    from transformers.generation import GenerationMixin

    config = model.config.get_text_config(decoder=True)
    is_plain = type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(
        (is_plain or (config.model_type in PLAIN_PREPARATIONS and rope.get("rope_type") != "longrope"))
        and not model.config.is_encoder_decoder
        and not getattr(model, "_is_stateful", False)
        and model._supports_default_dynamic_cache()
        and layer_kinds(config) <= {"full_attention", "sliding_attention", "chunked_attention"}
        and "past_key_values" in inspect.signature(model.forward).parameters
    )


@functools.cache
def _growing_layer() -> type:
    """Return a layer of a key-value cache that grows in place.

    The layer of Transformers copies all of its tokens at every step. This one has room for some more.
    """
    import torch
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc]
        keys: Tensor
        values: Tensor

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            if self.keys.numel() == 0:
                self.keys, self.values = key_states, value_states
                return key_states, value_states
            self.keys = self._extended("keys", key_states)
            self.values = self._extended("values", value_states)
            return self.keys, self.values

        def _extended(self, name: str, new: Tensor) -> Tensor:
            old, room = getattr(self, name), getattr(self, f"_room_of_{name}", None)
            length = old.shape[-2] + new.shape[-2]
            # The room is the memory of the old tensor only as long as nobody replaced that by another one.
            if room is None or room.data_ptr() != old.data_ptr() or room.shape[-2] < length:
                room = torch.empty(
                    (*old.shape[:-2], length + ROOM_TOKENS, old.shape[-1]), dtype=old.dtype, device=old.device
                )
                room[..., : old.shape[-2], :] = old
                setattr(self, f"_room_of_{name}", room)
            room[..., old.shape[-2] : length, :] = new
            return room[..., :length, :]

    return GrowingLayer


class DenseBatch:
    """Sequences in one rectangle of keys and values.

    Attributes:
        sequences: The sequences, one per row.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = input_device(model)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_last_only = "logits_to_keep" in parameters
        self._cache: Any = None
        self.sequences: list[Sequence] = []

    @property
    def columns(self) -> int:
        """Number of columns: the tokens of the longest row that are in the cache."""
        return int(self._cache.get_seq_length()) if self._cache is not None else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, 0 while there are none."""
        tokens = self.columns * len(self.sequences)
        if not tokens:
            return 0
        tensors = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]
        return int(sum(tensor.numel() * tensor.element_size() for tensor in tensors) // tokens)

    def tokens_for(self, rows: int, columns: int) -> int:
        """Return the number of tokens that there must be room for."""
        return rows * columns

    def join(self, sequences: Items[Sequence]) -> Tensor:
        """Compute the prompts of new sequences and put them under the rows that are there.

        Sequences of one request that have no token yet share the work.

        Returns:
            Scores of the next token of the new sequences, [sequences, vocabulary].
        """
        import torch

        shared = [index for index, new in enumerate(sequences) if not index or not _shares(sequences[index - 1], new)]
        cache = self._new_cache()
        scores = self._forward(*padded_rows([sequences[index].context_ids for index in shared]), cache)
        if len(shared) < len(sequences):
            starts = set(shared)
            repeats = torch.tensor([index in starts for index in range(len(sequences))]).cumsum(0) - 1
            cache.batch_select_indices(repeats)
            scores = scores[repeats.to(scores.device)]
        self._append(cache, sequences)
        return scores

    def step(self) -> Tensor:
        """Go on by the newest token of every sequence.

        Returns:
            Scores of the next token, [sequences, vocabulary].
        """
        import torch

        lengths = torch.tensor([sequence.length for sequence in self.sequences])
        mask = (torch.arange(self.columns + 1)[None] > self.columns - lengths[:, None]).long()
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in self.sequences])
        return self._forward(ids, mask, self._cache)

    def leave(self, rows: Collection[int]) -> None:
        """Take rows out, and the columns that are then empty."""
        import torch

        if not rows:
            return
        keep = [row for row in range(len(self.sequences)) if row not in rows]
        self.sequences = [self.sequences[row] for row in keep]
        if not keep:
            self._cache = None
            return
        # The newest token of each sequence is not in the cache yet.
        longest = max(sequence.length for sequence in self.sequences) - 1
        index = torch.tensor(keep)
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                cut = tensor.shape[-2] - longest
                setattr(layer, name, tensor[..., max(0, cut) :, :][index.to(tensor.device)])

    def clear(self) -> list[Sequence]:
        """Take all sequences out and return them."""
        sequences, self.sequences, self._cache = self.sequences, [], None
        return sequences

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layer_class_to_replicate = _growing_layer()
        return cache

    def _append(self, cache: Any, sequences: Items[Sequence]) -> None:
        """Put the rows of a cache, which belong to new sequences, under those that are there."""
        self._cache = cache if self._cache is None else _stacked(self._cache, cache)
        self.sequences.extend(sequences)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        device = self._device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self._takes_positions:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs["position_ids"] = positions.to(device)
        if self._takes_last_only:
            inputs["logits_to_keep"] = 1
        outputs = self._model(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
        scores: Tensor = outputs.logits[:, -1, :]
        return scores


def _shares(before: Sequence, sequence: Sequence) -> bool:
    return before.state is sequence.state and not before.tokens and not sequence.tokens


def _stacked(first: Any, second: Any) -> Any:
    """Put the rows of one cache under those of another, filled up on the left."""
    import torch
    from torch.nn.functional import pad

    columns = max(first.get_seq_length(), second.get_seq_length())
    for above, below in zip(first.layers, second.layers, strict=True):
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (above, below)]
            filled = [pad(part, (0, 0, columns - part.shape[-2], 0)) for part in parts]
            setattr(above, name, torch.cat(filled, dim=0))
    return first


def prepare_model(loaded: Any, pad_token: int) -> Any:
    """Return a model that shares the weights of `loaded` and has no defaults for sampling, lengths and ends."""
    from transformers import GenerationConfig

    kept = {name: getattr(loaded.generation_config, name, None) for name in MODEL_SETTINGS}
    prepared = copy.copy(loaded)
    prepared.generation_config = GenerationConfig(
        pad_token_id=pad_token, **{name: value for name, value in kept.items() if value is not None}
    )
    return prepared


def run_whole_batch(model: Any, sequences: Items[Sequence], inputs: dict[str, Any], abort: Abort) -> None:
    """Generate sequences, one per row of the inputs of `generate`. A row that ends early is filled up."""
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    rows = _Rows(sequences, abort, model.generation_config.pad_token_id)
    with torch.inference_mode():
        model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(sequence.tokens_left for sequence in sequences),
            logits_processor=LogitsProcessorList([rows.sample]),
            stopping_criteria=StoppingCriteriaList([rows.ended]),
        )


class _Rows:
    """The two hooks of `generate`: sample the tokens of the rows, and say which rows have ended."""

    def __init__(self, sequences: Items[Sequence], abort: Abort, pad_token: int) -> None:
        self._sequences = sequences
        self._states = {sequence.state: None for sequence in sequences}
        self._abort = abort
        self._pad = pad_token

    def sample(self, input_ids: Any, scores: Any) -> Any:
        """Return scores that leave one token for each row."""
        import torch

        live = [row for row, sequence in enumerate(self._sequences) if sequence.is_running]
        for row in live:
            first = self._sequences[row].state.options.forced_bos_token_id
            if first is not None and not self._sequences[row].tokens:
                scores[row] = torch.full_like(scores[row], float("-inf"))
                scores[row, first] = 0.0
        if live:
            advance([self._sequences[row] for row in live], scores[live])
        chosen = torch.full((len(self._sequences), 1), self._pad, device=scores.device)
        for row in live:
            sequence = self._sequences[row]
            # An end token is not among the tokens of a sequence, and what follows it is never seen.
            chosen[row] = sequence.tokens[-1] if sequence.is_running else self._pad
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)

    def ended(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return one truth value per row."""
        import torch

        for state in self._states:
            self._abort(state)
        return torch.tensor([not sequence.is_running for sequence in self._sequences], device=input_ids.device)


def run_beams(model: Any, state: RequestState, inputs: dict[str, Any], tokenizer: Tokenizer, abort: Abort) -> None:
    """Generate the sequences of one request by beam search, the best one first. Their text comes at the end, whole."""
    import torch
    from transformers import StoppingCriteriaList

    options = state.options
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    with torch.inference_mode():
        found = model.generate(
            **inputs,
            do_sample=False,
            num_beams=options.num_beams,
            num_return_sequences=options.n,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.min_new_tokens or None,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            eos_token_id=None if options.ignore_eos else sorted(state.end_ids),
            **({} if options.forced_bos_token_id is None else {"forced_bos_token_id": options.forced_bos_token_id}),
            stopping_criteria=StoppingCriteriaList([_Interrupt(state, tokenizer, start)]),
        )
    rows = found[:, start:].tolist()
    logprobs: list[list[float]] = [[] for _ in rows]
    if options.logprobs:
        beams = [[max(token, 0) for token in row] for row in rows]
        logprobs = score_continuations(model, found[0, :start].tolist(), beams, 1, inputs)
    for sequence, row, values in zip(state.sequences, rows, logprobs, strict=True):
        for place, token in enumerate(row):
            if sequence.is_running and token >= 0:
                sequence.append(token, values[place] if values else None)
    abort(state)
    for sequence in state.sequences:
        sequence.finish("length")


class _Interrupt:
    """Ends a beam at a stop string, and all of them when the request must end."""

    def __init__(self, state: RequestState, tokenizer: Tokenizer, prompt_length: int) -> None:
        self._state = state
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        # Every token but a special one has a byte or more.
        self._tail = max((len(stop.encode()) for stop in state.options.stop), default=0) + 8

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        if self._state.abort_reason is not None:
            return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        stops = self._state.options.stop
        tails = input_ids[:, self._prompt_length :][:, -self._tail :].tolist() if stops else [[]] * len(input_ids)
        ended = [any(stop in text for stop in stops) for text in map(self._tokenizer.decode, tails)]
        return torch.tensor(ended, device=input_ids.device)


def padded_inputs(rows: Items[Items[int]], model: Any, *, left: bool) -> dict[str, Any]:
    """Return token ids and attention mask, [rows, longest], filled up on the left or on the right."""
    device, pad = input_device(model), model.generation_config.pad_token_id
    ids, mask = padded_rows(rows, pad, "left" if left else "right")
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def padded_rows(rows: Items[Items[int]], pad: int = 0, side: str = "left") -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, which hides what the rows are filled up with."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    fill = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    ids = fill([torch.tensor(row) for row in rows], padding_value=pad)
    return ids, fill([torch.ones(len(row), dtype=torch.long) for row in rows])


def score_continuations(
    model: Any,
    context: Items[int],
    continuations: Items[Items[int]],
    step_tokens: int,
    inputs: Mapping[str, Any] | None = None,
) -> list[list[float]]:
    """Return the log probability (nats) of each token of each continuation of a context.

    Args:
        model: Model that is asked.
        context: Tokens to go on from, those of the decoder where there is an encoder.
        continuations: Tokens of each continuation.
        step_tokens: No more tokens, with padding, are computed at once where more than one continuation is.
        inputs: Further inputs of one row: those of the encoder, or images. Continuations are computed alone then.
    """
    import torch

    rows = [[*context, *ids] for ids in continuations]
    at_once = 1 if inputs else max(step_tokens // max(map(len, rows)), 1)
    scores: list[list[float]] = []
    with torch.inference_mode():
        for start in range(0, len(rows), at_once):
            given = padded_inputs(rows[start : start + at_once], model, left=False)
            # Logits of a long context take more memory than all else.
            kept = given["input_ids"].shape[1] - len(context) + 1
            if model.config.is_encoder_decoder:
                given = {"decoder_input_ids": given["input_ids"]}
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                given["logits_to_keep"] = kept
            logits = model(**{**(inputs or {}), **given}, use_cache=False, return_dict=True).logits[:, -kept:]
            for row, ids in zip(logits, continuations[start : start + at_once], strict=True):
                scores.append(log_probabilities(row, range(len(ids)), ids))
    return scores


@dataclass(slots=True)
class EngineSizes:
    """Limits of one engine.

    Attributes:
        sequences: Number of sequences at once.
        step_tokens: Number of prompt tokens, with padding, that are computed at once.
        cache_bytes: Bytes of keys and values.
        bytes_per_token: Bytes of keys and values of one token, estimated until they are measured.
        spare_tokens: Number of tokens of padding that may always be computed.
    """

    sequences: int
    step_tokens: int
    cache_bytes: int
    bytes_per_token: int
    spare_tokens: int = 0

    @classmethod
    def of(cls, loaded: Any, options: EngineOptions) -> EngineSizes:
        """Choose the sizes by the device of a loaded model, where the options leave them open."""
        import torch

        device, config = input_device(loaded), loaded.config.get_text_config(decoder=True)
        on_cpu = device.type == "cpu"
        if options.cache_size_gb:
            free = int(options.cache_size_gb * 2**30)
        elif device.type == "cuda":
            free = int(GPU_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
        else:
            free = int(CPU_MEMORY_SHARE * available_bytes())
        settings = {name: getattr(config, name, None) for name in KV_SETTINGS}
        return cls(
            sequences=options.max_num_seqs or (CPU_SEQUENCES if on_cpu else GPU_SEQUENCES),
            step_tokens=options.max_num_batched_tokens or (CPU_STEP_TOKENS if on_cpu else GPU_STEP_TOKENS),
            cache_bytes=free,
            # Where the configuration does not say, the smallest model there is, until a batch was measured.
            bytes_per_token=int(kv_bytes_per_token(settings, getattr(loaded.dtype, "itemsize", 4))) or 8,
            spare_tokens=0 if on_cpu else GPU_SPARE_TOKENS,
        )

    def lower(self, failed_with: int) -> None:
        """Allow fewer sequences at once, after so many were too many."""
        self.sequences = max(1, min(self.sequences, failed_with) // 2)

    def room(
        self,
        running: Items[Sequence],
        waiting: Collection[Sequence],
        tokens_for: Callable[[int, int], int] = operator.mul,
    ) -> int:
        """Return how many of the first waiting sequences may join now, at least one where none runs.

        Args:
            running: Sequences of the batch.
            waiting: Sequences that wait, in their order.
            tokens_for: Number of tokens that so many rows and columns need room for.
        """
        longest = used = 0
        columns = max(map(_final_columns, running), default=0)
        for count, sequence in enumerate(waiting):
            longest, used = max(longest, sequence.length), used + sequence.length
            columns = max(columns, _final_columns(sequence))
            rows, computed = len(running) + count + 1, (count + 1) * longest
            is_full = computed - used <= max(self.spare_tokens, (1 - LEAST_FILL) * computed)
            fits_step = count == 0 or (computed <= self.step_tokens and is_full)
            fits_batch = rows <= self.sequences and tokens_for(rows, columns) * self.bytes_per_token <= self.cache_bytes
            if rows > 1 and not (fits_step and fits_batch):
                return count
        return len(waiting)


def _final_columns(sequence: Sequence) -> int:
    return sequence.length + sequence.tokens_left


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch says that the memory ran out. On a CPU it has no class of its own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
