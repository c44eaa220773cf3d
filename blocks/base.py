"""What every block of this library has in common."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

from prefect.blocks.core import Block
from pydantic import ConfigDict, GetJsonSchemaHandler, HttpUrl, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

# The picture of Hugging Face's organization on GitHub: square at every size.
LOGO_URL = HttpUrl("https://avatars.githubusercontent.com/u/25720743?s=200&v=4")
_schemas: WeakKeyDictionary[type[Block], dict[tuple[Any, ...], dict[str, Any]]] = WeakKeyDictionary()


class ConfigurationBlock(Block):
    """A block that refuses unknown fields and knows its own reference."""

    _logo_url = LOGO_URL

    # Prefect's blocks accept unknown fields silently; a misspelt field must not be lost.
    # Pydantic quotes the input of a failed validation, which would show a token that was mistyped.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_the_type_slug(cls, data: Any) -> Any:
        # Prefect writes the slug of the type into a nested block that is saved by value.
        if isinstance(data, dict) and data.get("block_type_slug") == cls.get_block_type_slug():
            return {name: value for name, value in data.items() if name != "block_type_slug"}
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema without the refusal of unknown fields, and with that of a reference.

        Prefect checks parameters while a block is still a reference, `{"$ref": ...}`. Those of a run must fit either
        this schema or the one of a reference that Prefect puts beside it, and not both. Those of a new deployment must
        fit this schema, after everything that is required has been taken out of it.
        """
        described = handler(schema)
        fields = handler.resolve_ref_schema(described)
        fields.pop("additionalProperties", None)
        fields["not"] = {"required": ["$ref"], "not": {"required": ["-"]}}
        return described

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON schema, which is made once: Prefect asks for it some 200 times while it saves one block."""
        made, key = _schemas.setdefault(cls, {}), (args, tuple(kwargs.items()))
        if key not in made:
            made[key] = super().model_json_schema(*args, **kwargs)
        return deepcopy(made[key])

    def ref(self) -> dict[str, dict[str, str]]:
        """Return the reference to use for this block in the parameters of a deployment or a run.

        Prefect resolves the reference when the run starts. A block that is given by value to `run_deployment`
        would lose its secrets, because they are serialised as asterisks.

        Raises:
            ValueError: If the block has not been saved.
        """
        # Prefect says under which name a block is saved in this attribute only; a test notices when it no longer does.
        name = self._block_document_name
        if not name:
            raise ValueError(f"{type(self).__name__} has no reference, it is not saved. Call `.save(name)` first.")
        slug = f"{self.get_block_type_slug()}/{name}"
        return {"$ref": {"block_document_slug": slug}}
