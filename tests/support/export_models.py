"""Tiny random checkpoints of the architectures that the export is shown on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_models import make_tokenizer, save_with_spread_weights

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
GROUPED = {**DECODER, "intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": False}
ENCODER_DECODER = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 256, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "scale_embedding": True,
}  # fmt: skip

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "phi3": ("Phi3", GROUPED),
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", {**GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": None}),
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", {
        "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2,
    }),
    "bart": ("Bart", ENCODER_DECODER),
    "marian": ("Marian", ENCODER_DECODER),
}  # fmt: skip
# What a task of a T5 changes, as in the configurations of the real ones.
TASK_SETTINGS = {
    "summarization": {"prefix": "summarize: ", "num_beams": 4, "min_length": 30},
    "translation_en_to_fr": {"prefix": "translate English to French: "},
    "translation_en_to_de": {"prefix": "translate English to German: "},
}
CLASS_NAMES = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration", "marian": "MarianMTModel"}
CLASS_NAMES |= {"gpt2": "GPT2LMHeadModel", "gemma3": "Gemma3ForCausalLM"}


def make_model(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random checkpoint of an architecture with a tokenizer, and return its folder.

    The weights are large enough that the answers depend on the prompt.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(folder)
    prefix, settings = {**CAUSAL, **SEQ2SEQ}[architecture]
    config = getattr(transformers, f"{prefix}Config")(vocab_size=vocabulary, **{**SPECIAL, **settings, **changes})
    torch.manual_seed(seed)
    name = CLASS_NAMES.get(architecture, f"{prefix}ForCausalLM")
    model = getattr(transformers, name)(config).eval()
    return save_with_spread_weights(model, folder)
