"""How the weights of an OpenVINO export are quantized."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

WeightFormat = Literal["fp32", "fp16", "int8", "int4", "nf4", "mxfp4", "cb4"]
QuantMode = Literal["int8", "f8e4m3", "f8e5m2", "cb4_f8e4m3", "int4_f8e4m3", "int4_f8e5m2"]


class QuantizationOptions(BaseModel):
    """Options of the quantization. What is left empty is chosen for the model and written into the export's recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_mode: QuantMode | None = Field(
        default=None,
        title="Weights and activations",
        description="Quantize weights and activations in this mode. It takes the place of the weight format.",
    )
    sym: bool | None = Field(
        default=None, title="Symmetric", description="Whether the quantized weights are symmetric about zero."
    )
    group_size: int | None = Field(
        default=None,
        ge=-1,
        title="Group size",
        description="Number of weights that share one scale, -1 for one scale per channel.",
    )
    group_size_fallback: Literal["error", "ignore", "adjust"] = Field(
        default="adjust",
        title="Group size that does not divide",
        description="What happens when the size does not divide a layer: fail, leave the layer, or take a smaller one.",
    )
    ratio: float | None = Field(
        default=None, ge=0, le=1, title="Ratio", description="Share of the layers in 4 bits, the others are in 8 bits."
    )
    backup_precision: Literal["none", "int8_sym", "int8_asym"] | None = Field(
        default=None, title="Backup precision", description="Format of the layers that are not in 4 bits."
    )
    all_layers: bool = Field(
        default=False,
        title="All layers",
        description="Quantize the embeddings and the last layer to 4 bits too.",
    )
    awq: bool = Field(
        default=False, title="AWQ", description="Scale the weights by the activations before the quantization."
    )
    scale_estimation: bool = Field(
        default=False, title="Scale estimation", description="Choose the scales to minimise the error of each layer."
    )
    gptq: bool = Field(default=False, title="GPTQ", description="Quantize layer by layer and correct the error.")
    lora_correction: bool = Field(
        default=False, title="LoRA correction", description="Add low-rank weights that correct the quantization error."
    )
    sensitivity_metric: str | None = Field(
        default=None,
        title="Sensitivity metric",
        description="Name of the NNCF metric that chooses which layers stay in 8 bits.",
    )
    dataset: str | list[str] | None = Field(
        default=None,
        title="Calibration data",
        description="Name of a data set that Optimum knows, or texts to calibrate with.",
    )
    num_samples: int | None = Field(
        default=None, ge=1, title="Calibration samples", description="Number of samples to calibrate with."
    )
    smooth_quant_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        title="Smooth quantization",
        description="How much of the activations' range is moved into the weights. Only for weights and activations.",
    )
