"""A batch on a CUDA GPU whose steps are replayed as CUDA graphs.

A step of a small model is hundreds of small kernels, and Python needs longer to launch them than the GPU to run them.
A CUDA graph launches all of them at once, and needs the same shapes and the same memory at each replay. So the keys
and values of each sequence are in a slot of memory that stays where it is, `[a, b, free, free]` beside `[c, free, free,
free]`, and there is a graph for every power of two of columns and for some numbers of rows; what is too much of both is
masked. Graphs are recorded when they are first needed.

Models whose step cannot be recorded, or gives other scores so, run in the batch of `torch_batch.py`: with experts, with
angles that depend on the length, with windows that the configuration does not list by layer, on several devices.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection
from collections.abc import Sequence as Items
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prefect.logging import get_logger

from prefect_huggingface.tasks.engines.memory import give_back_memory
from prefect_huggingface.tasks.engines.request_state import Sequence
from prefect_huggingface.tasks.engines.torch_batch import (
    DenseBatch,
    EngineSizes,
    can_join,
    layer_kinds,
    padded_rows,
)
from prefect_huggingface.tasks.engines.torch_loading import input_device

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

LEAST_COLUMNS = 128
GROUPED_ATTENTION = "prefect_huggingface_grouped"
# Up to here the rows of a graph are a power of two, and above a multiple.
ROWS_STEP = 32
# Each takes some megabytes on the GPU; the one that was not used for the longest time goes.
MOST_GRAPHS = 48
# Models without a list of their layers' kinds whose every layer has the window of the configuration.
WINDOWED = ("mistral",)
WINDOW_SETTINGS = ("sliding_window", "window_size", "attention_window")
EXPERT_SETTINGS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# A recording waits for all of its GPU, which breaks one of another engine.
RECORDING = threading.Lock()
# Share of a vector of scores by which rounding may change it, in single precision and in others.
EXACT_GAP, HALF_GAP = 1e-3, 0.05


def group_heads(model: Any) -> None:
    """Have the steps in graphs of a model on CUDA use `grouped_attention`, where it has the attention of torch."""
    if not may_be_recorded(model) or model.get_correct_attn_implementation(None) != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
    AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(GROUPED_ATTENTION)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention as `sdpa` of Transformers does, and that of a step in a graph by products of matrices.

    `sdpa` copies keys and values for each head of a group, and computes a single row on a few parts of the GPU only: on
    an H100, 30 instead of 540 microseconds for one row of 8,192 columns, and 89 instead of 946 for 128 rows of 512.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, tokens, size = query.shape
    if tokens > 1 or attention_mask is None or attention_mask.dtype == torch.bool:
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found, None
    # The heads of a group take the place of the tokens of a text.
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    grouped = grouped * (options.get("scaling") or size**-0.5)  # before the product, which may be too large for float16
    scores = torch.matmul(grouped, key.transpose(-1, -2)) + attention_mask
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(shares, value).reshape(rows, 1, heads, value.shape[-1]), None


def make_batch(model: Any, sizes: EngineSizes) -> DenseBatch:
    """Return the fastest batch that computes a model rightly."""
    if not may_be_recorded(model):
        return DenseBatch(model)
    import torch

    batch = GraphBatch(model, sizes)
    try:
        gap = batch.check()
    except Exception as exc:
        reason = f"{type(exc).__name__}: {exc}"
    else:
        if gap <= (EXACT_GAP if model.dtype == torch.float32 else HALF_GAP):
            return batch
        reason = f"The scores of a recorded step differ by {gap:.2g}."
    logger.info("The steps of %s cannot be replayed as CUDA graphs. %s", type(model).__name__, reason)
    del batch
    give_back_memory()
    return DenseBatch(model)


def may_be_recorded(model: Any) -> bool:
    """Return whether a model is all on one CUDA GPU, its mask can be made here, and no step asks for a value.

    A recording that fails leaves traces in torch, so that what is known to fail is not tried: experts, which are chosen
    by value, and angles that depend on the length.
    """
    device = input_device(model)
    if device.type != "cuda" or not can_join(model):
        return False
    config = model.config.get_text_config(decoder=True)
    kinds, settings = layer_kinds(config), config.to_dict()
    has_own_window = not kinds and config.model_type not in WINDOWED and any(map(settings.get, WINDOW_SETTINGS))
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        kinds <= {"full_attention", "sliding_attention"}
        and not has_own_window
        and not any(map(settings.get, EXPERT_SETTINGS))
        and rope.get("rope_type") not in ("dynamic", "longrope")
        and "position_ids" in inspect.signature(model.forward).parameters
        and all(parameter.device == device for parameter in model.parameters())
    )


def bucket(number: int, least: int = 1, step: int | None = None) -> int:
    """Return a power of two, `least` or more, that is not smaller than a number; above `step` a multiple of it."""
    if step is not None and number > step:
        return -(-number // step) * step
    return max(least, 1 << (number - 1).bit_length())


class GraphBatch(DenseBatch):
    """Sequences in slots of fixed memory.

    On a CPU nothing is recorded; the steps are the same.

    Attributes:
        sequences: The sequences, in the order of their slots.
    """

    def __init__(self, model: Any, sizes: EngineSizes) -> None:
        """Nothing is allocated before the first sequence."""
        import torch

        super().__init__(model)
        self._sizes = sizes
        config = model.config.get_text_config(decoder=True)
        self._kinds = layer_kinds(config)
        is_windowed = "sliding_attention" in self._kinds or config.model_type in WINDOWED
        self._window = getattr(config, "sliding_window", None) if is_windowed else None
        self._slots: Any = None
        self._graphs: dict[tuple[int, int], Any] = {}
        self._scores: Any = None
        self._records = self._device.type == "cuda"
        # Each stream has a workspace of its own.
        self._stream: Any = torch.cuda.Stream(self._device) if self._records else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, 0 while there are none."""
        if self._slots is None:
            return 0
        return sum(tensor[0, :, 0].nbytes for tensor in self._tensors())

    def tokens_for(self, rows: int, columns: int) -> int:
        """Return the number of tokens that there must be room for."""
        return self._slots_for(rows) * bucket(columns, LEAST_COLUMNS)

    def _slots_for(self, rows: int) -> int:
        # Each growth needs new graphs, so that there are few of them.
        return max(rows, min(bucket(rows), bucket(self._sizes.sequences, step=ROWS_STEP)))

    def step(self) -> Tensor:
        """Go on by the newest token of every sequence.

        Returns:
            Scores of the next token, [sequences, vocabulary].
        """
        # The newest token of each sequence is not in its slot yet.
        lengths = [sequence.length for sequence in self.sequences]
        self._reserve(self._slots, len(lengths), max(lengths))
        return self._replay([sequence.tokens[-1] for sequence in self.sequences], lengths)

    def leave(self, rows: Collection[int]) -> None:
        """Take rows out; the last ones move into their slots."""
        import torch

        count = len(self.sequences) - len(rows)
        free = [row for row in range(count) if row in rows]
        moved = [row for row in range(count, len(self.sequences)) if row not in rows]
        if free:
            columns = max(self.sequences[row].length for row in moved)
            to, source = torch.tensor([free, moved], device=self._device)
            with torch.inference_mode():  # requests are cancelled between the steps
                for tensor in self._tensors():
                    tensor[to, :, :columns] = tensor[source, :, :columns]
        for to, source in zip(free, moved, strict=True):
            self.sequences[to] = self.sequences[source]
        del self.sequences[count:]

    def clear(self) -> list[Sequence]:
        """Take all sequences out and return them, and give the memory back."""
        sequences, self.sequences = self.sequences, []
        self._slots = None
        self._forget()
        return sequences

    def check(self) -> float:
        """Return by how much the scores of a step here differ from those of the model, as a share of their size."""
        import torch

        size = self._model.get_input_embeddings().num_embeddings
        texts = [[(7919 * index) % size for index in range(length)] for length in (24, 40)]
        with torch.inference_mode():
            cache = self._new_cache()
            self._forward(*padded_rows([text[:-1] for text in texts]), cache)
            lengths = [len(text) for text in texts]
            self._reserve(cache, len(texts), max(lengths))
            self._put(cache, [length - 1 for length in lengths])
            for _ in range(2):  # the first is recorded, and the second replayed
                found = self._replay([text[-1] for text in texts], lengths).float()
            _, mask = padded_rows(texts)
            wanted = self._forward(torch.tensor([text[-1:] for text in texts]), mask, cache).float()
            gap = float((found - wanted).norm() / wanted.norm())
        if self._stream is not None and not self._graphs:
            raise RuntimeError("The recording failed.")
        self.clear()
        return gap

    def _append(self, cache: Any, sequences: Items[Sequence]) -> None:
        """Put the rows of a cache into slots of their own."""
        running = [*self.sequences, *sequences]
        self._reserve(cache, len(running), max(sequence.length for sequence in running))
        self._put(cache, [len(sequence.context_ids) for sequence in sequences])
        self.sequences.extend(sequences)

    def _reserve(self, cache: Any, rows: int, columns: int) -> None:
        """Have so many slots of so many columns, of the kind that a cache has."""
        import torch

        rows, columns = self._slots_for(rows), bucket(columns, LEAST_COLUMNS)
        old = self._slots
        if old is not None:
            there = old.layers[0].keys.shape
            if there[0] >= rows and there[2] >= columns:
                return
            larger = max(rows, there[0]), max(columns, there[2])
            if larger[0] * larger[1] * self.bytes_per_token <= self._sizes.cache_bytes:
                rows, columns = larger
        self._forget()
        if old is None:
            self._slots = old = _slots(len(cache.layers))
        self._given = torch.zeros((2, rows), dtype=torch.long, device=self._device)
        kept = len(self.sequences), max((sequence.length for sequence in self.sequences), default=0)
        # Layer by layer, so that there is never twice the memory.
        for layer, source in zip(old.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                like, before = getattr(source, name), getattr(layer, name)
                room = like.new_zeros((rows, like.shape[1], columns, like.shape[3]))
                if before is not None:
                    old_part = before[: kept[0], :, : kept[1]]
                    room[: kept[0], :, : old_part.shape[2]] = old_part
                setattr(layer, name, room)

    def _forget(self) -> None:
        """Drop the graphs, which belong to memory that changes."""
        self._graphs.clear()
        self._scores = None
        self._records = self._stream is not None

    def _put(self, cache: Any, lengths: list[int]) -> None:
        """Write the last tokens of the rows of a cache, so many of each, to the beginnings of the next slots."""
        import torch

        first, last = len(self.sequences), len(self.sequences) + len(lengths)
        columns = max(lengths)
        starts = cache.get_seq_length() - torch.tensor(lengths, device=self._device)
        # What is beyond a row's end repeats its last token, and is masked.
        places = (starts[:, None] + torch.arange(columns, device=self._device)).clamp(max=cache.get_seq_length() - 1)
        for layer, source in zip(self._slots.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                found = getattr(source, name).take_along_dim(places[:, None, :, None], dim=2)
                slots = getattr(layer, name)[first:last]
                slots[:, :, :columns] = found
                slots[:, :, columns:] = 0  # whatever is no number there would spread through its mask

    def _replay(self, ids: list[int], lengths: list[int]) -> Tensor:
        """Compute a step by the newest token of each slot, which makes its text so long."""
        import torch

        rows = min(bucket(len(ids), step=ROWS_STEP), self._given.shape[1])
        columns = bucket(max(lengths), LEAST_COLUMNS)
        given = torch.tensor([ids, [length - 1 for length in lengths]])
        self._given[:, : len(ids)] = given.to(self._device, non_blocking=True)
        graph = self._graphs.pop((rows, columns), None)
        if graph is None:
            return self._launch(rows, columns)[: len(ids)]
        self._graphs[rows, columns] = graph  # the last that goes
        graph.replay()
        scores: Tensor = self._scores[: len(ids)]
        return scores

    def _launch(self, rows: int, columns: int) -> Tensor:
        """Compute a step as it comes, and record it for the next one. Where that fails, those are launched as well."""
        if not self._records:
            return self._compute(rows, columns)
        import torch

        # Libraries make their workspaces when they first compute on a stream, which cannot be recorded.
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                scores = self._compute(rows, columns)
        finally:
            here.wait_stream(self._stream)
        scores.record_stream(here)
        try:
            if self._scores is None:
                self._scores = scores.new_empty((self._given.shape[1], scores.shape[-1]))
            with RECORDING:
                self._graphs[rows, columns] = self._record(rows, columns)
        except Exception as exc:
            logger.warning("A step with %d rows cannot be recorded; steps are launched. %s", rows, exc)
            self._records = False
            torch.cuda.set_stream(here)
            self._end_recording()
        return scores

    def _end_recording(self) -> None:
        """Set the random numbers of torch right, which a recording that failed leaves as if it went on."""
        import torch

        with suppress(Exception), RECORDING, torch.cuda.device(self._device):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                torch.zeros(1, device=self._device)

    def _record(self, rows: int, columns: int) -> Any:
        """Return the graph of a step, which writes its scores into those of this batch."""
        import torch

        while len(self._graphs) >= MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        if not self._graphs:
            # The pool of graphs that are gone may not be used again while somebody has a tensor of theirs.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._scores[:rows].copy_(self._compute(rows, columns))
        return graph

    def _compute(self, rows: int, columns: int) -> Tensor:
        """Compute a step of the first slots, and look at their first columns only."""
        import torch

        ids, positions = self._given[0, :rows, None], self._given[1, :rows, None]
        places = torch.arange(rows, device=self._device), positions[:, 0]
        for layer in self._slots.layers:
            layer.places, layer.rows, layer.columns = places, rows, columns
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": self._mask(positions, columns)}
        if self._takes_last_only:
            inputs["logits_to_keep"] = 1
        outputs = self._model(**inputs, past_key_values=self._slots, use_cache=True, return_dict=True)
        scores: Tensor = outputs.logits[:, -1, :]
        return scores

    def _mask(self, positions: Tensor, columns: int) -> Any:
        """Return what is added to the attention of each row, [rows, 1, 1, columns], by kind where there are several."""
        import torch

        places, dtype = torch.arange(columns, device=self._device), self._model.dtype
        hidden = torch.finfo(dtype).min

        def added(seen: Tensor) -> Tensor:
            return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, hidden)[:, None, None, :]

        seen = places <= positions
        if self._window is None:
            return added(seen)
        near = added(seen & (places > positions - self._window))
        return {"full_attention": added(seen), "sliding_attention": near} if self._kinds else near

    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self._slots.layers for tensor in (layer.keys, layer.values)]


def _slots(layers: int) -> Any:
    """Return a cache of Transformers whose layers are slots without any memory yet."""
    from transformers.cache_utils import Cache, DynamicLayer

    class SlotLayer(DynamicLayer):  # type: ignore[misc]
        """Slots of one layer: how many rows and columns a step looks at, and in which places it writes."""

        places: tuple[Tensor, Tensor]
        rows: int
        columns: int

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            rows, columns = self.places
            self.keys[rows, :, columns] = key_states[:, :, 0]
            self.values[rows, :, columns] = value_states[:, :, 0]
            return self.keys[: self.rows, :, : self.columns], self.values[: self.rows, :, : self.columns]

        def get_seq_length(self) -> int:
            return self.columns - 1

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.columns, 0

    return Cache(layers=[SlotLayer() for _ in range(layers)])
