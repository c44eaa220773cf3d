"""The flow that makes a model ready on this machine."""

from __future__ import annotations

from prefect import flow

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.artifacts import publish_markdown
from prefect_huggingface.tasks.downloads import download_model
from prefect_huggingface.tasks.exports import export_to_openvino
from prefect_huggingface.tasks.records import Export, Snapshot


@flow(name="prepare-model")
def prepare_model(model: LocalModel) -> Export | Snapshot:
    """Have a model on this machine, at one commit and in one format, once.

    What is there already is reused. A model of the Hub is downloaded, and for the OpenVINO backend it is exported.

    Args:
        model: Model to prepare.

    Returns:
        The export for the OpenVINO backend, the snapshot for the torch backend.

    Raises:
        HuggingFaceTaskError: If the model cannot be prepared.
    """
    if model.backend == "torch":
        return download_model(model)
    if not model.is_local:
        download_model(model)
    export = export_to_openvino(model)
    publish_markdown("prepared-model", _summary_of(model, export))
    return export


def _summary_of(model: LocalModel, export: Export) -> str:
    how = "was there already" if export.reused else f"was made in {export.seconds:.0f} s"
    return (
        f"# {model.model_id}\n\nThe export `{export.key}` {how}.\n\n"
        f"- source commit: `{export.commit}`\n- size: {export.size_bytes / 1e6:.1f} MB\n- folder: `{export.path}`\n"
    )
