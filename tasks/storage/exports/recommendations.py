"""Recommended recipes of known models, as the installed optimum-intel has them.

A recipe belongs to a repository id; the name of a folder never chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect_huggingface.tasks.storage.exports.optimum_sources import CONFIGURATION, read_constants

INT4_WEIGHTS = "_DEFAULT_4BIT_WQ_CONFIGS"
INT8_WEIGHTS = "_DEFAULT_8BIT_WQ_CONFIGS"
INT8_FULL = "_DEFAULT_INT8_FQ_CONFIGS"
IGNORED_SCOPES = "_DEFAULT_IGNORED_SCOPE_CONFIGS"
ALIASES = "model_id_aliases"


def recommended_options(table: str, repo_id: str | None) -> Mapping[str, Any] | None:
    """Return the recommended options of a repository, or None.

    Args:
        table: Which recommendation is wanted, one of the names of this module.
        repo_id: Repository id; None, for a local folder, has no recommendation.
    """
    if repo_id is None:
        return None
    constants = read_constants(CONFIGURATION)
    aliases = {alias: original for original, alias in constants.get(ALIASES, [])}
    options = constants.get(table, {})
    found: Mapping[str, Any] | None = options.get(repo_id) or options.get(aliases.get(repo_id))
    return found
