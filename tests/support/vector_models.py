"""Tiny random models for vectors and scores of each family, with the files of Sentence Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tiny_models import SAMPLE_TEXTS, save_with_spread_weights

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ENCODER = {**SIZES, "max_position_embeddings": 66}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
# Prefix of the classes, class suffix, settings, pooling and prompts.
EMBEDDERS: dict[str, tuple[str, str, dict[str, Any], str, dict[str, str]]] = {
    "bert": ("Bert", "Model", ENCODER, "mean", {}),
    "mpnet": ("MPNet", "Model", {**ENCODER, "pad_token_id": 1}, "mean", {}),
    "xlm-roberta": ("XLMRoberta", "Model", ENCODER, "cls", {"query": "query: ", "document": "passage: "}),
    "modernbert": ("ModernBert", "Model", {**ENCODER, "cls_token_id": 0, "sep_token_id": 2}, "cls", {}),
    "qwen3-embedding": ("Qwen3", "ForCausalLM", DECODER, "lasttoken", {"query": "Instruct: Find it.\nQuery:"}),
}
RANKERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-reranker": ("Bert", "ForSequenceClassification", {**ENCODER, "num_labels": 1}),
    "bge-reranker": ("XLMRoberta", "ForSequenceClassification", {**ENCODER, "num_labels": 1}),
    "modernbert-reranker": (
        "ModernBert", "ForSequenceClassification", {**ENCODER, "num_labels": 1, "cls_token_id": 0, "sep_token_id": 2},
    ),
    "qwen3-reranker": ("Qwen3", "ForCausalLM", DECODER),
}  # fmt: skip
TEXTS = [
    "Paris", "The capital of France is Paris.", "What is the number 42 in French? Quarante-deux.",
    "A small model of random weights says nothing that makes sense, but it always says the same.",
    "One, two, three, four, five.", "Madrid is the capital of Spain, and it is not in France.",
]  # fmt: skip


def make_embedder(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model for vectors and return its folder.

    Args:
        folder: Folder to make.
        family: One of `EMBEDDERS`.
        seed: Seed of the weights.
        changes: `max_seq_length`, `normalize`, `truncate_dim` and `pooling`, where others are wanted.
    """
    prefix, suffix, settings, pooling, prompts = EMBEDDERS[family]
    _make_checkpoint(folder, prefix, suffix, settings, seed, end="</s>" if suffix == "ForCausalLM" else None)
    names = ["Transformer", "Pooling", *(["Normalize"] if changes.get("normalize", True) else [])]
    modules = [
        {"idx": place, "name": str(place), "path": "" if not place else f"{place}_{name}",
         "type": f"sentence_transformers.models.{name}"}
        for place, name in enumerate(names)
    ]  # fmt: skip
    pooling = changes.get("pooling", pooling)
    key = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[pooling]
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 64, f"pooling_mode_{key}": True})
    _write(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    length = changes.get("max_seq_length", 64 if suffix == "Model" else 256)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    return folder


def make_ranker(folder: Path, family: str, seed: int = 0) -> Path:
    """Save a random reranker and return its folder."""
    prefix, suffix, settings = RANKERS[family]
    return _make_checkpoint(folder, prefix, suffix, settings, seed)


def _make_checkpoint(
    folder: Path, prefix: str, suffix: str, settings: dict[str, Any], seed: int, end: str | None = None
) -> Path:
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _make_tokenizer(folder, prefix, end)
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{prefix}Config")(vocab_size=vocabulary, **{**tokens, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}{suffix}")(config).eval()
    return save_with_spread_weights(model, folder)


def _make_tokenizer(folder: Path, prefix: str, end: str | None) -> int:
    """Train and save a tokenizer that puts the special tokens of the family around a text or a pair."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE_TEXTS * 4, trainer)
    tokenizer.add_tokens(["yes", "no"] if prefix == "Qwen3" else [])
    if end is not None:
        single, pair = f"$A {end}", f"$A {end} $B {end}"
    elif prefix == "Qwen3":
        single, pair = "$A", "$A $B"
    else:
        middle = "</s>" if prefix == "Bert" else "</s> </s>"
        types = ":1" if prefix == "Bert" else ":0"
        single, pair = "<s> $A </s>", f"<s> $A {middle} $B{types} </s>{types}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", additional_special_tokens=SPECIAL[4:], model_max_length=512,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if prefix == "Bert" else [])],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return len(fast)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
