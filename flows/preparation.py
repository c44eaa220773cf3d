"""The flow that makes a model ready on this machine."""

from __future__ import annotations

from typing import Annotated

from prefect.logging import get_run_logger
from pydantic import Field

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.flows.forms import form_flow, titled
from prefect_huggingface.tasks.artifacts import escape_markdown, publish_markdown
from prefect_huggingface.tasks.downloads import download_model
from prefect_huggingface.tasks.evaluation import compare_export, why_not_comparable
from prefect_huggingface.tasks.exports import export_to_openvino
from prefect_huggingface.tasks.parent_processes import end_with_parent
from prefect_huggingface.tasks.records import Export, Snapshot

MAX_PATH_CHARACTERS = 4096
NOT_COMPARED = "%s `min_agreement` is left out."


@form_flow(name="prepare-model")
def prepare_model(
    model: Annotated[LocalModel, titled("Model")],
    min_agreement: Annotated[Annotated[float, Field(ge=0, le=1)] | None, titled("Least agreement")] = None,
) -> Export | Snapshot:
    """Have a model on this machine, at one commit and in one format, once.

    What is there already is reused. A model of the Hub is downloaded, and for the OpenVINO backend it is exported.

    Args:
        model: Model to prepare.
        min_agreement: Least share of next tokens, 0 to 1, on which the export must agree with its source. Where there
            is nothing to compare, an OpenVINO repository for instance, a warning says so.

    Returns:
        The export for the OpenVINO backend, the snapshot for the torch backend.

    Raises:
        HuggingFaceTaskError: If the model cannot be prepared, or agrees less with its source than it must.
    """
    end_with_parent()
    reason = None if min_agreement is None else why_not_comparable(model)
    if reason is not None:
        get_run_logger().warning(NOT_COMPARED, reason)
    if model.backend == "torch":
        return download_model(model)
    # The export downloads what it needs, after its plan has been checked, and not if it is there already.
    export = export_to_openvino(model)
    publish_markdown("prepared-model", _summary_of(model, export))
    if min_agreement is not None and reason is None:
        if export.recipe:
            compare_export(model, min_agreement=min_agreement)
        else:
            get_run_logger().warning(NOT_COMPARED, f"{model.model_id!r} is an OpenVINO model, its source is not here.")
    return export


def _summary_of(model: LocalModel, export: Export) -> str:
    how = "was there already" if export.reused else f"was made in {export.seconds:.0f} s"
    return (
        f"# {escape_markdown(model.model_id)}\n\nThe export `{export.key}` {how}.\n\n"
        f"- source commit: `{export.commit}`\n- size: {export.size_bytes / 1e6:.1f} MB\n"
        f"- folder: {escape_markdown(export.path, MAX_PATH_CHARACTERS)}\n"
    )
