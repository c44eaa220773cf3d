"""Train the quickstart model: its tokenizer, its weights and its model card, from nothing, on the CPU.

`python train.py` writes `model/` and takes less than 20 minutes on two cores. The seed is fixed; another machine or
number of threads may still round differently and give other weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import facts
import model_card
import torch
from prompts import CHAT_TEMPLATE, END_TOKEN, PAD_TOKEN, SPECIAL_TOKENS, training_examples
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
MODEL_FOLDER = Path(__file__).parent / "model"
VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 1024
# A capital begins a token, so that a name is the same tokens after a space and after a quote; each digit is a token.
WORD_PATTERN = r" ?[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{Lu}[\p{L}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
BATCH_TOKENS = 3072
EXAMPLES_PER_POOL = 8192
MATRIX_LEARNING_RATE = 5e-3  # Muon; it needed under half the steps of AdamW
OTHER_LEARNING_RATE = 3e-3  # AdamW, for the embedding and the norms
WARMUP_STEPS = 100
SHORT_STEPS_SHARE = 0.6  # the first steps have no long prompts
QUANTIZATION_NOISE_FROM = 0.6  # of the steps
QUANTIZATION_GROUP = 128
IGNORED = -100
PRINT_EVERY_STEPS = 50

Example = tuple[list[int], list[int]]  # token ids, and the labels of the same length


def train_tokenizer(text_count: int = 30_000) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE in which the known names and places are few tokens each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    known = [*facts.NAMES, *facts.SURNAMES, *(word for place in facts.PLACES for word in place)]
    short = (prompt + answer for prompt, answer in islice(training_examples(SEED, with_long=False), text_count))
    long = (prompt for prompt, _ in islice(training_examples(SEED, with_long=True), text_count // 20))
    tokenizer.train_from_iterator(itertools.chain(known * 300, short, long), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; all sizes are multiples of the int4 group size."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _tokenize(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[Example]:
    """Tokenize prompts and answers apart, as at inference; only the answer and its end have labels."""
    prompts, answers = (tokenizer(list(texts))["input_ids"] for texts in zip(*pairs, strict=True))
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        target = [*answer, tokenizer.eos_token_id]
        examples.append((prompt + target, [IGNORED] * len(prompt) + target))
    return [example for example in examples if len(example[0]) <= CONTEXT_LENGTH]


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, with_long: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give padded batches of examples of like length, about `BATCH_TOKENS` tokens each, without end."""
    rng = random.Random(seed)
    pairs = training_examples(seed, with_long=with_long)
    while True:
        pool = sorted(_tokenize(tokenizer, list(islice(pairs, EXAMPLES_PER_POOL))), key=lambda example: len(example[0]))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if len(example[0]) * (len(groups[-1]) + 1) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        for group in groups:
            length = len(group[-1][0])
            ids = [tokens + [tokenizer.pad_token_id] * (length - len(tokens)) for tokens, _ in group]
            labels = [targets + [IGNORED] * (length - len(targets)) for _, targets in group]
            yield torch.tensor(ids), torch.tensor(labels)  # (B, T), (B, T)


class Int4Noise(torch.nn.Module):
    """Rounds a weight as symmetric int4 in groups of 128 does, and lets gradients pass as if it did not."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Round about two of three times, so that the unrounded model stays as good."""
        if not self.training or random.random() < 0.34:
            return weight
        groups = weight.detach().view(weight.shape[0], -1, QUANTIZATION_GROUP)  # (out, groups, 128)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = torch.where(-low >= high, -low, -high) / 8
        rounded = (groups / scale).round().clamp(-8, 7) * scale
        return weight + (rounded.view_as(weight) - weight.detach())


def _linear_layers(model: LlamaForCausalLM) -> list[torch.nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answers. Padding is on the right, where causal attention never sees it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, H)
        targets = labels[:, 1:]
        asked = targets != IGNORED
        logits = model.lm_head(hidden[asked])  # (answer tokens, vocabulary)
    return functional.cross_entropy(logits.float(), targets[asked])


def _rate(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [layer.weight for layer in _linear_layers(model)]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def _train_step(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], ids: torch.Tensor, labels: torch.Tensor
) -> float:
    loss = _loss(model, ids, labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train in place; the last part of the steps runs with the rounding errors of int4 weights."""
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps)) for optimizer in optimizers
    ]
    short_steps = int(steps * SHORT_STEPS_SHARE)
    short = islice(batches(tokenizer, SEED, with_long=False), short_steps)
    mixed = islice(batches(tokenizer, SEED + 1, with_long=True), steps - short_steps)
    started, total = time.monotonic(), 0.0
    model.train()
    for step, (ids, labels) in enumerate(itertools.chain(short, mixed), start=1):
        if step == int(steps * QUANTIZATION_NOISE_FROM):
            for layer in _linear_layers(model):
                parametrize.register_parametrization(layer, "weight", Int4Noise())
        total += _train_step(model, optimizers, ids, labels)
        for schedule in schedules:
            schedule.step()
        if step % PRINT_EVERY_STEPS == 0:
            mean = total / PRINT_EVERY_STEPS
            print(f"step {step}/{steps}, loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
    for layer in _linear_layers(model):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    model.eval()


def main() -> None:
    """Train, save and write the model card."""
    parser = argparse.ArgumentParser(description="Train the quickstart model.")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=MODEL_FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    random.seed(SEED)
    started, wall_started = time.process_time(), time.monotonic()
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, options.steps)
    minutes = (time.process_time() - started) / 60  # of one core: the machine may be shared
    model.bfloat16().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    record = {
        "minutes": round(minutes, 1),
        "wall_minutes": round((time.monotonic() - wall_started) / 60, 1),
        "steps": options.steps,
        "threads": options.threads,
        "parameters": f"{model.num_parameters():,}",
        "batch_tokens": BATCH_TOKENS,
        "noise_percent": round(100 * (1 - QUANTIZATION_NOISE_FROM)),
        "group_size": QUANTIZATION_GROUP,
    }
    (options.output / model_card.TRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    model_card.write(options.output)


if __name__ == "__main__":
    main()
