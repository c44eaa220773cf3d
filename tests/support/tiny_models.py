"""Tiny random models and their tokenizers, made in a second or two without any network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
SAMPLE_TEXTS = [
    "The capital of France is Paris and the capital of Spain is Madrid.",
    "What is the number 42 in French? Quarante-deux. One, two, three, four, five.",
    "A small model of random weights says nothing that makes sense, but it always says the same.",
]


def make_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """Train and save a byte-level BPE tokenizer, and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE_TEXTS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
    )  # fmt: skip
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)


def save_with_spread_weights(model: Any, folder: Path) -> Path:
    """Save a model with random weights that are far enough apart for its answers to differ; return its folder."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def make_tiny_llama(
    folder: Path, hidden_size: int = 128, layers: int = 2, seed: int = 0, context_length: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:  # fmt: skip
    """Save a random Llama checkpoint with a tokenizer and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(folder, chat_template)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def copy_with_own_code(source: Path, folder: Path, code: str) -> Path:
    """Copy a Llama checkpoint, with a model class of its own whose module runs some code when it is imported."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n" + code
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own-llama"
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copy_with_end_tokens(source: Path, folder: Path, end_tokens: list[int]) -> Path:
    """Copy a checkpoint or an export, with other tokens that end an answer."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**settings, "eos_token_id": end_tokens}))
    return folder
