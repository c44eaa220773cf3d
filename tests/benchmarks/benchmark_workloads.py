"""What the engines have to do in the benchmark: prompts, and how many tokens each of them gets."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts with the number of new tokens of each.

    Attributes:
        threads: Number of threads that submit one prompt at a time, 0 for one list.
        read_tokens: Tokens of all prompts, about: what makes them differ in every repeat is not counted, and of a
            beginning that they share only one.
    """

    name: str
    prompts: list[str]
    new_tokens: list[int]
    threads: int = 0
    read_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Number of new tokens of all prompts."""
        return sum(self.new_tokens)

    def sample(self, rows: int) -> Workload:
        """Return the same kind of work with fewer rows, for engines that take minutes."""
        step = max(len(self.prompts) // rows, 1)
        prompts = self.prompts[::step][:rows]
        read_tokens = self.read_tokens * len(prompts) // len(self.prompts)
        return replace(self, prompts=prompts, new_tokens=self.new_tokens[::step][:rows], read_tokens=read_tokens)

    def fresh(self, repeat: int) -> Workload:
        """Return the same work with prompts that no engine has in its cache from the repeats before."""
        if self.name == "shared":
            return replace(self, prompts=[f"{repeat} {prompt}" for prompt in self.prompts])
        return replace(self, prompts=[f"{repeat} {row} {prompt}" for row, prompt in enumerate(self.prompts)])


def make_workloads(tokenizer_file: Path, *, quick: bool = False) -> list[Workload]:
    """Return the five workloads."""
    from tokenizers import Tokenizer

    tokenizer, choose = Tokenizer.from_file(str(tokenizer_file)), random.Random(3)
    vocabulary = tokenizer.get_vocab_size()

    def text(tokens: int) -> str:
        return str(tokenizer.decode([choose.randrange(300, vocabulary) for _ in range(tokens)]))

    rows, new = (16, 16) if quick else (64, 64)
    lengths = [choose.randint(16, 256) for _ in range(rows)]
    mixed = [text(length) for length in lengths]
    shared = text(300)
    skewed = [min(int(choose.expovariate(1 / 40)) + 4, 256) for _ in range(rows)]
    return [
        Workload("mixed", mixed, [new] * rows, read_tokens=sum(lengths)),
        Workload(
            "shared",
            [f"{shared} {text(12)}" for _ in range(4 * rows)],
            [16] * 4 * rows,
            read_tokens=300 + 12 * 4 * rows,
        ),
        Workload("skewed", [text(32) for _ in range(rows)], skewed, read_tokens=32 * rows),
        Workload("alone", mixed[:1], [new], read_tokens=lengths[0]),
        Workload("threads", mixed, [new] * rows, threads=8, read_tokens=sum(lengths)),
    ]
