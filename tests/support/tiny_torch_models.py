"""More tiny random checkpoints for torch, one for each way in which a model keeps its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_models import make_tokenizer

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1}


def _save(folder: Path, config_class: Any, model_class: Any, seed: int = 0, **settings: Any) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(folder, settings.pop("chat_template", None))
    torch.manual_seed(seed)
    config = config_class(vocab_size=vocabulary, pad_token_id=2, **settings)
    model_class(config).save_pretrained(folder)
    return folder


def make_tiny_gpt2(folder: Path) -> Path:
    """Learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 1}
    return _save(folder, GPT2Config, GPT2LMHeadModel, **sizes)


def make_tiny_bloom(folder: Path) -> Path:
    """Positions by a bias of the attention."""
    from transformers import BloomConfig, BloomForCausalLM

    return _save(
        folder, BloomConfig, BloomForCausalLM, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )


def make_tiny_sliding(folder: Path) -> Path:
    """A window of eight tokens in every layer, as in Mistral."""
    from transformers import MistralConfig, MistralForCausalLM

    return _save(
        folder, MistralConfig, MistralForCausalLM, intermediate_size=128, num_key_value_heads=2, sliding_window=8,
        max_position_embeddings=256, **SIZES,
    )  # fmt: skip


def make_tiny_mamba(folder: Path) -> Path:
    """A recurrent state, which answers cannot join."""
    from transformers import MambaConfig, MambaForCausalLM

    return _save(
        folder, MambaConfig, MambaForCausalLM, hidden_size=64, state_size=8, num_hidden_layers=2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip


def make_tiny_t5(folder: Path) -> Path:
    """Encoder and decoder with relative positions and prefixes for its tasks."""
    from transformers import T5Config, T5ForConditionalGeneration

    return _save(
        folder, T5Config, T5ForConditionalGeneration, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4,
        decoder_start_token_id=2, eos_token_id=1, initializer_factor=20.0,
        task_specific_params={
            "summarization": {"prefix": "summarize: ", "num_beams": 4, "min_length": 30},
            "translation_en_to_fr": {"prefix": "translate English to French: "},
            "translation_en_to_de": {"prefix": "translate English to German: "},
        },
    )  # fmt: skip


def make_tiny_bart(folder: Path) -> Path:
    """Encoder and decoder with a limited number of positions."""
    from transformers import BartConfig, BartForConditionalGeneration

    return _save(
        folder, BartConfig, BartForConditionalGeneration, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1,
        init_std=0.5,
    )  # fmt: skip
