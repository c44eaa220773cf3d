"""Tokenizers of GGUF files, built from the tokens, merges, scores and kind that the file itself names.

Transformers makes tokenizers of GGUF files that it cannot save rightly, so they are built here with the `tokenizers`
library. A tokenizer is used only if it gives texts of many kinds back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GPT2, LLAMA3, QWEN2 = "gpt-2", "llama-bpe", "qwen2"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS_AND_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut into words before merging, by `tokenizer.ggml.pre`. GPT-2's own rule comes with the byte-level step;
# the others put digits alone first, or replace the rule.
PRE_TOKENIZERS: Mapping[str, str | None] = {
    "gpt-2": None,
    "phi-2": None,
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{WORDS_AND_MARKS}",
    "llama3": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{WORDS_AND_MARKS}",
    "qwen2": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{WORDS_AND_MARKS}",
}
STARTS_WITH_BOS = ("llama-bpe", "llama3")
COMPOSES_ACCENTS = ("qwen2",)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
ROUND_TRIPS = (
    "The capital of France is Paris, and 2 + 2 = 4.",
    "0 7 42 1234567890 3.14159 1,000,000 2026-11-25",
    "a  b   c    d\te\n\nf \n g\r\nh",
    "trailing spaces  ",
    "  leading spaces",
    "It's what they'd said: we've won, I'm sure you'll see; DON'T SHOUT!",
    "Ça coûte déjà 5 €, señor Müller, naïve façade, Łódź, İstanbul",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "日本語のテキスト、中文文本。한국어 텍스트 ไทย हिन्दी",
    "🙂👍🏽👩‍👩‍👧 🇫🇷 ½ ² ™ … – — “quoted” ‘single’",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # note\n",
    '{"name": "Ada", "age": 36, "tags": ["a", "b\\n"], "ok": true}',
    '<div class="x">&amp;</div> http://example.org/?q=a%20b&c=1#d C:\\dir\\file',
    "snake_case camelCase SCREAMING kebab-case @user #tag $5 100% a/b\\c~`^|",
)
LONG_WORDS = "The children understand that people everywhere should remember their mother and father."
SMALL_VOCABULARY = 4096


def build_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a GGUF file as one of the `tokenizers` library, after it has been checked.

    Args:
        fields: Metadata of the file by name, `tokenizer.ggml.model` and the rest.

    Raises:
        ValueError: If it is of a kind that is not known, or does not give texts back as they were.
    """
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(fields)
    elif model == "llama":
        tokenizer = _sentence_piece(fields)
    else:
        raise ValueError(
            f"its tokenizer is of the kind {model!r} (tokenizer.ggml.model), and only 'gpt2' and 'llama' are known here"
        )
    _add_tokens(tokenizer, fields)
    _add_ends(tokenizer, fields)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that changes texts, or that cuts plain words into letters.

    Raises:
        ValueError: With a text that it changes.
    """
    for text in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if back != text:
            raise ValueError(f"its tokenizer does not give texts back as they were: {text!r} comes out as {back!r}")
    pieces = tokenizer.encode(LONG_WORDS, add_special_tokens=False).tokens
    most = len(LONG_WORDS) * (1.0 if tokenizer.get_vocab_size() < SMALL_VOCABULARY else 0.5)
    if len(pieces) >= most:
        raise ValueError(f"its tokenizer cuts plain words into letters: {pieces[:12]!r}")


def special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens with a role, by the names that Transformers has for them."""
    tokens: Sequence[str] = fields.get("tokenizer.ggml.tokens", ())
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{role}_token_id") for name, role in roles.items()}
    return {name: tokens[number] for name, number in ids.items() if number is not None and number < len(tokens)}


def _byte_level(fields: Mapping[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind: Any = fields.get("tokenizer.ggml.pre")
    if kind not in PRE_TOKENIZERS:
        raise ValueError(
            f"its pre-tokenizer is {kind!r} (tokenizer.ggml.pre), which is not known here; known are "
            f"{', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", ())]
    vocabulary = _vocabulary(fields)
    if not merges or any(len(merge) != 2 or "".join(merge) not in vocabulary for merge in merges):
        raise ValueError("its tokenizer has no merges (tokenizer.ggml.merges), or such as do not fit its tokens")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind in STARTS_WITH_BOS))
    rule = PRE_TOKENIZERS[kind]
    own_rule: Any = None
    if rule == "digits":
        own_rule = pre_tokenizers.Digits(individual_digits=True)
    elif rule is not None:
        own_rule = pre_tokenizers.Split(Regex(rule), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in (None, "digits"))
    tokenizer.pre_tokenizer = bytes_ if own_rule is None else pre_tokenizers.Sequence([own_rule, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    if kind in COMPOSES_ACCENTS:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(fields: Mapping[str, Any]) -> Any:
    """Return a BPE tokenizer whose merges are those that SentencePiece finds by the scores of the tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, scores = _vocabulary(fields), fields.get("tokenizer.ggml.scores", ())
    kinds = fields.get("tokenizer.ggml.token_type", ())
    if len(scores) != len(vocabulary) or len(kinds) != len(vocabulary):
        raise ValueError("its tokenizer has no score or no type for each token (tokenizer.ggml.scores)")
    unknown = next((token for token, number in vocabulary.items() if kinds[number] == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges_by_score(vocabulary, scores, kinds), unk_token=unknown, fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )  # fmt: skip
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_by_score(
    vocabulary: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a token, the pair that makes the best token first."""
    found = []
    for token, number in vocabulary.items():
        if kinds[number] not in (NORMAL, UNUSED):
            continue
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in parts if left in vocabulary and right in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(-scores[number], number, pair) for pair in pairs]
    # A stable sort: pairs of one token keep their order.
    return [pair for *_, pair in sorted(found, key=lambda entry: entry[:2])]


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    tokens = fields.get("tokenizer.ggml.tokens", ())
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or not tokens:
        raise ValueError("its tokenizer has no tokens, or two of the same name (tokenizer.ggml.tokens)")
    return vocabulary


def _add_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Mark the tokens that text never becomes by merging: control tokens, and those that its makers defined."""
    from tokenizers import AddedToken

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", ())
    marked = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and token)
    ]
    tokenizer.add_tokens(marked)


def _add_ends(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Let the tokenizer put the tokens before and after a text that the file asks for."""
    from tokenizers import processors

    by_kind = fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") in STARTS_WITH_BOS
    wanted = {
        "bos": fields.get("tokenizer.ggml.add_bos_token", by_kind),
        "eos": fields.get("tokenizer.ggml.add_eos_token", False),
    }
    ends = {}
    for role, is_wanted in wanted.items():
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        if is_wanted and number is None:
            raise ValueError(f"its tokenizer wants a token at the end of texts that it does not name ({role})")
        if is_wanted:
            ends[role] = (fields["tokenizer.ggml.tokens"][number], number)
    if not ends:
        return
    first, last = ([ends[role][0]] if role in ends else [] for role in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B:1", *last],
        special_tokens=list(ends.values()),
    )
