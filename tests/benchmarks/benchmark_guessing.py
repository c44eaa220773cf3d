"""Measures what guessing tokens gains, from the prompt or by a draft model, where answers repeat the prompt.

    python tests/benchmarks/benchmark_guessing.py [--concurrency 1 4 16 64] [--draft FOLDER] [--output build/benchmarks]

The model is the real SmolLM2-135M-Instruct in int8. Each way answers the same prompts in turn; the figures are tokens
per second over those of the plain engine, and the share of the answers that are the same.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median

from benchmark_models import make_export
from report import show, store

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine
from prefect_huggingface.tasks.records import Request

FEWEST_PROMPTS = 4
NEW_TOKENS = 96
PEOPLE = (
    "Ada Brown",
    "Luis Ortega",
    "Mei Tanaka",
    "Jonas Weber",
    "Fatima Haddad",
    "Olga Petrova",
    "Sam Okafor",
    "Ida Holm",
)
CITIES = ("Lisbon", "Hamburg", "Osaka", "Nairobi", "Bergen", "Valencia", "Krakow", "Toronto")
TEXT = (
    "On {day} May, {person} of the city office in {city} opened the new library beside the river. The building cost "
    "{cost} million euros and holds {books} thousand books. It is open from nine in the morning until eight at night, "
    "and on Sundays from noon. Children under twelve get a free card, and students pay half of the yearly fee."
)
CODE = (
    "def total_price(items, tax_rate):\n    total = 0\n    for item in items:\n        total += item.price * {cost}\n"
    "    return total * (1 + tax_rate)\n\n"
    "def describe(items):\n    for item in items:\n        print(item.name, {books})\n"
)
WORK = {
    "extraction": "Copy every sentence of this text that has a number in it, word for word.\n\n" + TEXT,
    "rewriting": "Write this text again and put {person} in the place of the city office.\n\n" + TEXT,
    "code": "Rename the variable `total` to `amount` in this code and show all of it.\n\n" + CODE,
}


def prompts_of(work: str, count: int, repeat: int) -> list[str]:
    """Return prompts of one kind that differ in every repeat."""
    return [
        WORK[work].format(
            day=1 + (row + repeat) % 30, person=PEOPLE[(row + repeat) % len(PEOPLE)],
            city=CITIES[(row * 3 + repeat) % len(CITIES)], cost=repeat * 100 + row + 3, books=repeat * 50 + row + 20,
        )
        for row in range(count)
    ]  # fmt: skip


def answer(engine: Engine, prompts: list[str], concurrency: int) -> tuple[float, list[str]]:
    """Return the tokens per second and the answers, so many prompts at a time."""
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    started, completions = time.perf_counter(), []
    for first in range(0, len(prompts), concurrency):
        part = prompts[first : first + concurrency]
        completions += sorted(
            engine.generate(Request(prompt, options=options, id=row) for row, prompt in enumerate(part)),
            key=lambda completion: completion.request_id or 0,
        )
    seconds = time.perf_counter() - started
    return sum(one.generated_tokens for one in completions) / seconds, [one.text for one in completions]


def compare(engines: dict[str, Engine], work: str, concurrency: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Return the speed of each engine over that of the first, and its share of the same answers."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    same: dict[str, list[bool]] = {name: [] for name in engines}
    for repeat in range(repeats):
        prompts, wanted = prompts_of(work, max(concurrency, FEWEST_PROMPTS), repeat * 4 + concurrency), None
        for name, engine in engines.items():
            rate, answers = answer(engine, prompts, concurrency)
            wanted = answers if wanted is None else wanted
            rates[name].append(rate)
            same[name] += [one == other for one, other in zip(answers, wanted, strict=True)]
    plain = median(rates[next(iter(rates))])
    return {name: (median(rates[name]) / plain, sum(same[name]) / len(same[name])) for name in engines}


def main() -> None:
    """Read the arguments, measure, and print a table for each kind of work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="prompts at a time")
    parser.add_argument("--repeats", type=int, default=3, help="how often each way answers each kind of prompts")
    parser.add_argument("--draft", type=Path, help="folder of an OpenVINO model with the same tokenizer")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the models")
    arguments = parser.parse_args()
    work = arguments.output.absolute() / "real"
    folder = make_export(work)
    ways = {"plain": EngineOptions()}
    ways |= {f"from the prompt, {count}": EngineOptions(prompt_lookup_tokens=count) for count in (3, 6, 10)}
    if arguments.draft is not None:
        ways["draft model"] = EngineOptions(draft_model=str(arguments.draft))
    with ExitStack() as stack:
        engines: dict[str, Engine] = {
            name: stack.enter_context(
                closing(OpenVINOTextEngine(folder, LocalModel(model_id=str(folder), engine=options)))
            )
            for name, options in ways.items()
        }
        figures = {}
        for kind in WORK:
            found = {count: compare(engines, kind, count, arguments.repeats) for count in arguments.concurrency}
            rows = [
                [str(concurrency), *(f"{speed:.2f} ({same:.2f})" for speed, same in row.values())]
                for concurrency, row in found.items()
            ]
            show(f"{kind}: speed over plain (share of the same answers)", ["prompts at a time", *ways], rows)
            figures[kind] = found
        store(work / "guessing.json", figures)


if __name__ == "__main__":
    main()
