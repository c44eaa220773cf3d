"""From a request to the tokens of its prompt: options, messages, chat template, end tokens, and what fits the context.

The chat template is applied exactly once, on every engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.chat_templates import TOKEN_NAMES, ChatTemplate, ChatTemplateError, read_json
from prefect_huggingface.tasks.engines.conversations import Prompt, check_untrusted, write_conversation
from prefect_huggingface.tasks.engines.detokenizer import Tokenizer
from prefect_huggingface.tasks.engines.reasoning import ReasoningFormat, find_reasoning_format
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.structured import check_format
from prefect_huggingface.tasks.records import Request

TemplateUse = Literal["auto", "always", "never"]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_encoder_position_embeddings",
)  # fmt: skip
# More characters than this for each token are too many in any language.
CHARACTERS_PER_TOKEN = 64


class InputProcessor:
    """Makes the prompts of one model.

    A plain prompt is put into the chat template as a message of the user when `use` says so: "auto" does it where the
    model has a template and the prompt has not been through it yet.

    Attributes:
        template: Chat template, or None where the model has none.
        tokenizer: Tokenizer of the model, set by `bind`.
        end_ids: Tokens that end an answer, that of the tokenizer and what the template writes after a turn among them.
        context_length: Number of tokens of prompt and answer together, or None where it is not known.
        vocabulary: Number of tokens that the model takes, or None where it is not known.
        reads_parts: Whether the template gets messages in parts, text and images.
        is_continued: Whether the answer goes on where the prompt ends. Otherwise the context counts the prompt alone.
        check: Refuses options that the backend cannot honour.
        defaults: Options of the model, set by its engine.
    """

    tokenizer: Tokenizer
    end_ids: frozenset[int] = frozenset()
    context_length: int | None = None
    vocabulary: int | None = None
    is_continued: bool = True
    reads_parts: bool = False
    check: Callable[[GenerationOptions], None] | None = None

    def __init__(self, template: ChatTemplate, use: TemplateUse = "auto") -> None:
        """Take the special tokens of a model with its template, which has no sources where the model has none."""
        self.template = template if template.sources else None
        self._base, self._use = template, use
        self.defaults = GenerationOptions()
        self._start_token = self._base.tokens.get("bos_token") or ""

    @classmethod
    def of_folder(cls, folder: Path, use: TemplateUse = "auto") -> InputProcessor:
        """Return the input processor of a model folder."""
        return cls(ChatTemplate.of_folder(folder), use)

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> InputProcessor:
        """Return the input processor of a tokenizer or processor of Transformers; plain prompts stay as they are."""
        named = getattr(tokenizer, "tokenizer", tokenizer)
        tokens = {name: str(value) for name in TOKEN_NAMES if (value := getattr(named, name, None))}
        source = getattr(tokenizer, "chat_template", None) or {}
        added = getattr(named, "added_tokens_decoder", None) or {}
        special = [token.content for token in added.values() if token.special]
        every = [token.content for token in added.values()]
        return cls(ChatTemplate(source, tokens, special, every), "never")

    def bind(
        self, tokenizer: Tokenizer, end_ids: Collection[int], context_length: int | None, vocabulary: int | None = None
    ) -> None:
        """Take the tokenizer of the model, the end tokens that its settings name, and the length of its context."""
        self.tokenizer, self.context_length, self.vocabulary = tokenizer, context_length, vocabulary
        ends = (self._base.tokens.get("eos_token"), self.template and self.template.end_text)
        further = {tokenizer.special_id(text) for text in ends if text}
        self.end_ids = frozenset(end_ids) | {token for token in further if token is not None}

    def read_ahead(self, state: RequestState, hand_over: Callable[[RequestState], None]) -> None:
        """Do what needs no model, in the thread of the caller or one of its own, and hand the request over."""
        hand_over(state)

    def close(self) -> None:
        """Let go of what reading ahead needs."""
        return

    def begin(self, state: RequestState) -> None:
        """Understand a request: begin its state, or end it where it is to be skipped.

        Raises:
            RequestError: If the request cannot be worked on.
        """
        options = state.options = self._resolve(state.request)
        prompt = self._write(state)
        if options.context_overflow == "error":
            check_characters(prompt.text, self.context_length)
        ids = self._tokenize(state, prompt)
        new_tokens = options.max_new_tokens if self.is_continued else 0
        fitting = fit_context(ids, options, self.context_length, new_tokens, can_cut=state.multimodal is None)
        if fitting is None:
            state.skip(len(ids))
            return
        self.check_ids(fitting)
        state.begin(
            options,
            fitting,
            self.tokenizer,
            self._end_ids_of(state),
            echo=prompt.text if options.echo else "",
            reasoning=self._reasoning_of(state, prompt),
        )

    def check_ids(self, ids: Collection[int]) -> None:
        """Refuse (`RequestError`) a prompt with a token that the model does not take."""
        if self.vocabulary is not None and (token := max(ids, default=0)) >= self.vocabulary:
            raise RequestError(
                "invalid_prompt",
                f"The prompt has the token {token} ({self.tokenizer.decode([token])!r}), and the model takes tokens "
                f"below {self.vocabulary}: its tokenizer has more than it. Leave this text out, or correct the model.",
            )

    def write(self, request: Request, options: GenerationOptions | None = None) -> Prompt:
        """Return the prompt of a request.

        Raises:
            RequestError: If the request has no prompt, or its messages cannot be used.
        """
        check_prompt(request)
        if request.messages is None and not self._takes_template(request):
            return self._from_text(request.prompt or "")
        options = options or self.defaults
        messages, template = self._messages_of(request), self._template_of(request)
        try:
            if self.reads_parts and not options.trusted_text:
                # A prompt with images is not tokenized piece by piece.
                check_untrusted(template, messages)
            return write_conversation(
                template,
                messages,
                request.tools,
                options=options.template_options,
                trusted_text=options.trusted_text or self.reads_parts,
            )
        except ChatTemplateError as exc:
            raise RequestError("invalid_prompt", str(exc)) from exc

    def _resolve(self, request: Request) -> GenerationOptions:
        """Return the options of a request, which the model can honour."""
        options = resolve_options(self.defaults, request)
        self._check_options(options)
        return options

    def _write(self, state: RequestState) -> Prompt:
        if state.request.images:
            raise RequestError(
                "invalid_prompt",
                f"The model takes no images, got {len(state.request.images)}. Leave them out, or set "
                "task='image-text-to-text'.",
            )
        return self.write(state.request, state.options)

    def _tokenize(self, state: RequestState, prompt: Prompt) -> list[int]:
        first, *rest = prompt.segments
        ids = self.tokenizer.encode(first, add_special_tokens=prompt.add_special_tokens)
        for segment in rest:
            ids += self.tokenizer.encode(segment, add_special_tokens=False)
        return ids

    def _check_options(self, options: GenerationOptions) -> None:
        if self.is_continued:
            languages = ("src_lang", "tgt_lang", "forced_bos_token_id")
            refuse_options(options, languages, "is for encoder-decoder models", "Leave it out.")
        if options.num_beams > 1:
            penalties = ("presence_penalty", "frequency_penalty")
            refuse_options(options, penalties, "does not work with beam search", "Use `repetition_penalty`.")
        for name in ("response_format", "max_reasoning_tokens"):
            if is_set(options, name):
                refuse_options(options, ["num_beams"], f"must be 1 with `{name}`", "Choose one of the two.")
        if options.response_format is not None:
            check_format(options.response_format)
        if self.check is not None:
            self.check(options)

    def _end_ids_of(self, state: RequestState) -> frozenset[int]:
        request, options = state.request, state.options
        # A stop string that is one special token is never seen in the text.
        ends = (*options.stop, request.template and self._template_of(request).end_text)
        stops = {token for text in ends if text and (token := self.tokenizer.special_id(text)) is not None}
        return self.end_ids.union(stops, options.stop_token_ids)

    def _reasoning_of(self, state: RequestState, prompt: Prompt) -> ReasoningFormat | None:
        template = self.template if state.request.template is None else self._template_of(state.request)
        sources = template.sources.values() if template is not None else ()
        return find_reasoning_format(sources, prompt.text, state.options.reasoning_tags)

    def _messages_of(self, request: Request) -> list[dict[str, Any]]:
        """Return the conversation of a request as the template gets it; a prompt is a message of the user."""
        if request.messages is not None:
            return check_messages(request.messages)
        return [{"role": "user", "content": request.prompt}]

    def _template_of(self, request: Request) -> ChatTemplate:
        if request.template is not None:
            return _with_source(self._base, request.template)
        if self.template is None:
            raise RequestError(
                "invalid_prompt",
                "The model has no chat template, so it cannot answer messages. "
                "Give a plain prompt, or take a model that is tuned for chat.",
            )
        return self.template

    def _from_text(self, text: str) -> Prompt:
        starts = bool(self._start_token) and text.startswith(self._start_token)
        # A templated text gets a start token only where the template itself writes one.
        is_templated = self.template is not None and self.template.is_templated(text)
        writes_start = self.template is None or not is_templated or self.template.writes_start_token
        return Prompt((text,), add_special_tokens=not starts and writes_start)

    def _takes_template(self, request: Request) -> bool:
        """Return whether a plain prompt is put into the chat template, which "always" must have."""
        use = request.chat_template or self._use
        if self.template is None and use == "always":
            raise RequestError(
                "invalid_prompt",
                "The model has no chat template to put the prompt into. Set `chat_template` to 'auto' or 'never'.",
            )
        if self.template is None or use == "never":
            return False
        return use == "always" or not self.template.is_templated(request.prompt or "")


@lru_cache(maxsize=16)
def _with_source(base: ChatTemplate, source: str) -> ChatTemplate:
    """Return a template with another text; a caller has few of them, and each learns what it writes only once."""
    return ChatTemplate(source, base.tokens, base.special_texts, base.added_texts)


def check_prompt(request: Request) -> None:
    """Refuse (`RequestError`) a request without a prompt or messages, with both, or with what is no prompt."""
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("invalid_prompt", "A request must have a prompt or messages, and not both. Give one.")
    if request.messages is None:
        check_text(request.prompt)


def is_set(options: GenerationOptions, name: str) -> bool:
    """Return whether an option is another than its default."""
    return bool(getattr(options, name) != type(options).model_fields[name].get_default(call_default_factory=True))


def refuse_options(options: GenerationOptions, names: Iterable[str], rule: str, remedy: str) -> None:
    """Refuse (`RequestError`) options that are set, with the rule that the first one breaks and the remedy."""
    for name in names:
        if is_set(options, name):
            raise RequestError("invalid_option", f"`{name}` {rule}, got {getattr(options, name)!r}. {remedy}")


def check_text(text: Any) -> None:
    """Refuse (`RequestError`) a prompt that is not a text, has nothing in it, or holds half of a character."""
    if not isinstance(text, str):
        raise RequestError("invalid_prompt", f"A prompt must be a text, got {type(text).__name__}. Give a string.")
    if not text.strip():
        raise RequestError("empty_prompt", f"The prompt must have some text in it, got {text!r}. Fill it in.")
    if not _is_unicode(text):
        raise RequestError("invalid_prompt", "The prompt holds half of a surrogate pair. Decode the text correctly.")


def check_characters(text: str, context_length: int | None) -> None:
    """Refuse (`RequestError`) a text that no tokenizer needs to see to find it too long for the context."""
    limit = CHARACTERS_PER_TOKEN * context_length if context_length is not None else len(text)
    if len(text) > limit:
        raise RequestError(
            "too_long",
            f"The prompt has {len(text):,} characters, and more than {limit:,} do not fit the context of "
            f"{context_length} tokens in any language. Shorten it, or set `context_overflow`.",
        )


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages with plain text as their content.

    Raises:
        RequestError: If there are none, or one has an unknown role or no usable content.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError("invalid_prompt", f"Messages must be a list, got {type(messages).__name__}. Give a list.")
    if not messages:
        raise RequestError("empty_prompt", "The conversation has no messages. Give one of the user at least.")
    checked = [_check_message(message) for message in messages]
    if not any(str(message.get("content") or "").strip() or message.get("tool_calls") for message in checked):
        raise RequestError("empty_prompt", "The messages have no text in them. Fill in their content.")
    return checked


def resolve_options(defaults: GenerationOptions, request: Request) -> GenerationOptions:
    """Return the options of a request over the defaults of the model.

    Raises:
        RequestError: If the two do not go together.
    """
    try:
        options = request.options
        return defaults.merged(GenerationOptions(**options) if isinstance(options, Mapping) else options)
    except ValidationError as exc:
        problems = "; ".join(_problem(error) for error in exc.errors())
        raise RequestError("invalid_option", problems) from exc


def fit_context(
    token_ids: Sequence[int],
    options: GenerationOptions,
    context_length: int | None,
    new_tokens: int = 0,
    can_cut: bool = True,
) -> list[int] | None:
    """Return the tokens of a prompt that fit the context together with the new tokens, or None to skip the request.

    Args:
        token_ids: Tokens of the whole prompt.
        options: Options that say what to do with a prompt that is too long.
        context_length: Tokens that prompt and answer may have together, or None for no limit.
        new_tokens: Tokens of the context that the answer needs.
        can_cut: Whether the prompt may be cut; one with images may not.

    Raises:
        RequestError: If the prompt is too long and must not be cut.
    """
    room = len(token_ids) if context_length is None else context_length - new_tokens
    if len(token_ids) <= room:
        return list(token_ids)
    if options.context_overflow == "skip":
        return None
    if options.context_overflow == "error" or room < 1 or not can_cut:
        more, lower = (
            (f", and with {new_tokens} new ones it", " lower `max_new_tokens`,") if new_tokens else (" and", "")
        )
        raise RequestError(
            "too_long",
            f"The prompt has {len(token_ids)} tokens{more} does not fit the context of {context_length} tokens. "
            f"Shorten it,{lower} or set `context_overflow`.",
            prompt_tokens=len(token_ids),
        )
    return list(token_ids[-room:] if options.context_overflow == "truncate_left" else token_ids[:room])


def read_end_tokens(folder: Path, default: int = -1) -> tuple[int, ...]:
    """Return the tokens that end an answer by the settings of a model folder, the main one first."""
    for name in ("generation_config.json", "config.json"):
        ends = read_json(folder / name).get("eos_token_id")
        if isinstance(ends, int):
            return (ends,)
        if isinstance(ends, list) and ends:
            return tuple(ends)
    return (default,) if default >= 0 else ()


def context_length_of(settings: Mapping[str, Any]) -> int | None:
    """Return how many tokens prompt and answer may have together, or None where the configuration does not say."""
    settings = {**settings, **(settings.get("text_config") or {})}
    # T5 and its kin count from one token to another, whatever number is left in their configuration; MPNet does both.
    names = CONTEXT_NAMES[:1] if settings.get("relative_attention_num_buckets") else CONTEXT_NAMES
    lengths = (settings.get(name) for name in names)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def vocabulary_of(settings: Mapping[str, Any]) -> int | None:
    """Return how many tokens have a score, or None where the configuration does not say."""
    size = {**settings, **(settings.get("text_config") or settings.get("llm_config") or {})}.get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def longrope_border(settings: Mapping[str, Any]) -> int | None:
    """Return the number of tokens above which a longrope model counts positions differently, None for others."""
    settings = {**settings, **(settings.get("text_config") or {})}
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su"):
        return None
    return rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")


def _problem(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"`{place}` is no option of a generation, got {error['input']!r}. Remove it."
    return message if message.startswith("`") or not place else f"`{place}`, got {error['input']!r}: {message}."


def _check_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            "invalid_prompt",
            f"A message must have a role and content, got {type(message).__name__}. "
            "Give for example {'role': 'user', 'content': 'Hello'}.",
        )
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(
            "invalid_prompt", f"The role of a message must be one of {', '.join(ROLES)}, got {role!r}. Correct it."
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    text = _join_parts(content) if isinstance(content, Sequence) and not isinstance(content, str) else content
    if not isinstance(text, str) or not _is_unicode(text):
        raise RequestError(
            "invalid_prompt", f"The content of a message must be text, got {type(content).__name__}. Give a string."
        )
    return {**message, "content": text}


def _join_parts(parts: Sequence[Any]) -> str:
    """Return the text of a message whose content is a list of parts."""
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(
                "invalid_prompt",
                f"The content of a message must be text for this model, got a part of type {kind!r}. Leave it out.",
            )
        texts.append(text)
    return "".join(texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
