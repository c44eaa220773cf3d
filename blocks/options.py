"""How text is generated, the same for every backend."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p")


class ResponseFormat(BaseModel):
    """The form that an answer must have: a JSON schema, a regular expression or a choice of texts."""

    # `choices` is validated also when it is left out, since its check looks at all three.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    json_schema: dict[str, Any] | None = Field(
        default=None, title="JSON schema", description="JSON schema that the answer must satisfy."
    )
    regex: str | None = Field(
        default=None, title="Regular expression", description="Regular expression that the whole answer must match."
    )
    choices: list[str] | None = Field(
        default=None, min_length=1, title="Choices", description="Texts of which the answer must be one."
    )

    @field_validator("regex")
    @classmethod
    def _check_regex(cls, regex: str | None) -> str | None:
        if regex is not None:
            try:
                re.compile(regex)
            except re.error as exc:
                raise ValueError(f"`regex` must be a regular expression, got {regex!r}: {exc}. Correct it.") from exc
        return regex

    @field_validator("choices")
    @classmethod
    def _check_one_kind(cls, choices: list[str] | None, info: Any) -> list[str] | None:
        given = [info.data.get("json_schema"), info.data.get("regex"), choices]
        if sum(value is not None for value in given) != 1:
            raise ValueError("exactly one of `json_schema`, `regex` and `choices` must be given. Remove the others.")
        return choices


class GenerationOptions(BaseModel):
    """Options of one generation. Greedy unless `do_sample` is set; unknown options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    max_new_tokens: int = Field(
        default=256, ge=1, title="New tokens", description="Upper limit of generated tokens for one answer."
    )
    min_new_tokens: int = Field(
        default=0, ge=0, title="Least new tokens", description="Number of tokens before the end token is allowed."
    )
    do_sample: bool = Field(
        default=False, title="Sample", description="Draw tokens at random instead of taking the likeliest one."
    )
    temperature: float | None = Field(
        default=None, ge=0, le=100, title="Temperature", description="Sampling temperature. Needs sampling, unless 0."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, title="Top p", description="Probability mass to sample from. Needs sampling."
    )
    top_k: int | None = Field(
        default=None, ge=1, title="Top k", description="Number of likeliest tokens to sample from. Needs sampling."
    )
    min_p: float | None = Field(
        default=None, gt=0, lt=1, title="Min p",
        description="Least probability of a token, as a share of the likeliest one's. Needs sampling.",
    )  # fmt: skip
    repetition_penalty: float = Field(
        default=1.0, gt=0, title="Repetition penalty", description="Factor above 1 makes repeated tokens less likely."
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, title="Presence penalty",
        description="Taken off the score of every token that the answer has already.",
    )  # fmt: skip
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, title="Frequency penalty",
        description="Taken off the score of a token as often as the answer has it already.",
    )  # fmt: skip
    no_repeat_ngram_size: int = Field(
        default=0, ge=0, title="No repeated n-grams", description="Length of token sequences that never occur twice."
    )
    num_beams: int = Field(default=1, ge=1, le=64, title="Beams", description="Number of beams, 1 for no beam search.")
    stop: list[str] = Field(
        default_factory=list,
        title="Stop strings",
        description="Texts that end the generation. They are not part of the answer.",
    )
    stop_token_ids: list[int] = Field(
        default_factory=list,
        title="End tokens",
        description="Ids of tokens that end the generation, besides those of the model.",
    )
    src_lang: str | None = Field(
        default=None,
        title="Source language",
        description="Code of the prompt's language, 'eng_Latn' or 'en_XX' say, for models such as NLLB and mBART.",
    )
    tgt_lang: str | None = Field(
        default=None,
        title="Target language",
        description="Code of the answer's language, 'deu_Latn' or 'de_DE' say, for models such as NLLB and mBART.",
    )
    forced_bos_token_id: int | None = Field(
        default=None,
        ge=0,
        title="First token",
        description="Id of the first token of the answer of an encoder-decoder model. The target language sets it.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, title="Seed", description="Seed that makes sampling repeatable."
    )
    n: int = Field(
        default=1,
        ge=1,
        le=64,
        title="Answers",
        description="Number of answers to each prompt. Needs sampling or beams.",
    )
    logprobs: bool = Field(
        default=False, title="Log probabilities", description="Return the log probability (nats) of every new token."
    )
    ignore_eos: bool = Field(
        default=False, title="Ignore the end token", description="Go on after the end token, to measure throughput."
    )
    max_reasoning_tokens: int | None = Field(
        default=None, ge=0, title="Reasoning tokens",
        description="Upper limit of the tokens of reasoning before the answer, for models that reason.",
    )  # fmt: skip
    template_options: dict[str, Any] = Field(
        default_factory=dict,
        title="Template options",
        description="Variables of the chat template, `enable_thinking` for instance.",
    )
    trusted_text: bool = Field(
        default=False, title="Trusted text",
        description="Whether special tokens in the text of messages are special. Otherwise they are text.",
    )  # fmt: skip
    reasoning_tags: list[str] | None = Field(
        default=None, title="Reasoning tags",
        description="Opening and closing tag of the reasoning, in place of those that the chat template shows. "
        "An empty list leaves the reasoning in the text.",
    )  # fmt: skip
    echo: bool = Field(default=False, title="Echo", description="Put the prompt before the answer.")
    context_overflow: Literal["error", "truncate_left", "truncate_right", "skip"] = Field(
        default="error",
        title="Too long prompts",
        description="What happens to a prompt that, with the new tokens, does not fit the context of the model.",
    )
    deadline_seconds: float | None = Field(
        default=None, gt=0, title="Deadline (seconds)", description="Time after which one answer is cut off."
    )
    response_format: ResponseFormat | None = Field(
        default=None, title="Response format", description="Form that the answer must have."
    )

    choice_probabilities: bool = Field(
        default=False, title="Choice probabilities",
        description="Return how likely each choice of the response format is. Each costs a pass over the prompt.",
    )  # fmt: skip

    @field_validator("choice_probabilities")
    @classmethod
    def _needs_choices(cls, value: bool, info: Any) -> bool:
        form = info.data.get("response_format")
        if value and (form is None or form.choices is None):
            raise ValueError("`choice_probabilities` needs choices, got none. Set `response_format` with `choices`.")
        return value

    @field_validator("temperature", "top_p", "top_k", "min_p")
    @classmethod
    def _needs_sampling(cls, value: float | None, info: Any) -> float | None:
        sampled = info.data.get("do_sample", False)
        if value is None or (info.field_name == "temperature" and value == 0 and not sampled):
            return value
        if not sampled:
            raise ValueError(
                f"`{info.field_name}` has no effect on greedy decoding, got {value!r}. "
                "Set `do_sample=True` to sample, or leave it out."
            )
        if value == 0:
            raise ValueError("`temperature` must be above 0 to sample, got 0. Set `do_sample=False` for greedy text.")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _bare_string_is_one_stop(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, tuple) else stop or []
        if isinstance(stops, list) and "" in stops:
            raise ValueError("`stop` must hold no empty text, got ''. Remove it.")
        return stops

    @field_validator("reasoning_tags")
    @classmethod
    def _tags_are_a_pair(cls, value: list[str] | None) -> list[str] | None:
        if value and (len(value) != 2 or not all(value)):
            raise ValueError(f"`reasoning_tags` must be an opening and a closing tag, got {value!r}. Give two texts.")
        return value

    @field_validator("min_new_tokens")
    @classmethod
    def _fits_the_maximum(cls, value: int, info: Any) -> int:
        most = info.data.get("max_new_tokens", value)
        if value > most:
            raise ValueError(f"`min_new_tokens` must be at most `max_new_tokens` ({most}), got {value}. Lower it.")
        return value

    @field_validator("num_beams")
    @classmethod
    def _beams_are_not_sampled(cls, value: int, info: Any) -> int:
        if value > 1 and info.data.get("do_sample"):
            raise ValueError(f"`num_beams` must be 1 with `do_sample=True`, got {value}. Choose one of the two.")
        return value

    @field_validator("n")
    @classmethod
    def _several_answers_differ(cls, value: int, info: Any) -> int:
        if value > 1 and not info.data.get("do_sample") and info.data.get("num_beams", 1) < value:
            raise ValueError(
                f"`n` must be 1 for greedy decoding, got {value}. "
                f"Set `do_sample=True`, or `num_beams` to {value} or more."
            )
        return value

    @field_validator("response_format", mode="before")
    @classmethod
    def _accept_a_pydantic_class(cls, value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, BaseModel):
            return ResponseFormat(json_schema=value.model_json_schema())
        return value

    def merged(self, other: GenerationOptions | None) -> Self:
        """Return these options with those that are set explicitly in `other` put over them.

        When `other` switches sampling off, the sampling settings of these options are dropped.

        Raises:
            pydantic.ValidationError: If the two do not go together.
        """
        if other is None or not other.model_fields_set:
            return self
        if not self.model_fields_set and isinstance(other, type(self)):
            return other
        base = {name: getattr(self, name) for name in self.model_fields_set}
        over = {name: getattr(other, name) for name in other.model_fields_set}
        if over.get("do_sample") is False:
            base = {name: value for name, value in base.items() if name not in SAMPLING_FIELDS}
        return type(self)(**{**base, **over})
