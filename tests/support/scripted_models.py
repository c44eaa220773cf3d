"""Tiny models with weights set by hand, that say a given text token by token, in the chat format of a family.

The model is a Llama of one layer. Each token has a code of plus and minus ones. One head of attention copies the code
of the token before; each neuron of the feed-forward layer knows one pair of tokens and writes the token that follows.
Where no pair is known, as after a prompt, the answer begins; what it is depends on the triggers in the context.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from support.chat_families import FAMILIES, Family

CODE = 128  # dimensions of the code of a token
HEAD = 128
CONTEXT = 4096


@dataclass(frozen=True)
class _Script:
    """What is said in some case: the tokens, after a trigger in the context or without one."""

    trigger: str | None
    tokens: list[str]


def make_scripted_model(
    folder: Path,
    answer: str,
    family: str | Family = "qwen-3",
    *,
    after: Mapping[str, str] | None = None,
    letters: Mapping[str, str] | None = None,
    ends: bool = True,
    generation_eos: str | None = None,
) -> Path:
    """Save a model that answers every prompt with the same text, and return its folder.

    Args:
        folder: Folder of the checkpoint.
        answer: Text to say; what looks like a token of the family is that token.
        family: Name of a family, or the family.
        after: Texts to say where a certain text, which becomes one token, stands in the context. Later ones win.
        letters: What follows two letters, for answers that a grammar makes letter by letter.
        ends: Whether the end token of a turn follows the answer. Otherwise the answer begins again and again.
        generation_eos: End token of the generation configuration, that of the tokenizer by default.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    after = dict(after or {})
    known = [*family.special, *family.added, *(text for text in after if text not in family.special)]
    pieces: set[str] = set()
    end = [family.turn_end or family.eos] if ends else []
    scripts = [_Script(None, _split(answer, known, pieces) + end)]
    scripts += [_Script(trigger, _split(text, known, pieces) + end) for trigger, text in after.items()]
    added = [*family.added, *(text for text in after if text not in (*family.special, *family.added))]
    tokenizer = make_family_tokenizer(folder, family, pieces=sorted(pieces), added=added)
    ids = tokenizer.convert_tokens_to_ids
    vocabulary = {text: ids(text) for text in known} | {text: ids(_to_bytes(text)) for text in pieces}
    pairs = {
        (vocabulary[before] if before else None, vocabulary[token]): vocabulary[following]
        for script in scripts
        for before, token, following in zip([None, *script.tokens], script.tokens, script.tokens[1:], strict=False)
    }
    for both, following in (letters or {}).items():
        first, second, third = (ids(_to_bytes(letter)) for letter in (*both, following))
        pairs[first, second] = third
    _save_model(folder, scripts, pairs, vocabulary, len(tokenizer))
    eos = vocabulary[generation_eos or family.eos]
    bos = vocabulary[family.bos] if family.bos else None
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings |= {"eos_token_id": eos, "bos_token_id": bos}
        (folder / name).write_text(json.dumps(settings))
    return folder


def make_family_tokenizer(
    folder: Path,
    family: Family,
    *,
    pieces: Sequence[str] = (),
    added: Sequence[str] | None = None,
    jinja_files: bool = True,
) -> Any:
    """Save and return a tokenizer of bytes with the special tokens and templates of a family.

    Args:
        folder: Folder to save it in.
        family: The family.
        pieces: Texts with tokens of their own, which no text is encoded to.
        added: Added tokens that are not special, those of the family by default.
        jinja_files: Whether templates are files of their own, as of Transformers 4.50, or part of the configuration.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map(_to_bytes, pieces)]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys(letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.special])
    others = family.added if added is None else added
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in others])
    if family.bos:
        start = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos} $B", special_tokens=[start]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos)
    template = family.template
    fast.chat_template = template if isinstance(template, str) else dict(template)
    fast.save_pretrained(folder, save_jinja_files=jinja_files)
    return fast


def _split(text: str, known: Iterable[str], pieces: set[str]) -> list[str]:
    """Return the tokens of a text: those that are known, and between them pieces that never occur twice."""
    import re

    marks = "|".join(re.escape(mark) for mark in sorted(known, key=len, reverse=True))
    tokens: list[str] = []
    for part in re.split(f"({marks})", text):
        if part in known:
            tokens.append(part)
            continue
        if part and part in pieces:
            raise ValueError(f"The text {part!r} stands alone twice. Change one of the places.")
        while part:
            size = next((size for size in range(2, len(part) + 1) if part[:size] not in pieces), len(part))
            # What is left over must be a new piece as well.
            size = len(part) if part[size:] in pieces or len(part) - size == 1 else size
            pieces.add(part[:size])
            tokens.append(part[:size])
            part = part[size:]
    return tokens


@lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    """Return the letters that tokenizers of bytes write bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _to_bytes(text: str) -> str:
    return "".join(_byte_letters()[byte] for byte in text.encode())


def _save_model(
    folder: Path,
    scripts: Sequence[_Script],
    pairs: Mapping[tuple[int | None, int], int],
    ids: Mapping[str, int],
    vocabulary: int,
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    triggers = [script.trigger for script in scripts if script.trigger is not None]
    # Parts of the hidden state: this token, the one before, the one to come, a constant, and one flag for each trigger.
    this, before, to_come = (slice(part * CODE, (part + 1) * CODE) for part in range(3))
    constant = 3 * CODE
    hidden = 3 * CODE + 1 + len(triggers)
    hidden += -hidden % 16
    neurons, heads = len(pairs) + len(scripts), 4 if len(triggers) < 4 else 16
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=neurons + -neurons % 16,
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads, head_dim=HEAD,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, rms_norm_eps=1e-9,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 2, (vocabulary, CODE), generator=generator).float() * 2 - 1
    model = LlamaForCausalLM(config).float()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name in state:
        if name.endswith("norm.weight"):
            state[name] += 1
    embedding = state["model.embed_tokens.weight"]
    embedding[:, this], embedding[:, constant] = codes, 1.0
    # Norms divide by the root of the mean square, which is the same for every token.
    first_norm = math.sqrt((CODE + 1) / hidden)
    layer = "model.layers.0."
    query, key, value, output = (state[f"{layer}self_attn.{name}_proj.weight"] for name in "qkvo")
    angles = config.rope_theta if hasattr(config, "rope_theta") else 10000.0
    frequencies = torch.tensor([angles ** (-2 * place / HEAD) for place in range(HEAD // 2)])
    scale = 60.0
    # Keys are the same everywhere; turned by its place, the query fits the key one place before best.
    key[: HEAD // 2, constant] = first_norm
    query[: HEAD // 2, constant] = scale * torch.cos(frequencies) * first_norm
    query[HEAD // 2 : HEAD, constant] = -scale * torch.sin(frequencies) * first_norm
    value[:CODE, this] = torch.eye(CODE) * first_norm
    output[before, :CODE] = torch.eye(CODE)
    slow = HEAD // 2 - 1  # turns so slowly that places do not matter
    for number, trigger in enumerate(triggers, start=1):
        row = number * HEAD
        query[row + slow, constant] = 10.0 * math.sqrt(HEAD) * first_norm
        key[row + slow, this] = 10.0 * codes[ids[trigger]] / CODE * first_norm
        # A code that is unlike the trigger's must not count: only full likeness is above the constant.
        value[row, this] = 4.0 * codes[ids[trigger]] / CODE * first_norm
        value[row, constant] = -3.0 * first_norm
        output[constant + number, row] = 1.0
    gate, up, down = (state[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    for neuron, ((previous, token), following) in enumerate(pairs.items()):
        gate[neuron, this] = codes[token]
        threshold = 0.7 * CODE
        if previous is not None:
            gate[neuron, before] = codes[previous]
            threshold += CODE
        gate[neuron, constant] = -threshold
        up[neuron, constant] = 1.0
        # A pair counts more than a first token alone.
        down[to_come, neuron] = codes[following] * (0.2 if previous is None else 1.0)
    # Where no pair is known, the answer begins, or what follows the last trigger in the context.
    for number, script in enumerate(scripts):
        neuron = len(pairs) + number
        gate[neuron, constant] = -10.0 if number else 1.0
        gate[neuron, constant + number] += 20.0 if number else 0.0
        up[neuron, constant] = 1.0
        down[to_come, neuron] = codes[ids[script.tokens[0]]] * 0.05 * 3.0**number
    state["lm_head.weight"][:, to_come] = codes
    model.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
