"""A model of random weights with the shape of SmolLM2-135M, for measurements at a real size."""

from __future__ import annotations

from pathlib import Path

from support.tiny_models import make_tokenizer


def make_smollm(folder: Path, seed: int = 0) -> Path:
    """Save the checkpoint and return its folder. Its tokenizer is small; the size of its vocabulary is the real one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100_000.0, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
