"""LoRA adapters of PEFT: where their files are, what is in them, and whether they fit a model.

The format is the one of PEFT's `save_pretrained`: `adapter_config.json` beside `adapter_model.safetensors`, which holds
for each adapted layer a matrix A of [rank, inputs] and B of [outputs, rank]. The layer's weight becomes
W + scale * alpha / rank * B A, with the square root of the rank where the adapter is rank-stabilized (`use_rslora`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_huggingface.blocks import Adapter, LocalModel
from prefect_huggingface.tasks.errors import ModelSourceError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.hub.cache import ADAPTER, ADAPTER_FILES
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot

if TYPE_CHECKING:
    import numpy as np

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
LAYER = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# Settings of PEFT whose effect is more than two small matrices beside a layer.
UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "modules_to_save", "layer_replication", "trainable_token_indices",
    "megatron_config", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Ways to begin that take a part out of the weights of the model. What PEFT has converted to LoRA no longer names them.
CHANGES_THE_MODEL = ("pissa", "olora", "corda", "lora_ga", "loftq")
MERGE = "Where PEFT can merge it into its model (`merge_and_unload`), use the merged folder as `model_id`."


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What an adapter adds to one layer: `scaling` * B A, with A [rank, inputs] and B [outputs, rank] in float32."""

    a: np.ndarray
    b: np.ndarray
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs and inputs."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter whose files are on this machine, and whose settings are understood.

    Attributes:
        name: Name of the adapter.
        path: Its folder.
        scale: Factor of the block.
        config: Content of its `adapter_config.json`.
    """

    name: str
    path: Path
    scale: float
    config: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        """Its files."""
        return [self.path / CONFIG_FILE, self.path / WEIGHTS_FILE]

    @property
    def digest(self) -> str:
        """Hash of what it contains and of its scale."""
        digest = hashlib.sha256(str(self.scale).encode())
        for file in self.files:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def read_layers(self) -> dict[str, LoraLayer]:
        """Return what it adds, by the names of the layers.

        Raises:
            ModelSourceError: If its file is damaged, or holds more than the matrices of LoRA.
        """
        sides: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in _read_tensors(self.path / WEIGHTS_FILE):
            match = LAYER.fullmatch(key)
            if match is None or tensor.ndim != 2:
                raise ModelSourceError(f"Adapter {self.name!r} holds {key!r}, which is no matrix of LoRA. {MERGE}")
            sides.setdefault(match["name"], {})[match["side"]] = tensor
        layers = {}
        for name, pair in sides.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                shapes = {side: tensor.shape for side, tensor in sorted(pair.items())}
                raise ModelSourceError(
                    f"Adapter {self.name!r} has no two matrices that fit for {name!r}, only {shapes}. Fetch it again."
                )
            layers[name] = LoraLayer(pair["A"], pair["B"], self._scaling(name, pair["A"].shape[0]))
        return layers

    def _scaling(self, layer: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                alpha = value
                break
        return float(self.scale * alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def get_adapters(model: LocalModel) -> tuple[LoraAdapter, ...]:
    """Return the adapters of a model; download those that are on the Hub and not here.

    Raises:
        ModelSourceError: If one is missing, or is none that can be applied.
        DownloadError: If one is on the Hub and cannot be had.
    """
    return tuple(_open(adapter, _locate(adapter, model)) for adapter in model.adapters)


def check_fit(adapters: tuple[LoraAdapter, ...], folder: Path) -> None:
    """Check that a model in a folder has the layers of its adapters, in their shapes. It only reads headers of weights.

    Raises:
        ModelSourceError: With the first layer that does not fit.
    """
    if not adapters:
        return
    shapes: dict[str, set[tuple[int, int] | None]] = {}
    is_ir = (folder / "openvino_model.xml").is_file()
    for name, shape in _ir_shapes(folder) if is_ir else _checkpoint_shapes(folder):
        shapes.setdefault(_short(name), set()).add(shape)
    for adapter in adapters:
        base = adapter.config.get("base_model_name_or_path")
        remedy = f"Use it with the model that it was made for ({base})." if base else "Use it with its own model."
        for name, layer in adapter.read_layers().items():
            known = shapes.get(_short(name), set())
            if not known:
                raise ModelSourceError(
                    f"Adapter {adapter.name!r} changes {name!r}, which the model in {str(folder)!r} lacks. {remedy}"
                )
            if not known & {None, layer.shape, layer.shape[::-1]}:
                raise ModelSourceError(
                    f"Adapter {adapter.name!r} has the shape {layer.shape} for {name!r}, and the model in "
                    f"{str(folder)!r} has {next(iter(known))}. {remedy}"
                )


def _short(name: str) -> str:
    """Return the end of a layer's name. Files, Transformers and OpenVINO differ in its beginning."""
    return ".".join(name.split(".")[-4:])


def pin_adapters(model: LocalModel) -> LocalModel:
    """Return the model with its adapters at the commits that they are now, so that they stay the same from here on."""
    pinned = [
        one if one.is_local else one.model_copy(update={"revision": _fetch(one, model).commit})
        for one in model.adapters
    ]
    return model.model_copy(update={"adapters": pinned})


def _fetch(adapter: Adapter, model: LocalModel) -> Snapshot:
    changes = {"model_id": adapter.repo_or_folder, "revision": adapter.revision, "backend": ADAPTER}
    return fetch_snapshot(model.model_copy(update=changes))


def _locate(adapter: Adapter, model: LocalModel) -> Path:
    if not adapter.is_local:
        return _fetch(adapter, model).path
    folder = Path(adapter.repo_or_folder)
    if not folder.is_dir():
        raise ModelSourceError(f"The adapter folder {adapter.repo_or_folder!r} does not exist. Correct it.")
    return folder


def _open(adapter: Adapter, folder: Path) -> LoraAdapter:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelSourceError(
                f"{adapter.repo_or_folder!r} is no adapter of PEFT with safetensors, {name!r} is missing. "
                "Save it with `save_pretrained` of PEFT."
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ModelSourceError(f"{str(folder / CONFIG_FILE)!r} is not JSON: {exc}. Fetch the adapter again.") from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelSourceError(f"Adapter {adapter.name!r} is of the kind {kind!r}, and only 'LORA' works. {MERGE}")
    given = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        given.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_THE_MODEL):
        given.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if given:
        raise ModelSourceError(f"Adapter {adapter.name!r} has `{given[0]}`, which is more than LoRA. {MERGE}")
    return LoraAdapter(adapter.name, folder, adapter.scale, config)


def _read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a file in float32."""
    import numpy as np
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError as exc:
        raise ModelSourceError(f"{str(path)!r} is not in safetensors format: {exc}. Fetch the adapter again.") from None
    for name, tensor in tensors:
        data, dtype = tensor["data"], tensor["dtype"]
        if dtype == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif dtype in ("F16", "F32", "F64"):
            values = np.frombuffer(data, f"f{int(dtype[1:]) // 8}").astype(np.float32)
        else:
            raise ModelSourceError(f"{str(path)!r} holds {name!r} as {dtype}, and LoRA needs floats. Fetch it again.")
        yield name, values.reshape(tensor["shape"])


def _checkpoint_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:  # type: ignore[no-untyped-call]
            for key in weights.keys():
                shape = tuple(weights.get_slice(key).get_shape())
                if key.endswith(".weight") and len(shape) == 2:
                    yield key.removesuffix(".weight"), shape


def _ir_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield the layers that OpenVINO GenAI can adapt: products whose names are those of the modules of torch."""
    text = (folder / "openvino_model.xml").read_text(encoding="utf-8")
    weights = r'name="self\.([^"/]+)\.weight" type="Const"[^>]*>\s*<data [^>]*shape="([\d, ]+)"'
    shapes = {name: tuple(map(int, shape.split(","))) for name, shape in re.findall(weights, text)}
    for name in re.findall(r'name="__module\.([^"/]+)/aten::\w+/MatMul"', text):
        # Weights of 4 bits are stored by groups, [outputs, groups, group].
        shape = shapes.get(name)
        yield name, None if shape is None else (shape[0], math.prod(shape[1:]))
