"""An endpoint of Hugging Face inference, serverless or dedicated, or any server that speaks one of their protocols."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from prefect.types import SecretDict
from pydantic import Field, HttpUrl, ValidationInfo, field_validator

from prefect_huggingface.blocks.base import ConfigurationBlock
from prefect_huggingface.blocks.credentials import HuggingFaceCredentials
from prefect_huggingface.blocks.model import REPO_ID
from prefect_huggingface.blocks.options import GenerationOptions

Protocol = Literal["auto", "openai", "tgi"]
ExtraOption = Literal[
    "top_k", "min_p", "repetition_penalty", "min_new_tokens", "ignore_eos", "stop_token_ids", "template_options"
]

DEFAULT_ROUTER = "https://router.huggingface.co"
CHAT_ROUTE = "/chat/completions"
# These are set by the client, or would send a secret past the field that is made for it.
RESERVED_HEADERS = ("authorization", "host", "content-length", "content-type", "transfer-encoding", "cookie")

# These make up a request, or are what an option is called in it.
OWN_PARAMETERS = (
    "inputs", "parameters", "messages", "model", "stream", "stream_options", "details", "return_full_text",
    "max_tokens", "grammar", "tools",
)  # fmt: skip


class InferenceEndpoint(ConfigurationBlock):
    """Model that is served by a Hugging Face endpoint, by an inference provider, or by a server of one's own.

    Give a `url` for a server, or a `model_id` and a `provider` for serverless inference. The token of the credentials
    is sent to that one origin and to no other; a token of the machine is never sent to a `url`.

    Example:
        Load a saved endpoint and see where it is:
        ```python
        from prefect_huggingface.blocks import InferenceEndpoint

        endpoint = InferenceEndpoint.load("BLOCK_NAME")
        print(endpoint.base_url, endpoint.max_concurrency)
        ```
    """

    _block_type_name = "Hugging Face Inference Endpoint"
    _block_type_slug = "hugging-face-inference-endpoint"
    _documentation_url = HttpUrl("https://huggingface.co/docs/huggingface_hub/guides/inference")

    url: str | None = Field(
        default=None,
        title="Address",
        description="Address of a server with its scheme, of a dedicated endpoint for instance. Empty for serverless.",
    )
    model_id: str | None = Field(
        default=None,
        validate_default=True,
        title="Model",
        description="Hub id of the model for serverless inference, or the name under which the server knows it.",
    )
    provider: str | None = Field(
        default=None,
        title="Provider",
        description="Inference provider of a serverless model, 'auto' or 'novita' for instance. Not for an address.",
    )
    protocol: Protocol = Field(
        default="auto",
        title="Protocol",
        description="What the server speaks: OpenAI's chat protocol or that of TGI. It is looked up when 'auto'.",
    )
    send_prompts_as: Literal["auto", "chat", "text"] = Field(
        default="auto",
        title="Send prompts as",
        description="A plain prompt goes as one user message or as raw text. 'auto' is text for TGI and else chat.",
    )
    credentials: HuggingFaceCredentials | None = Field(
        default=None, title="Credentials", description="Token for this endpoint. None is sent when it is left empty."
    )
    headers: SecretDict | None = Field(
        default=None, title="Headers", description="Further headers by name, sent to the origin of the endpoint only."
    )
    router: str = Field(
        default=DEFAULT_ROUTER, title="Router", description="Address of the router of the inference providers."
    )
    max_concurrency: int = Field(
        default=16, ge=1, le=1024, title="Concurrency", description="Number of requests that are sent at once."
    )
    timeout_seconds: float = Field(
        default=120,
        gt=0,
        title="Timeout (seconds)",
        description="Longest silence of the server. Several answers at once (`n`) come after one silence.",
    )
    connect_timeout_seconds: float = Field(
        default=10, gt=0, title="Connection timeout (seconds)", description="Longest time to open a connection."
    )
    max_attempts: int = Field(
        default=8,
        ge=1,
        title="Attempts",
        description="How often one request is sent while the server works for others. Outages are not counted.",
    )
    max_retry_wait_seconds: float = Field(
        default=60,
        gt=0,
        title="Longest wait (seconds)",
        description="Longest wait between two attempts. A server that asks for more than this is given up.",
    )
    wake_timeout_seconds: float = Field(
        default=600,
        ge=0,
        title="Wake limit (seconds)",
        description="How long to wait for an endpoint that is scaled to zero or loads its model (status 503).",
    )
    outage_timeout_seconds: float = Field(
        default=60,
        ge=0,
        title="Outage limit (seconds)",
        description="How long to wait for a server that cannot be reached. Then requests fail at once for a while.",
    )
    max_answer_mb: float = Field(
        default=16, gt=0, title="Largest answer (MB)", description="Size in units of 10^6 bytes of one answer."
    )
    extra_options: list[ExtraOption] = Field(
        default_factory=list,
        title="Extra options",
        description="Options outside OpenAI's protocol that the server understands all the same, as vLLM does.",
    )
    extra_parameters: dict[str, Any] = Field(
        default_factory=dict,
        title="Extra parameters",
        description="Parameters of the server that are sent with every request as they are, 'typical_p' for instance.",
    )
    options: GenerationOptions = Field(
        default_factory=GenerationOptions, title="Generation", description="Defaults for generating text."
    )

    @field_validator("url", "router")
    @classmethod
    def _check_address(cls, address: str | None, info: ValidationInfo) -> str | None:
        if address is None:
            return None
        parts = urlsplit(address.strip())
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"`{info.field_name}` must hold no user, password, query or fragment. "
                "Put a token into `credentials` and other keys into `headers`."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port_number(parts):
            raise ValueError(
                f"`{info.field_name}` must be an http or https address, got {address!r}. "
                "Write it with its scheme, 'https://name.endpoints.huggingface.cloud' for instance."
            )
        return address.strip().rstrip("/").removesuffix(CHAT_ROUTE).rstrip("/")

    # A field validator and not a model validator: Prefect's `load(validate=False)` needs errors with a location.
    @field_validator("model_id")
    @classmethod
    def _check_model_id(cls, model_id: str | None, info: ValidationInfo) -> str | None:
        serverless = "url" in info.data and info.data["url"] is None
        if serverless and model_id is None:
            raise ValueError("`url` or `model_id` must be given, got neither. Give one of them.")
        if serverless and model_id is not None and not REPO_ID.match(model_id):
            raise ValueError(f"`model_id` must be a Hub id such as 'organisation/name', got {model_id!r}. Correct it.")
        return model_id

    @field_validator("provider")
    @classmethod
    def _check_provider(cls, provider: str | None, info: ValidationInfo) -> str | None:
        if provider is not None and info.data.get("url") is not None:
            raise ValueError(f"`provider` is for serverless models, got {provider!r} with a `url`. Remove one of them.")
        return provider

    @field_validator("protocol")
    @classmethod
    def _check_protocol(cls, protocol: Protocol, info: ValidationInfo) -> Protocol:
        if protocol == "tgi" and info.data.get("url") is None and info.data.get("provider") != "hf-inference":
            raise ValueError(
                "`protocol` must be 'openai' for serverless models, got 'tgi'. "
                "Leave it out, or set `provider='hf-inference'`."
            )
        return protocol

    @field_validator("send_prompts_as")
    @classmethod
    def _check_send_prompts_as(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "text" and info.data.get("protocol") == "openai":
            raise ValueError("`send_prompts_as` must be 'chat' for OpenAI's chat protocol, got 'text'. Leave it out.")
        return value

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, headers: SecretDict | None) -> SecretDict | None:
        for name, value in (headers.get_secret_value() if headers else {}).items():
            if name.lower() in RESERVED_HEADERS:
                raise ValueError(f"`headers` must not hold {name!r}. Put a token into `credentials`.")
            if not isinstance(value, str) or not (name + value).isascii() or not (name + value).isprintable():
                # The value is a secret, so it is described and not shown.
                raise ValueError(f"`headers` must be plain ASCII texts, but {name!r} is not. Correct it.")
        return headers

    @field_validator("extra_parameters")
    @classmethod
    def _check_extra_parameters(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in (*GenerationOptions.model_fields, *OWN_PARAMETERS):
            if name in parameters:
                raise ValueError(f"`extra_parameters` must not hold {name!r}. Use `options` for it.")
        return parameters

    @property
    def base_url(self) -> str:
        """Address that requests go to, without the route of the protocol."""
        if self.url is not None:
            return self.url
        if self.protocol == "tgi":
            return f"{self.router}/hf-inference/models/{self.model_id}"
        return f"{self.router}/v1"

    @property
    def model_name(self) -> str | None:
        """Name of the model in a request, with the provider of a serverless one, or None where none is given."""
        if self.url is None and self.protocol != "tgi" and self.provider not in (None, "auto"):
            return f"{self.model_id}:{self.provider}"
        return self.model_id

    def get_token(self) -> str | None:
        """Return the token to send to the origin of the endpoint, or None to send no token.

        A token of the machine is used only for serverless inference, and only where the credentials say so explicitly.
        """
        if self.credentials is None:
            return None
        if self.credentials.token is not None:
            return self.credentials.token.get_secret_value()
        if self.url is None and self.credentials.use_ambient_token:
            return self.credentials.get_token()
        return None

    def get_headers(self) -> dict[str, str]:
        """Return the further headers, with their values in clear."""
        return dict(self.headers.get_secret_value()) if self.headers else {}


def _has_port_number(parts: Any) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False
