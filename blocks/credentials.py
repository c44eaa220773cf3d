"""The Hugging Face token and the Hub that it belongs to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import Field, HttpUrl, SecretStr, field_validator

from prefect_huggingface.blocks.base import ConfigurationBlock

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_ENDPOINT = "https://huggingface.co"


def default_endpoint() -> str:
    """Return the address of the default Hub: `HF_ENDPOINT`, that of a mirror for instance, or the public Hub."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


class HuggingFaceCredentials(ConfigurationBlock):
    """Hugging Face access token together with the Hub that it may be sent to.

    The token is read at the moment of use and goes only to `endpoint`.

    Example:
        Load saved credentials and ask the Hub who they belong to:
        ```python
        from prefect_huggingface.blocks import HuggingFaceCredentials

        credentials = HuggingFaceCredentials.load("BLOCK_NAME")
        print(credentials.get_client().whoami())
        ```
    """

    _block_type_name = "Hugging Face Credentials"
    _block_type_slug = "hugging-face-credentials"
    _documentation_url = HttpUrl("https://huggingface.co/docs/hub/security-tokens")

    token: SecretStr | None = Field(
        default=None,
        title="Token",
        description="Access token of the Hub, for gated and private models. Leave it empty for public models.",
    )
    endpoint: str = Field(
        default_factory=default_endpoint,
        validate_default=True,
        title="Hub address",
        description=(
            "Address of the Hub or of a mirror, with its scheme. When left empty, that in HF_ENDPOINT or the public "
            "Hub. The token is sent to no other host."
        ),
    )
    use_ambient_token: bool | None = Field(
        default=None,
        title="Use the machine's token",
        description=(
            "Whether a missing token is looked up in HF_TOKEN and in the login file of the machine. "
            "When left empty, it is for the default Hub and is not for any other address."
        ),
    )
    timeout_seconds: float = Field(
        default=20,
        gt=0,
        title="Timeout (seconds)",
        description="How long a request to the Hub may go without a byte before it is given up and tried again.",
    )
    max_attempts: int = Field(
        default=5, ge=1, title="Attempts", description="How many attempts in a row may fail before an error is raised."
    )

    @field_validator("token")
    @classmethod
    def _check_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is None:
            return None
        value = token.get_secret_value()
        if not value:
            raise ValueError("`token` must not be empty. Leave the field out to work without a token.")
        if value != value.strip() or not value.isascii() or any(c.isspace() or not c.isprintable() for c in value):
            # The value is a secret, so it is described and not shown.
            raise ValueError("`token` must be plain ASCII without white space. Copy it again, without line breaks.")
        return token

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str) -> str:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"`endpoint`, or HF_ENDPOINT in its place, must be an http or https address, got {endpoint!r}. "
                f"Try {DEFAULT_ENDPOINT!r}."
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("`endpoint` must hold no user, password, query or fragment. Put the token into `token`.")
        return endpoint.rstrip("/")

    @property
    def is_default_hub(self) -> bool:
        """Whether the endpoint is the public Hub."""
        return self.endpoint == DEFAULT_ENDPOINT

    def get_token(self) -> str | None:
        """Return the token to send to `endpoint`, or None to send no token."""
        if self.token is not None:
            return self.token.get_secret_value()
        ambient = self.is_default_hub if self.use_ambient_token is None else self.use_ambient_token
        if not ambient:
            return None
        from huggingface_hub import get_token

        return get_token()

    def get_client(self) -> HfApi:
        """Return a Hub client that is bound to the endpoint and uses this token or none."""
        from huggingface_hub import HfApi

        # `False` stops the client from looking for an ambient token by itself.
        return HfApi(endpoint=self.endpoint, token=self.get_token() or False, library_name="prefect-huggingface")
