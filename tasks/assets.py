"""Assets: the exports and outputs that tasks make, as Prefect knows them, each with what it was made of.

A task that has made something notes it here, and Prefect reports it when the task ends: an event about the asset, with
links to the assets upstream of it. Outside a task run nothing happens, and no run ever fails for want of an asset.

The key of an asset is the URI of its place, `hf://organisation/name` for a model of the Hub. Users, passwords and
queries of URLs, in which tokens are found, are never a part of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import InferenceEndpoint, LocalModel
from prefect_huggingface.blocks.credentials import DEFAULT_ENDPOINT
from prefect_huggingface.tasks.records import Export
from prefect_huggingface.tasks.storage.exports.store import find_export_folder
from prefect_huggingface.tasks.storage.places import Place

logger = get_logger(__name__)

MADE_BY = "prefect-huggingface"
MAX_KEY_CHARACTERS = 480  # Prefect takes 512
_GLOB = re.compile(r"[*?\[]")
# What Prefect refuses in a key, the percent sign included, and what cannot be read.
_REFUSED = re.compile(r"[\s\x00-\x20\x7f-\x9f#?&%\"'<>\[\]{}|\\^`\ud800-\udfff]")


def place_key(location: str) -> str:
    """Return the key of a file or folder; of a pattern it is the folder that all its files are in."""
    url = Place.of(location).url
    if "://" not in url:
        return _make_key("file", _without_pattern(url))
    protocol, _, rest = url.partition("://")
    # The query belongs to a web address; elsewhere the question mark is part of a pattern.
    rest = rest.partition("?")[0] if protocol.startswith("http") else _without_pattern(rest)
    host, slash, path = rest.partition("/")
    return _make_key(protocol.rpartition(":")[2], host.rpartition("@")[2] + slash + path)


def model_key(model: LocalModel | InferenceEndpoint) -> str:
    """Return the key of a model as its user names it: on the Hub, in a folder, or behind an endpoint."""
    if isinstance(model, InferenceEndpoint):
        return place_key(model.url) if model.url else _make_key("hf", str(model.model_id))
    if model.is_local:
        return place_key(model.model_id)
    hub = model.get_credentials().endpoint
    return _make_key("hf", model.model_id) if hub == DEFAULT_ENDPOINT else place_key(f"{hub}/{model.model_id}")


def model_keys(model: LocalModel | InferenceEndpoint, export: str | None = None) -> tuple[str, ...]:
    """Return the keys of what a model is read from: itself and, where it has one, its export in the store.

    Args:
        model: Model or endpoint.
        export: Key of the export by its content.
    """
    keys = (model_key(model),)
    if isinstance(model, InferenceEndpoint) or not export:
        return keys
    folder = find_export_folder(model.store_path, export)
    return keys if folder is None else (*keys, place_key(str(folder)))


def _without_pattern(path: str) -> str:
    found = _GLOB.search(path)
    return path[: path.rfind("/", 0, found.start())] if found else path


def _make_key(protocol: str, path: str) -> str:
    """Return a URI that Prefect accepts. Paths that differ have keys that differ."""
    plain = _REFUSED.sub("_", path)
    if plain != path or len(plain) > MAX_KEY_CHARACTERS:
        digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        plain = f"{plain[:MAX_KEY_CHARACTERS]}~{digest}"
    return f"{re.sub('[^a-z0-9]', '', protocol.lower()) or 'file'}://{plain}"


def note_asset(key: str, upstream: Iterable[str], facts: Mapping[str, Any] | None = None) -> None:
    """Note that the current task has made an asset.

    Args:
        key: Key of the asset.
        upstream: Keys of what it was made of.
        facts: What to tell about it, as JSON values: counts and names, no text of rows.
    """
    try:
        from prefect.assets import Asset
        from prefect.context import AssetContext

        context = AssetContext.get()
        if context is None:
            return
        context.downstream_assets.add(Asset(key=key))
        context.direct_asset_dependencies.update(Asset(key=each) for each in upstream if each != key)
        context.materialized_by = MADE_BY
        context.materialization_metadata[key] = dict(facts or {})
        context.update_tracked_assets()
    except Exception as exc:
        logger.warning("The asset %r could not be noted: %s.", key, type(exc).__name__)


def note_export(model: LocalModel, export: Export) -> None:
    """Note an export that the current task has made, unless it was there already."""
    if export.reused:
        return
    facts = {
        "commit": export.commit, "weight_format": export.recipe.get("weight_format"), "size_bytes": export.size_bytes,
        "seconds": round(export.seconds, 1),
    }  # fmt: skip
    note_asset(place_key(str(export.path)), [model_key(model)], facts)
