"""Which files of a repository a model needs. Never pickles or code, unless the block asks for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.hub_errors import HubError, NoWeightsError, PickleOnlyError
from prefect_huggingface.tasks.storage.hub.revisions import RepositoryFile

RULES = 2
"""Raised whenever other files are chosen than before, so that old manifests are not taken for complete."""

# Configuration, tokenizer and chat template: small files at the top of the repository.
_SMALL = re.compile(
    r"[^/]+\.(json|model|txt|jinja|tiktoken|spm)|additional_chat_templates/[^/]+\.jinja"
    r"|\d+_[A-Za-z]+/(config\.json|model\.safetensors)"
)
_USELESS = re.compile(r"trainer_state\.json|(all|train|eval|predict)_results\.json|.*\.index\.json|requirements.*\.txt")
_OPENVINO = re.compile(r"openvino_[^/]+\.(xml|bin)")
_OPENVINO_MODEL = re.compile(r"openvino_(model|language_model|encoder_model|decoder_model)\.xml")
_SAFETENSORS = ("model.safetensors", re.compile(r"model-(\d+)-of-(\d+)\.safetensors"), "model.safetensors.index.json")
_PICKLE = ("pytorch_model.bin", re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin"), "pytorch_model.bin.index.json")
_ANY_PICKLE = re.compile(r"[^/]+\.(bin|pt|pth|pkl|ckpt)")


@dataclass(frozen=True, slots=True)
class Selection:
    """What the choice of files depends on."""

    repo_id: str
    backend: str
    allow_pickle: bool
    trust_remote_code: bool

    @classmethod
    def of(cls, model: LocalModel) -> Selection:
        """Return the selection of a model."""
        return cls(model.model_id, model.backend, model.allow_pickle, model.trust_remote_code)

    @property
    def key(self) -> str:
        """Name of the selection in the names of manifests."""
        text = json.dumps({"rules": RULES, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def choose(self, files: Sequence[RepositoryFile]) -> tuple[RepositoryFile, ...]:
        """Return the files that the model needs, in the order of their paths.

        Raises:
            NoWeightsError: If there are no weights that the backend can load.
            PickleOnlyError: If there are, but in pickle format, and the block does not allow it.
        """
        names = {file.path for file in files}
        chosen = {n for n in names if _SMALL.fullmatch(n) and not _USELESS.fullmatch(n)} | self._weights(names)
        if self.trust_remote_code:
            chosen |= {n for n in names if n.endswith(".py")}
        return tuple(sorted((file for file in files if file.path in chosen), key=lambda file: file.path))

    def _weights(self, names: set[str]) -> set[str]:
        if self.backend == "openvino" and any(_OPENVINO_MODEL.fullmatch(n) for n in names):
            return self._openvino(names)
        weights = self._one_format(names, *_SAFETENSORS)
        if not weights and self.allow_pickle:
            weights = self._one_format(names, *_PICKLE)
        if not weights:
            raise self._no_weights(names)
        return weights

    def _openvino(self, names: set[str]) -> set[str]:
        chosen = {n for n in names if _OPENVINO.fullmatch(n)}
        self._refuse_missing({n.removesuffix(".xml") + ".bin" for n in chosen if n.endswith(".xml")} - chosen)
        return chosen

    def _one_format(self, names: set[str], whole: str, shard: re.Pattern[str], index: str) -> set[str]:
        """Return the file with all weights, or all its shards with their index."""
        if whole in names:
            return {whole}
        shards = {n: m for n in names if (m := shard.fullmatch(n))}
        for match in shards.values():
            total = match[2]
            wanted = {
                match.string.replace(f"-{match[1]}-of-", f"-{number:0{len(match[1])}d}-of-")
                for number in range(1, min(int(total), 10_000) + 1)
            }
            self._refuse_missing(wanted - names)
        return set(shards) | ({index} & names) if shards else set()

    def _refuse_missing(self, missing: set[str]) -> None:
        if missing:
            text = f"{self.repo_id!r} lacks {sorted(missing)[:3]!r}, a part of its weights. Choose another revision."
            raise NoWeightsError(text, repo_id=self.repo_id)

    def _no_weights(self, names: set[str]) -> HubError:
        if any(_ANY_PICKLE.fullmatch(n) and not _OPENVINO.fullmatch(n) for n in names):
            text = (
                f"{self.repo_id!r} holds weights in pickle format only, which can run code. "
                "Choose a revision with safetensors, or set `allow_pickle` on the block."
            )
            return PickleOnlyError(text, repo_id=self.repo_id)
        suffixes = sorted({n.rsplit(".", 1)[-1] for n in names if "." in n})[:8]
        wanted = "OpenVINO or safetensors" if self.backend == "openvino" else "safetensors"
        text = (
            f"{self.repo_id!r} holds no {wanted} weights for the backend {self.backend!r}, only {suffixes!r}. "
            "Choose another model or revision."
        )
        return NoWeightsError(text, repo_id=self.repo_id)
