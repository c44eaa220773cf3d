"""The task that finds the fastest settings of an engine on this machine, and keeps them with the model.

Settings are tried one after the other, each beside the best ones so far: both engines answer the same prompts in turns,
each first in every other one, so that a machine that gets slower for a while makes neither look better. One turn is
enough where a setting is clearly slower. A setting is kept when it is clearly faster, in every turn, and the answers
stay as good, which is measured by how far they agree with those in full precision. In the end, all settings that were
kept are measured once more, against the defaults.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.artifacts import publish_table
from prefect_huggingface.tasks.engines.base import Engine, checked
from prefect_huggingface.tasks.engines.cores import allowed_cores
from prefect_huggingface.tasks.engines.engine_group import EngineGroup
from prefect_huggingface.tasks.engines.memory import available_bytes
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine
from prefect_huggingface.tasks.engines.openvino_runtime import (
    tuning_file,
    with_settings,
    write_settings,
)
from prefect_huggingface.tasks.engines.registry import model_folder, weight_bytes
from prefect_huggingface.tasks.errors import GenerationError, PlanError
from prefect_huggingface.tasks.records import Request
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.exports.exporter import EXACT_PROPERTIES

# In the order of what they have been seen to gain.
GRID: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("DYNAMIC_QUANTIZATION_GROUP_SIZE", (64, 128, 0)),
    ("max_num_batched_tokens", (256, 1024)),
    ("max_num_seqs", (32, 128)),
    ("instances", (2, 4, 8)),
    ("prompt_lookup_tokens", (3, 6)),
    ("KV_CACHE_PRECISION", ("bf16", "u4")),
    ("INFERENCE_PRECISION_HINT", ("bf16", "f16")),
    ("INFERENCE_NUM_THREADS", (1, 2, 4, 8, 16)),
)
PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain in simple words why the sky is blue and the evening sky is red.",
    "Summarise: The committee met on Monday, agreed on the budget, and put off the question of the new building.",
    "List five things to take along on a walk in the mountains, with a reason for each of them.",
    "Translate into French: The train leaves at nine, so we should be at the station by half past eight.",
    "What is the difference between a virus and a bacterium? Answer for a child of ten years.",
    "Classify the mood of this text as positive, negative or neutral: The room was small but very clean.",
    "Name the planets of the solar system in the order of their distance from the sun.",
)
ROWS = 48
FEW_ROWS = 8
NEW_TOKENS = 32
REPEATS = 3
CLEAR_GAIN = 1.03
# Each further process has the model in its memory.
GAIN_OF_INSTANCES = 1.06
# In no turn may a setting be slower than what it replaces.
LEAST_GAIN = 1.0
# Answers may agree this much less with those in full precision than the defaults do, and what chance explains.
TOLERANCE = 0.02
COMPARED_ROWS = 32


@dataclass(frozen=True, slots=True)
class TuningTrial:
    """One setting that was tried beside the best ones so far.

    Attributes:
        setting: Name of the setting.
        value: Value that was tried.
        speed_up: How many times as fast as the best settings before it.
        agreement: Share of the answers, from their beginning, that is the same as in full precision. None for a
            setting that is no gain, whose answers nobody needs.
        kept: Whether it is faster and answers as well.
        problem: Why it could not be tried, or None.
    """

    setting: str
    value: Any
    speed_up: float
    agreement: float | None
    kept: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """The settings that were found.

    Attributes:
        settings: Settings that are faster than the defaults, by their names.
        speed_up: How many times as fast as the defaults.
        trials: Everything that was tried.
        path: File that they are kept in.
    """

    settings: Mapping[str, Any]
    speed_up: float
    trials: tuple[TuningTrial, ...]
    path: str


def find_settings(model: LocalModel, prompts: Sequence[str] | None = None, *, concurrency: int | None = None) -> Tuning:
    """Measure a small grid of engine settings on this machine and keep the fastest for `load_engine`.

    What the model's block gives is not changed and not tried. An engine that is loaded already keeps its settings.

    Args:
        model: Model with backend "openvino" for text generation.
        prompts: Prompts like those of the work to come. When left out, eight of different kinds. Guessing from the
            prompt, which pays where answers repeat it and rules out beams, is tried with prompts that are given only.
        concurrency: Number of prompts at a time in the work to come. When left out, as many as the engine takes.

    Returns:
        The settings, their gain, and all trials.

    Raises:
        PlanError: If the model does not run on this engine, a prompt cannot be answered, or `concurrency` is below 1.
    """
    if concurrency is not None and concurrency < 1:
        raise PlanError(f"`concurrency` must be 1 or more, got {concurrency}. Leave it out for batches.")
    if (model.backend, model.task) != ("openvino", "text-generation"):
        raise PlanError(
            f"Only text generation on OpenVINO is tuned, got task {model.task!r} with backend {model.backend!r}. "
            "Use the settings of the block."
        )
    with closing(_Search(model, list(prompts or PROMPTS), concurrency)) as search:
        search.begin()
        can_guess = bool(prompts) and model.engine.draft_model is None and model.options.num_beams == 1
        for name, values in GRID:
            given = name in model.engine.model_fields_set and getattr(model.engine, name) is not None
            if not (given or name in model.ov_config) and (can_guess or name != "prompt_lookup_tokens"):
                search.try_values(name, values)
        return search.finish()


class _Search:
    """The best settings so far, with their engine."""

    def __init__(self, model: LocalModel, prompts: list[str], concurrency: int | None) -> None:
        self._model = model.model_copy(update={"options": GenerationOptions()})
        self._folder = model_folder(model)
        rows = max(ROWS if concurrency is None else FEW_ROWS, concurrency or 1, len(prompts))
        rows += -rows % (concurrency or 1)  # so that the last ones are as many at a time
        self._prompts = [prompts[row % len(prompts)] for row in range(rows)]
        self._concurrency = concurrency or rows
        self._compared = [f"{row}. {prompts[row % len(prompts)]}" for row in range(max(COMPARED_ROWS, len(prompts)))]
        self._round = 0
        self._settings: dict[str, Any] = {}
        self._trials: list[TuningTrial] = []
        self._engines: list[Engine] = []

    def begin(self) -> None:
        """Take the exact answers, and the engine with its default settings as the best one so far."""
        exact = self._load(EXACT_PROPERTIES)
        try:
            self._wanted = _answer(exact, self._compared)
        except GenerationError as exc:
            raise PlanError(f"A prompt cannot be answered: {exc} Give others as `prompts`.") from None
        exact.close()
        self._best = self._load({})
        self._defaults = _agreements(_answer(self._best, self._compared), self._wanted)

    def try_values(self, name: str, values: Sequence[Any]) -> None:
        """Try values of a setting and keep the best of them."""
        for value in values:
            if not self._is_possible(name, value):
                continue
            started = time.perf_counter()
            trial = self._try(name, value)
            self._trials.append(trial)
            run_log().info(
                "%s=%s: %.2f times as fast%s%s (%.0f s)",
                name, value, trial.speed_up,
                "" if trial.agreement is None else f", agreement {trial.agreement:.2f}",
                ", kept" if trial.kept else "", time.perf_counter() - started,
            )  # fmt: skip

    def _is_possible(self, name: str, value: Any) -> bool:
        """Tell whether this machine has the cores, and the memory for two engines beside each other."""
        cores = len(allowed_cores())
        if name == "INFERENCE_NUM_THREADS":
            # All of them are the default.
            return bool(value < cores // with_settings(self._model, self._settings).engine.processes)
        if name == "instances":
            return value <= cores and 2 * int(value) * weight_bytes(self._folder) <= available_bytes()
        return True

    def close(self) -> None:
        """Close all engines, also after an interruption."""
        for engine in self._engines:
            engine.close()

    def finish(self) -> Tuning:
        """Write the settings and return them."""
        trials = [
            {"setting": trial.setting, "value": trial.value, "speed_up": round(trial.speed_up, 3),
             "agreement": None if trial.agreement is None else round(trial.agreement, 3), "kept": trial.kept,
             "problem": trial.problem}
            for trial in self._trials
        ]  # fmt: skip
        speed_up = self._compare_with_defaults()
        if speed_up < LEAST_GAIN:
            run_log().warning("All that was kept is no faster than the defaults together, so that they stay.")
            speed_up, self._settings = 1.0, {}
        facts = {"model": self._folder.name, "speed_up": round(speed_up, 3), "trials": trials}
        path = write_settings(self._model, self._folder, self._settings, facts)
        publish_table("engine-tuning", trials, f"Settings of {self._model.model_id} on this machine")
        return Tuning(dict(self._settings), speed_up, tuple(self._trials), str(path))

    def _load(self, settings: Mapping[str, Any]) -> Engine:
        model = with_settings(self._model, settings)
        engine = EngineGroup if model.engine.processes > 1 else OpenVINOTextEngine
        self._engines.append(engine(self._folder, model))
        return self._engines[-1]

    def _try(self, name: str, value: Any) -> TuningTrial:
        settings = {**self._settings, name: value}
        clear_gain = GAIN_OF_INSTANCES if name == "instances" else CLEAR_GAIN
        engine = None
        try:
            engine = self._load(settings)
            gains = self._race(engine)
            speed_up = median(gains)
            is_faster = min(gains) >= LEAST_GAIN and speed_up >= clear_gain
            agreements = _agreements(_answer(engine, self._compared), self._wanted) if is_faster else None
        except Exception as exc:
            # Not every device and version knows every value, and not every prompt fits with it.
            if engine is not None:
                engine.close()
            return TuningTrial(name, value, 0.0, None, kept=False, problem=str(exc))
        kept = agreements is not None and not _is_worse(agreements, self._defaults)
        if kept:
            self._best.close()
            self._best, self._settings = engine, settings
        else:
            engine.close()
        return TuningTrial(name, value, speed_up, None if agreements is None else fmean(agreements), kept=kept)

    def _race(self, engine: Engine, *, to_the_end: bool = False) -> list[float]:
        """Return how many times as fast as the best one an engine is in each turn; a slow one gets one only."""
        gains: list[float] = []
        _answer(engine, self._prompts)  # what is made at the first answers
        while len(gains) < REPEATS and (to_the_end or not gains or gains[0] >= 1 / CLEAR_GAIN):
            self._round += 1
            order = (self._best, engine) if len(gains) % 2 == 0 else (engine, self._best)
            seconds = {runner: self._time(runner) for runner in order}
            gains.append(seconds[self._best] / seconds[engine])
        return gains

    def _compare_with_defaults(self) -> float:
        """Return how many times as fast as the defaults the best settings are."""
        if not self._settings:
            return 1.0
        defaults = self._load({})
        speed_up = 1 / median(self._race(defaults, to_the_end=True))
        defaults.close()
        return speed_up

    def _time(self, engine: Engine) -> float:
        """Return the seconds for all prompts, `concurrency` of them at a time."""
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        requests = [
            Request(f"{self._round} {row} {prompt}", options=options) for row, prompt in enumerate(self._prompts)
        ]
        started = time.perf_counter()
        for first in range(0, len(requests), self._concurrency):
            for completion in engine.generate(requests[first : first + self._concurrency]):
                checked(completion)
        return time.perf_counter() - started


def _answer(engine: Engine, prompts: Sequence[str]) -> list[str]:
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    requests = [Request(prompt, options=options) for prompt in prompts]
    return [completion.text for completion in engine.answer_all(requests, check=checked)]


def _agreements(answers: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """Return which share of each wanted answer is met, from its beginning to the first difference."""
    shares = []
    for answer, right in zip(answers, wanted, strict=True):
        pairs = zip(answer, right, strict=False)
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(answer), len(right)))
        longest = max(len(answer), len(right))
        shares.append(same / longest if longest else 1.0)
    return shares


def _is_worse(agreements: Sequence[float], before: Sequence[float]) -> bool:
    """Tell whether answers agree less than before, by more than chance explains."""
    changes = [one - other for one, other in zip(agreements, before, strict=True)]
    chance = stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    return fmean(changes) < -(TOLERANCE + chance)


def forget_settings(model: LocalModel) -> bool:
    """Remove what was found for a model on this machine, and tell whether there was anything."""
    path = tuning_file(model, model_folder(model))
    found = path.is_file()
    path.unlink(missing_ok=True)
    return found


tune_engine = task(name="tune-engine", cache_policy=NO_CACHE)(find_settings)
