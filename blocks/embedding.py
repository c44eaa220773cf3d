"""How texts become vectors or scores, where the files of the model do not say it or should not decide it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Pooling = Literal["cls", "mean", "last_token", "max"]


class EmbeddingOptions(BaseModel):
    """Options of vectors and scores. What is left empty is as the repository of the model says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Pooling | None = Field(
        default=None, title="Pooling", description="How the vectors of the tokens become that of the text."
    )
    normalize: bool | None = Field(
        default=None, title="Normalize", description="Whether each vector is scaled to a length of 1."
    )
    dimensions: int | None = Field(
        default=None, ge=1, title="Dimensions", description="Number of leading dimensions to keep (matryoshka models)."
    )
    max_length: int | None = Field(
        default=None, ge=4, title="Longest text", description="Number of tokens above which a text is too long."
    )
    query_prompt: str | None = Field(
        default=None, title="Query prompt", description="Words before a text that is a query, 'query: ' for instance."
    )
    document_prompt: str | None = Field(
        default=None, title="Document prompt", description="Words before a text that is a document."
    )
    allow_empty: bool | None = Field(
        default=None, title="Empty texts", description="Whether an empty text is the special tokens alone, or an error."
    )
    instruction: str | None = Field(
        default=None, title="Instruction", description="Task that a reranker with instructions is told."
    )
    activation: Literal["sigmoid", "none"] | None = Field(
        default=None, title="Activation", description="What makes a score of the output of a reranker."
    )

    def merged(self, other: EmbeddingOptions | None) -> EmbeddingOptions:
        """Return these options with those of `other` that are given put over them."""
        if other is None:
            return self
        return self.model_copy(update={name: value for name, value in other if value is not None})
