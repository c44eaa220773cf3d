"""Random schedules: whatever is asked, cancelled, late or failing, no future stays open and no neighbour is affected.

A schedule is a list of requests of many kinds with pauses between them, on an engine whose steps and loads may fail.
Every greedy text must be that of its request alone.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import get_args

import pytest

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks import load_engine, unload_engines
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.registry import check_integrity
from prefect_huggingface.tasks.records import Completion, ErrorCode
from support.engine_families import PROMPTS as ALL_PROMPTS
from support.engine_families import Family, wait_until
from support.library_faults import FailingForward, FailingGenai

# Each is asked alone first, in every way.
PROMPTS = ALL_PROMPTS[:5]
FORMS = [
    ResponseFormat(choices=["yes", "no", "perhaps"]),
    ResponseFormat(regex="[a-f]{4}-[0-9]{3}"),
]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
UNRESOLVABLE = ResponseFormat(json_schema={"type": "object", "properties": {"a": {"$ref": "nowhere.json"}}})
# What a request may ask for, and whether its answer is fixed.
KINDS: dict[str, dict] = {
    "greedy": {},
    "short": {"max_new_tokens": 1},
    "long": {"max_new_tokens": 60, "ignore_eos": True},
    "penalized": {"repetition_penalty": 1.3, "max_new_tokens": 12},
    "sampled": {"do_sample": True, "temperature": 1.2, "seed": 5},
    "several": {"do_sample": True, "temperature": 1.2, "seed": 6, "n": 3, "max_new_tokens": 8},
    "beams": {"num_beams": 3, "n": 2, "max_new_tokens": 8},
    "form": {"response_format": FORMS[0]},
    "pattern": {"response_format": FORMS[1], "max_new_tokens": 30},
    "echo": {"echo": True},
    "log probabilities": {"logprobs": True, "max_new_tokens": 6},
    "bad schema": {"response_format": UNRESOLVABLE},
    "too long": {"max_new_tokens": 100_000},
}
REFUSED = ("bad schema", "too long")
FATES = ["wait", "wait", "wait", "stream", "cancel", "cancel soon", "deadline", "failing receiver"]


@dataclass
class Asked:
    """One request of a schedule."""

    prompt: str
    kind: str
    fate: str
    future: Future[Completion]
    pieces: list[str] = field(default_factory=list)


class Schedule:
    """Submits random requests to an engine and checks what they come to."""

    def __init__(self, family: Family, seed: int, kinds: list[str]) -> None:
        self.family, self.choose, self.kinds = family, random.Random(seed), kinds
        self.engine: Engine = load_engine(family.model)
        self.asked: list[Asked] = []

    def submit(self, count: int) -> None:
        """Hand in so many requests, with pauses, and cancel some of them."""
        for _ in range(count):
            prompt, kind = self.choose.choice(PROMPTS), self.choose.choice(self.kinds)
            fate = self.choose.choice(FATES)
            options = {"max_new_tokens": 10, **KINDS[kind]}
            if fate == "deadline":
                options["deadline_seconds"] = self.choose.choice([0.001, 0.02, 0.1])
            one = Asked(prompt, kind, fate, Future())
            receiver = {"stream": one.pieces.append, "failing receiver": self._fail}.get(fate)
            one.future = self.engine.submit(self.family.request(prompt, **options), receiver)
            self.asked.append(one)
            if fate == "cancel":
                one.future.cancel()
            elif fate == "cancel soon":
                threading.Timer(self.choose.random() * 0.05, one.future.cancel).start()
            if self.choose.random() < 0.2:
                time.sleep(self.choose.random() * 0.02)

    def check(self, expected: dict[tuple[str, str], Completion], may_fail: tuple[str, ...] = ()) -> None:
        """Check every request: that it ended, how, and that its text is the one it has alone."""
        end = time.monotonic() + 90
        for one in self.asked:
            try:
                found = one.future.result(timeout=max(end - time.monotonic(), 0.01))
            except CancelledError:
                assert one.fate in ("cancel", "cancel soon")
                continue
            except TimeoutError:
                pytest.fail(f"a future stays open: {one}")
            self._check_one(one, found, expected[one.prompt, one.kind], may_fail)

    def _check_one(self, one: Asked, found: Completion, alone: Completion, may_fail: tuple[str, ...]) -> None:
        if found.error is not None:
            assert found.error_code in get_args(ErrorCode)
            assert (found.text, found.finish_reason) == ("", "error")
            allowed = {alone.error_code, *may_fail, *(["engine_error"] if one.fate == "failing receiver" else [])}
            assert found.error_code in allowed, (one, found)
        elif found.finish_reason == "deadline":
            assert one.fate == "deadline"
            assert alone.text.startswith(found.text.rstrip("\ufffd")) or one.kind == "beams"
        else:
            assert alone.error is None, (one, found)
            assert (found.text, found.alternatives) == (alone.text, alone.alternatives), one
            assert found.generated_tokens == alone.generated_tokens
            assert found.finish_reason == alone.finish_reason
            assert one.fate != "failing receiver" or not found.text
            assert one.fate != "stream" or "".join(one.pieces) == found.text
        if one.fate == "stream" and found.error is not None and alone.text:
            assert alone.text.startswith("".join(one.pieces))

    @staticmethod
    def _fail(_: str) -> None:
        raise ZeroDivisionError("no receiver")


def alone(family: Family, kinds: list[str]) -> dict[tuple[str, str], Completion]:
    """Return what each request comes to when nothing runs beside it."""
    found = {}
    for kind in kinds:
        for prompt in PROMPTS:
            completion = family.ask(prompt, **{"max_new_tokens": 10, **KINDS[kind]})
            assert (completion.error is None) == (kind not in REFUSED), completion
            found[prompt, kind] = completion
    return found


def kinds_of(family: Family) -> list[str]:
    """Return the kinds that an engine knows, and those that every engine refuses."""
    known = []
    for kind, options in KINDS.items():
        if kind == "too long" and load_engine(family.model).context_length is None:
            continue  # T5 has relative positions and no limit
        completion = family.ask(PROMPTS[0], **{"max_new_tokens": 10, **options})
        if completion.error_code != "invalid_option" or kind in REFUSED:
            known.append(kind)
    return known


def check_idle(schedule: Schedule) -> None:
    """Nothing of any request is left in an engine that nobody asks."""
    # The engine notices a cancellation in its next step.
    schedule.family.text(PROMPTS[0], max_new_tokens=1)
    wait_until(lambda: all(one.future.done() for one in schedule.asked))
    check_integrity()


ALL = ["openvino-text", "torch-text", "torch-seq2seq"]
SEEDS = range(1)  # the slow tests have more


@pytest.mark.parametrize("name", [*ALL, "openvino-group"])
def test_random_requests_beside_each_other(family_of, name):
    family = family_of(name)
    kinds = kinds_of(family)
    expected = alone(family, kinds)
    for seed in SEEDS:
        schedule = Schedule(family, seed, kinds)
        schedule.submit(40)
        schedule.check(expected)
        check_idle(schedule)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*ALL, "openvino-group", "openvino-seq2seq", "torch-images", "openvino-images", "endpoint"]
)
def test_many_random_requests_beside_each_other(family_of, name):
    family = family_of(name)
    kinds = kinds_of(family)
    expected = alone(family, kinds)
    for seed in range(100, 130):
        schedule = Schedule(family, seed, kinds)
        schedule.submit(100)
        schedule.check(expected)
        check_idle(schedule)


@pytest.mark.parametrize("name", ["openvino-text", "torch-text", "torch-seq2seq"])
def test_random_requests_while_steps_fail(family_of, monkeypatch, name):
    family = family_of(name)
    kinds = ["greedy", "sampled", "several", "echo", "long", "bad schema"]
    expected = alone(family, kinds)
    for seed in SEEDS:
        unload_engines()
        choose = random.Random(seed)
        failing = {choose.randrange(2, 60) for _ in range(3)}
        with monkeypatch.context() as patch:
            if name == "openvino-text":
                FailingGenai(patch, fail_step=failing.__contains__)
            else:
                lost = RuntimeError("the device is lost")
                FailingForward(patch, name, lambda step, _, failing=failing: step in failing, lost)
            schedule = Schedule(family, seed, kinds)
            schedule.submit(40)
            schedule.check(expected, may_fail=("engine_error",))
        check_idle(schedule)


def test_random_requests_while_loads_fail(family_of, monkeypatch):
    """A pipeline that has to be loaded again and cannot be fails what it has, and the next engine is a new one."""
    family = family_of("openvino-text")
    kinds = ["greedy", "sampled", "long"]
    expected = alone(family, kinds)
    for seed in SEEDS:
        unload_engines()
        with monkeypatch.context() as patch:
            faults = FailingGenai(patch)
            schedule = Schedule(family, seed, kinds)
            schedule.submit(10)
            faults.fail_step, faults.fail_load = (lambda step: True), (lambda load: True)
            schedule.submit(10)
            schedule.check(expected, may_fail=("engine_error",))
        assert family.text(PROMPTS[0], max_new_tokens=10) == expected[PROMPTS[0], "greedy"].text


@pytest.mark.parametrize("name", [*ALL, "openvino-group", "endpoint"])
def test_random_requests_while_engines_are_closed(family_of, name):
    family = family_of(name)
    kinds = ["greedy", "short", "echo"] if name == "endpoint" else ["greedy", "short", "echo", "sampled", "several"]
    expected = alone(family, kinds)
    for seed in SEEDS:
        schedule = Schedule(family, seed, kinds)
        closing = threading.Timer(random.Random(seed).random() * 0.2, unload_engines)
        closing.start()
        schedule.submit(30)
        closing.join()
        schedule.submit(5)
        schedule.check(expected, may_fail=("cancelled",))
        assert family.text(PROMPTS[0], max_new_tokens=10) == expected[PROMPTS[0], "greedy"].text
