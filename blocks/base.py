"""What every block of this library has in common."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import ConfigDict


class ConfigurationBlock(Block):
    """A block that refuses unknown fields and knows its own reference."""

    # Prefect's blocks accept unknown fields silently; a misspelt field must not be lost.
    model_config = ConfigDict(extra="forbid")

    def ref(self) -> dict[str, dict[str, str]]:
        """Return the reference to use for this block in the parameters of a deployment or a run.

        Prefect resolves the reference when the run starts. A block that is given by value to `run_deployment`
        would lose its secrets, because they are serialised as asterisks.

        Raises:
            ValueError: If the block has not been saved.
        """
        if not self._block_document_name:
            raise ValueError(f"{type(self).__name__} has no reference, it is not saved. Call `.save(name)` first.")
        slug = f"{self.get_block_type_slug()}/{self._block_document_name}"
        return {"$ref": {"block_document_slug": slug}}

    def __hash__(self) -> int:
        """Refuse to hash: two blocks that differ only in a secret must never share a cache entry."""
        raise TypeError(f"{type(self).__name__} is not hashable. Use the key of a snapshot or an export instead.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__hash__ = ConfigurationBlock.__hash__  # type: ignore[method-assign]
