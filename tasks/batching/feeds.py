"""The feed of a shard: its rows go in as requests, completions come back as answers for the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

from prefect_huggingface.tasks.batching.prompts import RequestMaker, RowProblem, RowRequest
from prefect_huggingface.tasks.batching.windows import make_windows, order_window
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.journals.answer_index import AnswerIndex
from prefect_huggingface.tasks.storage.tables.inputs import Chunk

Answers = list[tuple[Any, ...]]
LEARNT_COLUMNS = (
    "completion", "status", "finish_reason", "prompt_tokens", "generated_tokens", "seconds", "error", "details",
)  # fmt: skip


class RowFeed:
    """Turns the rows that are left into requests, and completions into answers. It is for one thread.

    Args:
        make: Makes the request of a row.
        commit: Takes finished rows, as tuples in the order of `Answer`.
        index: Answers by prompt, or None where equal prompts are generated anew.
        ordered: Whether rows with a shared beginning are put together.
    """

    def __init__(
        self,
        make: RequestMaker,
        commit: Callable[[Answers], None],
        index: AnswerIndex | None,
        ordered: bool = True,
    ) -> None:
        self._make, self._commit, self._index, self._ordered = make, commit, index, ordered
        self._rows: dict[int, list[int]] = {}  # rows that wait for the answer of their first one
        self._digests: dict[int, bytes] = {}
        self._first_rows: dict[bytes, int] = {}  # rows in flight by the hash of their prompt
        self._learnt: Answers = []

    def requests(self, chunks: Iterable[tuple[Chunk, set[int]]]) -> Iterator[Request]:
        """Yield the requests of all rows but those that are done, or have an answer without the model.

        Args:
            chunks: Rows in order, and with each chunk the numbers of its rows that are done.
        """
        for window in make_windows(self._askable(chunks), _text):
            asked = self._deduplicated(window, self._index) if self._index is not None else window
            for each in order_window(asked, _text) if self._ordered else asked:
                yield each.request

    def finish(self, completions: Iterable[Completion]) -> None:
        """Commit the answers of requests, for all rows that wait for them."""
        answers: Answers = []
        for completion in completions:
            if completion.finish_reason != "cancelled":  # somebody closed the engine; the next run takes the row
                self._finish(completion, answers)
        self._commit(answers)

    def _finish(self, completion: Completion, answers: Answers) -> None:
        row = int(completion.request_id or 0)
        digest = self._digests.pop(row, None)
        text = completion.text if completion.error is None else completion.text or None
        fields = (
            text, completion.status, completion.finish_reason, completion.prompt_tokens, completion.generated_tokens,
            completion.seconds, completion.error, _details(completion),
        )  # fmt: skip
        answers.append((row, *fields, False, digest))
        for other in self._rows.pop(row, ()):
            answers.append((other, *fields, True, digest))
        if digest is not None:
            del self._first_rows[digest]
            if completion.error is None:  # what failed for want of time or memory may do better next time
                self._learnt.append((digest, *fields))

    def learn(self, row: Mapping[str, Any]) -> None:
        """Remember the answer of an earlier run, a row of the journal without an error."""
        if row["digest"] is not None:
            self._learnt.append((row["digest"], *(row[name] for name in LEARNT_COLUMNS)))

    def _askable(self, chunks: Iterable[tuple[Chunk, set[int]]]) -> Iterator[RowRequest]:
        for chunk, done in chunks:
            if len(done) == len(chunk):
                continue
            problems: Answers = []
            for number, row in enumerate(chunk.rows, chunk.first):
                if number in done:
                    continue
                if chunk.problems and (message := chunk.problems.get(number - chunk.first)):
                    problems.append(_problem(number, RowProblem("malformed", message)))
                    continue
                made = self._make(number, row)
                if isinstance(made, RowProblem):
                    problems.append(_problem(number, made))
                else:
                    yield made
            if problems:
                self._commit(problems)

    def _deduplicated(self, window: list[RowRequest], index: AnswerIndex) -> list[RowRequest]:
        """Return the requests of a window that are new; the others get, or wait for, the answer of their like."""
        if self._learnt:
            index.add(self._learnt)
            self._learnt = []
        new = [each for each in window if not each.shareable]
        window = [each for each in window if each.shareable]
        digests = [blake2b(each.text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for each in window]
        known = index.find(digests)
        answers: Answers = []
        for each, digest in zip(window, digests, strict=True):
            row = int(each.request.id or 0)
            if (fields := known.get(digest)) is not None:
                answers.append((row, *fields, True, digest))
            elif (first := self._first_rows.get(digest)) is not None:
                self._rows[first].append(row)
            else:
                self._first_rows[digest], self._digests[row], self._rows[row] = row, digest, []
                new.append(each)
        if answers:
            self._commit(answers)
        return new


def _text(each: RowRequest) -> str:
    return each.text


def _problem(row: int, problem: RowProblem) -> tuple[Any, ...]:
    return (row, None, problem.status, "error", 0, 0, 0.0, problem.message, None, False, None)


def _details(completion: Completion) -> str | None:
    names = ("parsed", "alternatives", "logprobs", "reasoning", "choice_probabilities")
    details = {name: value for name in names if (value := getattr(completion, name))}
    return json.dumps(details, ensure_ascii=False, default=str) if details else None
