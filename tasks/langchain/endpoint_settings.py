"""Translates the arguments of LangChain's `HuggingFaceEndpoint` into an `InferenceEndpoint` and generation options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.types import SecretDict
from pydantic import SecretStr, ValidationError

from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, InferenceEndpoint
from prefect_huggingface.blocks.endpoint import ExtraOption
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.generation_settings import GENERATION_NAMES, Generation, read_generation

DEFAULTS: dict[str, Any] = {"max_new_tokens": 512, "temperature": 0.8, "top_p": 0.95}
# The class has these arguments; they are settings for generating text.
SETTINGS = (
    "max_new_tokens", "top_k", "top_p", "temperature", "repetition_penalty", "return_full_text", "stop_sequences",
    "seed", "do_sample",
)  # fmt: skip
# Parameters of TGI that no other engine has. They are sent as they are.
TGI_PARAMETERS = (
    "typical_p", "truncate", "watermark", "best_of", "frequency_penalty", "top_n_tokens", "adapter_id",
    "decoder_input_details",
)  # fmt: skip
EXTRA_OPTIONS: tuple[ExtraOption, ...] = ("top_k", "repetition_penalty", "min_new_tokens", "ignore_eos")
TOKEN_VARIABLE = "HUGGINGFACEHUB_API_TOKEN"
BILL_HEADER = "X-HF-Bill-To"


def check_names(given: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Return the arguments with those that are no fields put into `model_kwargs`.

    Raises:
        SettingsError: If one is unknown, or is given twice.
    """
    fields = set(fields)
    more = {name: value for name, value in given.items() if name not in fields}
    kwargs = {**(given.get("model_kwargs") or {})}
    twice = sorted({*more, *given} & set(kwargs))
    if twice:
        raise SettingsError(f"{twice!r} are given twice, directly and in `model_kwargs`. Give them once.")
    kwargs |= more
    unknown = sorted(set(kwargs) - GENERATION_NAMES - set(TGI_PARAMETERS))
    if unknown:
        known = sorted({*fields, *GENERATION_NAMES, *TGI_PARAMETERS})
        raise SettingsError(f"{unknown!r} are no known settings. Remove them, or choose from {known!r}.")
    return {**{name: value for name, value in given.items() if name in fields}, "model_kwargs": kwargs}


def read_endpoint_generation(given: Mapping[str, Any]) -> tuple[Generation, dict[str, Any]]:
    """Return the generation settings of the arguments, and the parameters that only TGI knows.

    The defaults of the class for temperature and top p count only for text that is sampled. Greedy text has none.
    """
    kwargs = given["model_kwargs"]
    settings = {name: given[name] for name in SETTINGS if given.get(name) is not None}
    settings |= {name: value for name, value in kwargs.items() if name in GENERATION_NAMES}
    block = given.get("endpoint")
    if not isinstance(block, InferenceEndpoint) and "max_length" not in settings:
        settings.setdefault("max_new_tokens", DEFAULTS["max_new_tokens"])
    if settings.get("do_sample") is False:
        # LangChain code gives sampling settings beside it, which mean nothing then.
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")}
    generation = read_generation(settings)
    if generation.options.do_sample:
        generation = read_generation({**DEFAULTS, **settings})
    parameters = {name: value for name in TGI_PARAMETERS if (value := kwargs.get(name, given.get(name))) is not None}
    if not generation.options.do_sample:
        parameters.pop("typical_p", None)
    if not parameters.get("watermark"):
        parameters.pop("watermark", None)
    return generation, parameters


def read_endpoint(
    given: Mapping[str, Any], options: GenerationOptions, parameters: Mapping[str, Any]
) -> InferenceEndpoint:
    """Return the block that the arguments mean.

    Raises:
        SettingsError: If an argument is unknown or has no allowed value.
    """
    serverless = given.get("repo_id") is not None
    headers = _read_headers(given.get("server_kwargs") or {})
    try:
        return InferenceEndpoint(
            url=given.get("endpoint_url"),
            model_id=given.get("repo_id"),
            provider=given.get("provider"),
            credentials=_credentials_of(given.get("huggingfacehub_api_token"), serverless),
            headers=SecretDict(headers) if headers else None,
            timeout_seconds=given.get("timeout", 120),
            # A server that does not know these refuses them itself.
            extra_options=list(EXTRA_OPTIONS),
            extra_parameters=dict(parameters),
            options=options,
        )
    except ValidationError as exc:
        problems = "; ".join(str(error["msg"]).removeprefix("Value error, ") for error in exc.errors())
        raise SettingsError(problems) from None


def _credentials_of(token: Any, serverless: bool) -> HuggingFaceCredentials | None:
    """Return the credentials that a token argument means. The machine's token is for serverless inference only."""
    text = token.get_secret_value() if isinstance(token, SecretStr) else token
    if not text and serverless:
        text = os.environ.get(TOKEN_VARIABLE)
    # A token that was pasted or read from a file often ends in a line break.
    if text and text.strip():
        return HuggingFaceCredentials(token=SecretStr(text.strip()))
    return HuggingFaceCredentials(use_ambient_token=True) if serverless else None


def _read_headers(server_kwargs: Mapping[str, Any]) -> dict[str, str]:
    unknown = sorted(set(server_kwargs) - {"headers", "bill_to"})
    if unknown:
        raise SettingsError(f"{unknown!r} of `server_kwargs` are not known. Use `headers` and `bill_to` only.")
    headers = dict(server_kwargs.get("headers") or {})
    if server_kwargs.get("bill_to"):
        headers[BILL_HEADER] = str(server_kwargs["bill_to"])
    return headers
