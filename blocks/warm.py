"""A model that a warm worker keeps loaded."""

from __future__ import annotations

from pydantic import Field, HttpUrl

from prefect_huggingface.blocks.base import ConfigurationBlock
from prefect_huggingface.blocks.options import GenerationOptions


class WarmModel(ConfigurationBlock):
    """Model that a warm worker keeps loaded, so that a short run pays neither for imports nor for loading.

    The worker loads the saved block that is named here; prompts and options go to it as background tasks of Prefect.
    Worker and caller need the same Prefect server and the same storage for results.

    Example:
        Load a saved warm model and see which model it is:
        ```python
        from prefect_huggingface.blocks import WarmModel

        warm = WarmModel.load("BLOCK_NAME")
        print(warm.model, warm.timeout_seconds)
        ```
    """

    _block_type_name = "Hugging Face Warm Model"
    _block_type_slug = "hugging-face-warm-model"
    _documentation_url = HttpUrl("https://docs.prefect.io/v3/advanced/background-tasks")

    model: str = Field(
        default="default",
        min_length=1,
        title="Saved model",
        description="Name of the saved local model block that the warm worker loads.",
    )
    options: GenerationOptions = Field(
        default_factory=GenerationOptions,
        title="Generation",
        description="Generation options, put over those of the saved model.",
    )
    timeout_seconds: float = Field(
        default=600,
        gt=0,
        title="Timeout (seconds)",
        description="Longest time from a request to its answer, with loading and with the wait for a worker.",
    )
    worker_timeout_seconds: float = Field(
        default=30,
        ge=0,
        title="Wait for a worker (seconds)",
        description="How long no warm worker may be there before a request fails.",
    )
    max_requests: int = Field(
        default=64,
        ge=1,
        le=1024,
        title="Requests at once",
        description="Number of requests that are handed to the worker in one background task at most.",
    )
