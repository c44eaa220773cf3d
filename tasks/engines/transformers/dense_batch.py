"""A batch of answers that a torch model goes on with side by side; answers join and leave between two steps.

The rows are aligned on the right, `[pad, pad, a, b]` beside `[c, d, e, f]`, and the attention mask hides the padding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from prefect_huggingface.tasks.engines.answers import Answer
from prefect_huggingface.tasks.engines.transformers.loading import input_device

if TYPE_CHECKING:
    from torch import Tensor

# Models whose own preparation of the inputs does nothing that matters for a dynamic cache.
PLAIN_PREPARATIONS = ("bloom", "phi3", "phimoe")
ROOM_TOKENS = 64


def can_join(model: Any) -> bool:
    """Tell whether answers can join a running batch of this model: its only state are keys and values."""
    from transformers.generation import GenerationMixin

    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or [])
    is_plain = type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(
        (is_plain or (config.model_type in PLAIN_PREPARATIONS and rope.get("rope_type") != "longrope"))
        and not model.config.is_encoder_decoder
        and not getattr(model, "_is_stateful", False)
        and model._supports_default_dynamic_cache()
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
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
    """Answers in one rectangle of keys and values.

    Attributes:
        answers: The answers, one per row.
    """

    def __init__(self, model: Any, pad_token: int) -> None:
        self._model = model
        self._pad = pad_token
        self._device = input_device(model)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_last_only = "logits_to_keep" in parameters
        self._cache: Any = None
        self.answers: list[Answer] = []

    @property
    def columns(self) -> int:
        """Number of columns: the tokens of the longest row that are in the cache."""
        return int(self._cache.get_seq_length()) if self._cache is not None else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, 0 while there are none."""
        tokens = self.columns * len(self.answers)
        if not tokens:
            return 0
        tensors = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]
        return int(sum(tensor.numel() * tensor.element_size() for tensor in tensors) // tokens)

    def join(self, answers: Sequence[Answer]) -> Tensor:
        """Compute the prompts of new answers and put them under the rows that are there.

        Answers to one request that have no token yet share the work.

        Returns:
            Scores of the next token of the new answers, [answers, vocabulary].
        """
        import torch

        shared = [index for index, answer in enumerate(answers) if not index or not _shares(answers[index - 1], answer)]
        rows = [answers[index].all_tokens for index in shared]
        cache = self._empty_cache()
        mask = torch.tensor([[0] * (max(map(len, rows)) - len(row)) + [1] * len(row) for row in rows])
        ids = torch.tensor([[self._pad] * (mask.shape[1] - len(row)) + row for row in rows])
        scores = self._forward(ids, mask, cache)
        if len(shared) < len(answers):
            starts = set(shared)
            repeats = torch.tensor([index in starts for index in range(len(answers))]).cumsum(0) - 1
            cache.batch_select_indices(repeats)
            scores = scores[repeats.to(scores.device)]
        self._cache = cache if self._cache is None else _stacked(self._cache, cache)
        self.answers.extend(answers)
        return scores

    def step(self) -> Tensor:
        """Go on by the newest token of every answer.

        Returns:
            Scores of the next token, [answers, vocabulary].
        """
        import torch

        lengths = torch.tensor([len(answer.job.prompt_ids) + len(answer.tokens) for answer in self.answers])
        mask = (torch.arange(self.columns + 1)[None] > self.columns - lengths[:, None]).long()
        ids = torch.tensor([[answer.tokens[-1]] for answer in self.answers])
        return self._forward(ids, mask, self._cache)

    def leave(self, rows: Collection[int]) -> None:
        """Take rows out, and the columns that are then empty."""
        import torch

        if not rows:
            return
        keep = [row for row in range(len(self.answers)) if row not in rows]
        self.answers = [self.answers[row] for row in keep]
        if not keep:
            self._cache = None
            return
        # The newest token of each answer is not in the cache yet.
        longest = max(len(answer.job.prompt_ids) + len(answer.tokens) for answer in self.answers) - 1
        index = torch.tensor(keep)
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                cut = tensor.shape[-2] - longest
                setattr(layer, name, tensor[..., max(0, cut) :, :][index.to(tensor.device)])

    def clear(self) -> list[Answer]:
        """Take all answers out and return them."""
        answers, self.answers, self._cache = self.answers, [], None
        return answers

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layer_class_to_replicate = _growing_layer()
        return cache

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


def _shares(before: Answer, answer: Answer) -> bool:
    return before.job is answer.job and not before.tokens and not answer.tokens


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
