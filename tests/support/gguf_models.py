"""Small GGUF files: written from a random checkpoint, with tokenizers of several kinds, and broken on purpose."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    path: Path,
    checkpoint: Path,
    tokenizer: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    quantization: str = "F32",
) -> Path:
    """Write a checkpoint as a GGUF file and return its path.

    Args:
        path: File to write.
        checkpoint: Folder of a Llama, Qwen2 or Qwen3 checkpoint.
        tokenizer: Fields of the tokenizer, `byte_level_fields` of the checkpoint by default.
        settings: Further fields, over those of the checkpoint. None as a value leaves a field out.
        quantization: Type of the matrices, "F32", "F16", "BF16", "Q8_0" or "Q4_0" for instance.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    architecture = config["model_type"]
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    fields: dict[str, Any] = {
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(theta),
        f"{architecture}.rope.dimension_count": head_size,
        "general.name": "tiny",
        **(byte_level_fields(checkpoint) if tokenizer is None else tokenizer),
        **(settings or {}),
    }
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", architecture))
    for name, value in fields.items():
        _add_field(writer, name, value)
    for name, weight in [*_weights(checkpoint, config), *_rope_factors(checkpoint, config)]:
        kind = gguf.GGMLQuantizationType[quantization if weight.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_fields(checkpoint: Path, pre: str | None = "gpt-2") -> dict[str, Any]:
    """Return the fields for the byte-level BPE tokenizer of a checkpoint, whatever its own pre-tokenizer is."""
    data = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    template = checkpoint / "chat_template.jinja"
    vocabulary = {**data["model"]["vocab"], **{token["content"]: token["id"] for token in data["added_tokens"]}}
    special = {token["id"] for token in data["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if number in special else NORMAL for number in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template.read_text() if template.exists() else None,
    }


def sentence_piece_fields(texts: list[str], size: int, space_prefix: bool = True) -> tuple[dict[str, Any], Any]:
    """Train a SentencePiece BPE tokenizer, and return its fields and the processor to compare with."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        add_dummy_prefix=space_prefix, allow_whitespace_only_pieces=True, character_coverage=0.99,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.vocab_size())

    def kind(number: int) -> int:
        if processor.is_unknown(number):
            return UNKNOWN
        return CONTROL if processor.is_control(number) else BYTE if processor.is_byte(number) else NORMAL

    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(number) for number in ids],
        "tokenizer.ggml.scores": [float(processor.get_score(number)) for number in ids],
        "tokenizer.ggml.token_type": [kind(number) for number in ids],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }
    return fields, processor


def _add_field(writer: Any, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _weights(checkpoint: Path, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the weights under the names of GGUF; Llama's queries and keys have their halves interleaved there."""
    from safetensors.numpy import load_file

    weights = []
    for name, weight in sorted(load_file(checkpoint / "model.safetensors").items()):
        stem, _, suffix = name.rpartition(".")
        parts = stem.split(".")
        if parts[:2] == ["model", "layers"]:
            short = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}"
        else:
            short = NAMES[stem]
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        count = heads.get(short.rpartition(".")[2])
        if config["model_type"] == "llama" and count is not None:
            rows = weight.shape[0]
            weight = weight.reshape(count, 2, rows // count // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        weights.append((f"{short}.{suffix}", weight.astype("float32")))
    return weights


def _rope_factors(checkpoint: Path, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the factors of the frequencies of a Llama 3, which stand in GGUF in place of its settings."""
    import numpy as np

    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return []
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(checkpoint), "cpu")
    plain = rope["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
    return [("rope_freqs.weight", (plain / scaled.numpy()).astype("float32"))]
