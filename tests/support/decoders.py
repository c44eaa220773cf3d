"""Small real tokenizers of the kinds that models use, and their decoding of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from support.tiny_models import SAMPLE_TEXTS, SPECIAL_TOKENS

EXTRA_TEXTS = ["naïve café, 東京 and 👍🏽 thumbs", "tabs\tand\n\nempty lines", "Grüße aus Köln"]


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE as in GPT-2, Llama 3 and Qwen: characters may be split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((SAMPLE_TEXTS + EXTRA_TEXTS) * 4, trainer)
    return tokenizer


@cache
def sentence_piece() -> Tokenizer:
    """BPE with space markers and byte fallback as in Llama 2, Mistral and Gemma: the first space is taken off."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", *SPECIAL_TOKENS])}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = []
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyzTWA.,?:é"]
    for piece in pieces:
        vocabulary[piece] = len(vocabulary)
    for left, right in [("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the"), ("i", "s"), ("▁", "is"), ("a", "n")]:
        merges.append((left, right))
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def decode_with(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return the decoding of a tokenizer, without special tokens."""
    return lambda token_ids: tokenizer.decode(list(token_ids), skip_special_tokens=True)
