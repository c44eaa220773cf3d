"""How many answers a torch engine works on at once: by number, by tokens of a step, and by memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prefect_huggingface.blocks import EngineOptions
from prefect_huggingface.tasks.engines.answers import Answer
from prefect_huggingface.tasks.engines.transformers.loading import input_device

CPU_SEQUENCES, CPU_STEP_TOKENS, CPU_MEMORY_SHARE = 64, 2048, 0.25
GPU_SEQUENCES, GPU_STEP_TOKENS, GPU_MEMORY_SHARE = 128, 16384, 0.8
# Share of the tokens of one joint prompt computation that must not be padding.
LEAST_FILL = 0.75


@dataclass(slots=True)
class EngineSizes:
    """Limits of one engine.

    Attributes:
        sequences: Number of answers at once.
        step_tokens: Number of prompt tokens, with padding, that are computed at once.
        cache_bytes: Bytes of keys and values.
        bytes_per_token: Bytes of keys and values of one token, as far as known.
    """

    sequences: int
    step_tokens: int
    cache_bytes: int
    bytes_per_token: int

    @classmethod
    def of(cls, loaded: Any, options: EngineOptions) -> EngineSizes:
        """Choose the sizes by the device of a loaded model, where the options leave them open."""
        on_cpu = input_device(loaded).type == "cpu"
        return cls(
            sequences=options.max_num_seqs or (CPU_SEQUENCES if on_cpu else GPU_SEQUENCES),
            step_tokens=options.max_num_batched_tokens or (CPU_STEP_TOKENS if on_cpu else GPU_STEP_TOKENS),
            cache_bytes=int(options.cache_size_gb * 2**30) if options.cache_size_gb else _free_memory(loaded),
            bytes_per_token=_expected_bytes_per_token(loaded),
        )

    def lower(self, failed_with: int) -> None:
        """Allow fewer answers at once, after so many were too many."""
        self.sequences = max(1, min(self.sequences, failed_with) // 2)

    def room(self, running: Sequence[Answer], waiting: Iterable[Answer]) -> int:
        """Return how many of the first waiting answers may join the running ones now, at least one where none runs."""
        count = longest = used = 0
        columns = max(map(_final_columns, running), default=0)
        for answer in waiting:
            length = len(answer.all_tokens)
            longest, used = max(longest, length), used + length
            columns = max(columns, _final_columns(answer))
            rows = len(running) + count + 1
            is_first = rows == 1
            fits = (
                rows <= self.sequences
                and rows * columns * self.bytes_per_token <= self.cache_bytes
                and (
                    not count
                    or ((count + 1) * longest <= self.step_tokens and used >= LEAST_FILL * (count + 1) * longest)
                )
            )
            if not (fits or is_first):
                break
            count += 1
        return count


def _final_columns(answer: Answer) -> int:
    return len(answer.job.prompt_ids) + answer.job.options.max_new_tokens


def _free_memory(loaded: Any) -> int:
    device = input_device(loaded)
    if device.type == "cuda":
        import torch

        return int(GPU_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(CPU_MEMORY_SHARE * psutil.virtual_memory().available)


def _expected_bytes_per_token(loaded: Any) -> int:
    """Estimate the bytes of keys and values of a token, until they are measured."""
    config = loaded.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", 1)
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // heads
    return int(
        2
        * layers
        * (getattr(config, "num_key_value_heads", None) or heads)
        * size
        * getattr(loaded.dtype, "itemsize", 4)
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error of torch says that the memory ran out. On a CPU it has no class of its own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def free_cached_memory() -> None:
    """Give the memory that torch keeps for later back to the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
