"""Sizes of the layers of a model, as far as its `config.json` tells them, and the group sizes that fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prefect_huggingface.tasks.errors import PlanError

# NNCF makes groups no smaller than this; it puts a layer that would need smaller ones into the backup precision.
SMALLEST_GROUP = 32
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
INTERMEDIATE = (
    "intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
)  # fmt: skip


def input_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of inputs of the linear layers, by the name of the setting that they come from."""
    config = {**config, **(config.get("text_config") or {})}
    sizes = {name: config[name] for name in (*HIDDEN, *INTERMEDIATE) if isinstance(config.get(name), int)}
    hidden = next((config[name] for name in HIDDEN if isinstance(config.get(name), int)), None)
    if hidden and not any(name in sizes for name in INTERMEDIATE):
        sizes["four times the hidden size"] = 4 * hidden
    heads, head_size = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(head_size, int):
        sizes["num_attention_heads * head_dim"] = heads * head_size
    return sizes


def fitting_group_size(size: int, group_size: int) -> int | None:
    """Return the group size that a layer gets when the wanted one may be adjusted.

    Args:
        size: Number of inputs of the layer.
        group_size: Wanted number of weights in a group; -1 is a whole channel.

    Returns:
        The group size, or None if the layer has to stay in the backup precision.
    """
    if group_size == -1 or size % group_size == 0:
        return group_size
    largest = size & -size  # the largest power of two that divides the size
    return largest if largest >= SMALLEST_GROUP else None


def group_size_notes(config: Mapping[str, Any], group_size: int, fallback: str | None) -> Iterator[str]:
    """Yield a sentence for each size of the model that the group size does not divide.

    Raises:
        PlanError: If there is such a size and nothing may be adjusted.
    """
    for name, size in input_sizes(config).items():
        if group_size == -1 or size % group_size == 0:
            continue
        problem = f"Group size {group_size} does not divide {size} ({name})"
        fitting = fitting_group_size(size, group_size)
        if fallback == "adjust" and fitting is not None:
            yield f"{problem}: these layers get groups of {fitting}."
        elif fallback == "adjust":
            yield f"{problem}, and no size of {SMALLEST_GROUP} or more does: these layers are in the backup precision."
        elif fallback == "ignore":
            yield f"{problem}: these layers are not in 4 bits."
        else:
            remedy = f"Set `group_size={fitting}`" if fitting else "Set `group_size=-1`"
            raise PlanError(f"{problem}. {remedy}, or `group_size_fallback='adjust'`.")
