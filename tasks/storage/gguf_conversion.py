"""The program of the child process that makes a checkpoint of a GGUF file: weights, configuration, tokenizer.

It is run as a file, like the exporter. The file was checked before, so that every tensor has a place and a shape.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.storage.exports.exporter import begin_child, peak_memory, report
from prefect_huggingface.tasks.storage.gguf_files import ROPE_FACTORS, checkpoint_config, read_file, rope_parameters
from prefect_huggingface.tasks.storage.gguf_tokenizers import ROUND_TRIPS, build_tokenizer, special_tokens

# Names in the checkpoint of the tensors of the model and of each of its layers.
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def main(job_path: str) -> None:
    """Make the checkpoint of a GGUF file.

    Args:
        job_path: JSON file with `source`, `output` and `parent`, the id of the parent process.
    """
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    begin_child(int(job["parent"]))
    source, output, started = Path(job["source"]), Path(job["output"]), time.monotonic()
    fields, tensors = read_file(source)
    report(step="weights")
    dtype = save_weights(output, fields, tensors)
    report(step="tokenizer")
    save_tokenizer(output, fields)
    report(
        step="done",
        seconds={"convert": time.monotonic() - started},
        peak_memory_bytes=peak_memory(),
        weights={dtype: 1.0},
    )


def save_weights(output: Path, fields: Mapping[str, Any], tensors: list[Any]) -> str:
    """Save the weights of a GGUF file and their configuration as a checkpoint, and return the data type.

    The type is that of the file where its weights are not quantized. Quantized ones carry their scales in half
    precision, so that is what they get. A weight that is too large for it keeps all of them in single precision.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    dtype = torch.float32 if kinds == {"F32"} else torch.bfloat16 if kinds == {"BF16"} else torch.float16
    settings = checkpoint_config(fields)
    weights = _read_weights(tensors, settings, dtype)
    if any(weight.isinf().any() for weight in weights.values()):
        dtype = torch.float32
        weights = _read_weights(tensors, settings, dtype)
    rope = rope_parameters(settings, tensors)
    settings.pop("rope_theta", None)
    config = AutoConfig.for_model(
        **{**settings, "vocab_size": weights["model.embed_tokens.weight"].shape[0]},
        tie_word_embeddings="lm_head.weight" not in weights,
        rope_parameters=rope,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[settings["model_type"]]],
        dtype=dtype,
        **{f"{name}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")},
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )
    config.save_pretrained(output)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    return str(dtype).removeprefix("torch.")


def _read_weights(tensors: list[Any], settings: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the weights in a data type, by their names in the checkpoint."""
    import torch
    from gguf import dequantize

    weights = {}
    for tensor in (tensor for tensor in tensors if tensor.name != ROPE_FACTORS):
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if settings["model_type"] == "llama":
            weight = _separate_halves(tensor.name, weight, settings)
        weights[_checkpoint_name(tensor.name)] = weight.to(dtype).contiguous()
    return weights


def _checkpoint_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in MODEL_TENSORS:
        return f"{MODEL_TENSORS[stem]}.{suffix}"
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{LAYER_TENSORS[part]}.{suffix}"


def _separate_halves(name: str, weight: Any, settings: Mapping[str, Any]) -> Any:
    """Undo the order of Llama's queries and keys in GGUF, where the two halves of each head are interleaved."""
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def save_tokenizer(output: Path, fields: Mapping[str, Any]) -> None:
    """Save the tokenizer of a GGUF file beside its weights, and what ends an answer.

    Raises:
        RuntimeError: If the saved tokenizer is not the one that was checked.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    tokenizer, roles = build_tokenizer(fields), special_tokens(fields)
    context = fields.get(f"{fields['general.architecture']}.context_length")
    limits = {} if context is None else {"model_max_length": int(context)}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **limits)
    fast.chat_template = fields.get("tokenizer.chat_template")
    fast.save_pretrained(output)
    saved = AutoTokenizer.from_pretrained(output, local_files_only=True)
    for text in ROUND_TRIPS:
        tokens = saved(text)["input_ids"]
        if tokens != tokenizer.encode(text).ids:
            raise RuntimeError(f"The saved tokenizer reads {text!r} in another way than the one of the GGUF file.")
    ends = [fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    ids = list(dict.fromkeys(int(end) for end in ends if end is not None))
    config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(output, local_files_only=True))
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    config.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1])
