"""Sizes of continuous batching: chosen from the model and the free memory, or given by the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import EngineOptions
from prefect_huggingface.tasks.engines.chat_templates import read_json
from prefect_huggingface.tasks.engines.memory import available_bytes
from prefect_huggingface.tasks.engines.openvino.codec import read_context_length

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


def choose_sizes(folder: Path, options: EngineOptions, precision: str) -> SchedulerSizes:
    """Return the sizes for a model.

    Args:
        folder: Folder of the OpenVINO model.
        options: What the user gives; the rest is chosen.
        precision: Precision of the KV cache, "u8" for instance.
    """
    sequences = options.max_num_seqs or DEFAULT_SEQUENCES
    token_bytes = kv_bytes_per_token(folder, precision)
    row_tokens = min(read_context_length(folder) or USUAL_ROW_TOKENS, USUAL_ROW_TOKENS)
    if options.cache_size_gb is not None:
        cache_bytes = int(options.cache_size_gb * GIB)
    else:
        wanted = int(2 * sequences * row_tokens * token_bytes) if token_bytes else GIB
        cache_bytes = min(max(wanted, SMALLEST_CACHE_BYTES), int(LARGEST_SHARE_OF_MEMORY * available_bytes()))
    kv_blocks = max(int(cache_bytes / (token_bytes * BLOCK_TOKENS)), 2) if token_bytes else 0
    batched_tokens = options.max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS, sequences)
    if kv_blocks:
        # OpenVINO GenAI 2026.4 crashes when a step may take as many tokens as the cache holds, and the cache gets full.
        batched_tokens = min(batched_tokens, (kv_blocks - 1) * BLOCK_TOKENS)
    return SchedulerSizes(sequences, batched_tokens, cache_bytes, kv_blocks)


def kv_bytes_per_token(folder: Path, precision: str) -> float:
    """Return how many bytes of KV cache one token takes, or 0 where the model does not say."""
    settings = read_json(folder / "config.json")
    settings = {**settings, **(settings.get("text_config") or {})}
    layers = settings.get("num_hidden_layers") or settings.get("n_layer")
    heads = settings.get("num_attention_heads") or settings.get("n_head")
    hidden = settings.get("hidden_size") or settings.get("n_embd")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return 0.0
    size = settings.get("head_dim") or hidden // heads
    kv_heads = settings.get("num_key_value_heads") or heads
    return 2.0 * layers * kv_heads * size * PRECISION_BYTES.get(precision, 2.0)


def scheduler_config(sizes: SchedulerSizes, options: EngineOptions) -> Any:
    """Return the settings of OpenVINO GenAI for these sizes."""
    from openvino_genai import SchedulerConfig

    config = SchedulerConfig()
    config.max_num_seqs = sizes.sequences
    config.max_num_batched_tokens = sizes.batched_tokens
    config.enable_prefix_caching = options.enable_prefix_caching
    config.dynamic_split_fuse = True
    if sizes.kv_blocks:
        config.num_kv_blocks = sizes.kv_blocks
    else:
        config.cache_size = max(round(sizes.cache_bytes / GIB), 1)
    return config
