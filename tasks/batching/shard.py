"""One shard: a range of rows that one worker puts through its engines, committing as it goes.

The feed turns rows into requests and completions into results. All steps of all rows share the batch of an engine:
a row goes on with its next step as soon as it has finished one, before new rows begin.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from hashlib import blake2b
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.batching.job import BatchJob
from prefect_huggingface.tasks.batching.requests import ChainRows, RequestMaker, RowProblem, RowRequest, parse_output
from prefect_huggingface.tasks.engines.base import Engine, OnText, RequestError
from prefect_huggingface.tasks.errors import BatchError, ChainError, EngineError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.journals.duplicates import ResultIndex
from prefect_huggingface.tasks.storage.journals.journal import JournalRows, JournalWriter, ResultRow
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner, StoreOutage
from prefect_huggingface.tasks.storage.tables.inputs import Chunk, Rows, read_chunks

STOP_CHECK_SECONDS = 0.5
WINDOW_ROWS = 4096
WINDOW_CHARACTERS = 16 * 2**20
OPEN_ROWS = 2 * WINDOW_ROWS  # rows of a chain that are in memory
UNFINISHED = ("skipped", "deadline")  # statuses of answers that have no error and are not whole
TRANSIENT = {"deadline", "out_of_memory", "rate_limited", "unavailable", "bad_answer"}  # may do better the next time
MAX_TRIES = 3  # of equal prompts one after the other, before the failure is that of all
PREFIX_CHARACTERS = 64  # after which two prefixes count as shared

FeedChunk = tuple[Chunk, list[ResultRow]]
"""Some rows, and their steps that are finished."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Some rows of a batch, at least one. How it goes through them does not change the output.

    Attributes:
        owner: Run that it belongs to.
        retry_before: Rows that failed in a run before this one are generated again.
        max_concurrency: Upper limit of requests that the shards of a process have queued or running together, or None
            for the engine's own, for each shard.
        deduplicate: Whether equal prompts are generated once.
        group_by_prefix: Whether rows with a shared prefix are generated together.
    """

    rows: Rows
    owner: JournalOwner
    retry_before: int = 0
    max_concurrency: int | None = None
    deduplicate: bool = True
    group_by_prefix: bool = True

    @property
    def start(self) -> int:
        """First row."""
        return self.rows[0]

    @property
    def stop(self) -> int:
        """Row after the last."""
        return self.rows[-1] + 1


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a shard came to.

    Attributes:
        finished: Number of its rows that are in the journal.
        complete: Whether these are all.
        seconds: Time from the beginning of its engine to the last commit.
    """

    finished: int
    complete: bool
    seconds: float


def process_shard(engines: Sequence[Engine], shard: Shard) -> ShardResult:
    """Generate the rows of a shard that are not in the journal yet.

    It ends early, with what is finished committed, when the journal asks for it. There is an engine for each model of
    the job.
    """
    began, journal = time.monotonic(), shard.owner.journal
    job = BatchJob.from_dict(journal.read_job() or {})
    for engine in engines:
        check_template(engine, job)
    should_stop = _StopCheck(shard.owner)
    room = _share_room(shard) if shard.max_concurrency else Room(sum(engine.in_flight for engine in engines))
    with ExitStack() as stack:
        writer = stack.enter_context(JournalWriter(journal, job.key, shard.owner.epoch))
        index = stack.enter_context(ResultIndex()) if shard.deduplicate else None
        chunks = _read_unfinished(job, shard, should_stop)
        feed = RowFeed(job.make_requests(), chunks, writer.add, index, shard.group_by_prefix)
        for completions in stack.enter_context(closing(run_requests(engines, feed, room, should_stop))):
            feed.finish(completions)
    return ShardResult(feed.finished, feed.finished == len(shard.rows), time.monotonic() - began)


class Room:
    """Room for so many requests, which the threads of several shards take and give back."""

    def __init__(self, size: int) -> None:
        self._free, self._changed = size, threading.Condition()

    def take(self, seconds: float) -> int:
        """Take all that is free, after a time at most in which something may become free."""
        with self._changed:
            self._changed.wait_for(lambda: self._free, seconds)
            taken, self._free = self._free, 0
            return taken

    def give(self, count: int = 1) -> None:
        """Give some back."""
        with self._changed:
            self._free += count
            self._changed.notify()


_rooms: WeakValueDictionary[str, Room] = WeakValueDictionary()  # by the run, as long as a shard of it is here
_rooms_lock = threading.Lock()


def _share_room(shard: Shard) -> Room:
    """Return the room of a run in this process."""
    with _rooms_lock:
        room = _rooms.get(shard.owner.id) or Room(shard.max_concurrency or 1)
        _rooms[shard.owner.id] = room
    return room


def check_template(engine: Engine, job: BatchJob) -> None:
    """Refuse a system message, or variables of the template, that the model cannot take, before the first row.

    Raises:
        BatchError: With what the template says.
    """
    if engine.inputs is None or (job.system is None and not job.options.get("template_options")):
        return
    system = [{"role": "system", "content": "Be brief."}] if job.system is not None else []
    probe = Request(messages=[*system, {"role": "user", "content": "Hello"}], options=GenerationOptions(**job.options))
    try:
        engine.inputs.write(probe, probe.options)
    except RequestError as exc:
        raise BatchError(f"No row can be asked: {exc}") from None


def run_requests(
    engines: Sequence[Engine],
    feed: RowFeed,
    room: Room,
    should_stop: Callable[[], bool],
    listen: Callable[[RowRequest], OnText | None] = lambda _: None,
) -> Generator[list[Completion], None, None]:
    """Yield what has finished until the feed has no more, or until it has to stop.

    It looks for a stop also while every request takes long. Closing the iterator cancels those under way. As many
    requests are under way as find `room`. `listen` returns what is to get the text of a request as it comes.

    Raises:
        EngineError: If an engine was closed, or can be used no more.
    """
    finished: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()
    pending: set[Future[Completion]] = set()

    def collect(future: Future[Completion]) -> None:
        # Of the many objects of a future none is kept, so that Python has less to search for garbage.
        try:
            finished.put(future.result())
        except BaseException as exc:
            finished.put(exc)
        pending.discard(future)
        room.give()

    try:
        while not should_stop():
            # With nothing to wait for but the room that other shards have, wait for that.
            free = room.take(0 if pending or not finished.empty() else STOP_CHECK_SECONDS)
            unused = free
            try:
                for asked in feed.take(free):
                    future = engines[asked.engine].submit(asked.request, listen(asked))
                    unused -= 1
                    pending.add(future)
                    future.add_done_callback(collect)
            finally:  # other shards have the rest, whatever happens to this one
                room.give(unused)
            if pending or not finished.empty():
                yield from _finished(engines, _wait_for(finished))
            elif free:
                return
    finally:
        for future in pending.copy():
            future.cancel()


def _wait_for(finished: queue.SimpleQueue[Completion | BaseException]) -> list[Completion]:
    """Return what finishes next and all that has; nothing if it takes long."""
    done: list[Completion] = []
    with suppress(queue.Empty):
        one = finished.get(timeout=STOP_CHECK_SECONDS)
        while True:
            if isinstance(one, BaseException):
                raise one
            done.append(one)
            one = finished.get_nowait()
    return done


def _finished(engines: Sequence[Engine], completions: list[Completion]) -> Iterator[list[Completion]]:
    """Yield what is finished; what an engine that was closed, or failed for good, leaves undone is for the next run."""
    failures = [engine.failure for engine in engines if engine.failure is not None]
    finished = [one for one in completions if one.error_code != "cancelled" and one.error not in failures]
    if finished:
        yield finished
    if len(finished) < len(completions):
        raise EngineError(f"{failures[0] if failures else 'The engine was closed while the batch ran.'} Run it again.")


class _StopCheck:
    """Asks the journal now and then."""

    def __init__(self, owner: JournalOwner) -> None:
        self._owner, self._next, self._outage = owner, 0.0, StoreOutage()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._owner.journal.poll_seconds
        with self._outage:
            return self._owner.is_stopped()
        return False


def _read_unfinished(job: BatchJob, shard: Shard, should_stop: Callable[[], bool]) -> Iterator[FeedChunk]:
    """Yield the chunks of a shard with what earlier runs have finished of them."""
    sweep = JournalRows(shard.owner.journal, job.key)
    for chunk in read_chunks(job.table, shard.rows, each=True):
        if should_stop():
            return
        known = []
        for row in sweep.take(chunk.first, chunk.first + len(chunk)).to_pylist():
            epoch = row.pop("epoch")
            if row["error"] is None or epoch >= shard.retry_before:
                known.append(ResultRow(**row))
        yield chunk, known


class RowFeed:
    """Turns the rows that are left into requests, and completions into results. It is for one thread.

    Args:
        make: Makes the request of a row, or of each step of a chain.
        chunks: Rows in order.
        commit: Takes finished steps.
        index: Results by prompt, or None where equal prompts are generated anew.
        group_by_prefix: Whether rows with a shared prefix are put together.

    Attributes:
        finished: Number of rows that are finished, by earlier runs too.
    """

    def __init__(
        self,
        make: RequestMaker,
        chunks: Iterable[FeedChunk],
        commit: Callable[[list[ResultRow]], None],
        index: ResultIndex | None = None,
        group_by_prefix: bool = True,
    ) -> None:
        self._chain = make if isinstance(make, ChainRows) else None
        self._steps = len(self._chain.steps) if self._chain else 1
        self._make, self._take_rows, self._index, self._group = make, commit, index, group_by_prefix
        self.finished = 0
        self._windows = make_windows(self._requests(chunks))
        self._ready: deque[RowRequest] = deque()
        self._following: list[RowRequest] = []  # next steps of rows, which go first
        self._values: dict[int, dict[str, Any]] = {}  # columns and outputs of the rows of a chain that have begun
        self._digests: dict[int, bytes] = {}  # hash of the prompt of each request in flight that others may share
        self._waiting: dict[bytes, list[RowRequest]] = {}  # by that hash, those that wait for its result
        self._tries: Counter[bytes] = Counter()  # by that hash, how often it did not come to a result
        self._waiters = 0

    def take(self, count: int) -> list[RowRequest]:
        """Return the next requests; none when there are none before a request in flight is finished."""
        taken: list[RowRequest] = []
        while len(taken) < count:
            while self._following:
                following, self._following = self._following, []
                self._ready.extendleft(reversed(self._admit(following)))
            if not self._ready:
                is_full = len(self._values) + self._waiters >= OPEN_ROWS
                window = None if is_full else next(self._windows, None)
                if window is None:
                    break
                asked = self._admit(window)
                self._ready.extend(order_window(asked) if self._group else asked)
                continue
            taken += [self._ready.popleft() for _ in range(min(count - len(taken), len(self._ready)))]
        return taken

    def end(self) -> None:
        """Begin no more rows. Those that have begun are finished."""
        self._ready = deque(each for each in self._ready if each.number % self._steps)
        self._windows = iter(())

    def finish(self, completions: Iterable[Completion]) -> None:
        """Commit the results of requests, for all rows that wait for them."""
        results: list[ResultRow] = []
        learnt: list[ResultRow] = []
        for completion in completions:
            number = int(completion.request_id or 0)
            digest = self._digests.pop(number, None)
            result = _to_result(completion, *divmod(number, self._steps), digest)
            waiting = self._waiting.pop(digest) if digest is not None else []
            self._waiters -= len(waiting)
            self._settle(result, results)
            if digest is not None and _is_sharable(result):
                learnt.append(result)
            elif digest is not None and result.status in TRANSIENT and waiting:
                self._tries[digest] += 1
                if self._tries[digest] < MAX_TRIES:  # the first of them is asked, and the others wait for it
                    self._following += waiting
                    continue
            for other in waiting:
                self._share(result, other.number, results)
        if self._index is not None:
            self._index.add(learnt)
        self._commit(results)

    def _commit(self, results: list[ResultRow]) -> None:
        self.finished += sum(row.is_last for row in results) if self._chain else len(results)
        self._take_rows(results)

    def _share(self, result: ResultRow, number: int, results: list[ResultRow]) -> None:
        row, step = divmod(number, self._steps)
        self._settle(result._replace(row=row, step=step, shared=True), results)

    def _settle(self, result: ResultRow, results: list[ResultRow]) -> None:
        """Add a result, and make the next step of its row."""
        if self._chain is None:
            results.append(result)
            return
        step = self._chain.steps[result.step]
        if result.error is not None:
            result = result._replace(error=f"Step {step.name!r}: {result.error}", is_last=True)
        elif result.status in UNFINISHED:  # no later step can go on from it, and a part of a form has no value
            text = result.completion if step.parser == "text" else None
            result = result._replace(completion=text, is_last=True)
        else:
            try:
                self._values[result.row][step.name] = parse_output(step, result.completion or "")
                result = result._replace(is_last=result.step == self._steps - 1)
            except ChainError as exc:
                result = result._replace(status="schema_invalid", error=exc.message, is_last=True)
        results.append(result)
        if result.is_last:
            del self._values[result.row]
            return
        try:
            self._following.append(self._make(result.row, self._values[result.row], result.step + 1))
        except RowProblem as problem:
            del self._values[result.row]
            results.append(_problem(result.row, problem, result.step + 1))

    def _requests(self, chunks: Iterable[FeedChunk]) -> Iterator[RowRequest]:
        """Yield the first request of all rows but those that are done or cannot be asked."""
        for chunk, known in chunks:
            if self._index is not None:
                self._index.add(filter(_is_sharable, known))
            done = {row.row for row in known if row.is_last}
            self.finished += len(done)
            problems: list[ResultRow] = []
            begun = self._begun(known, done) if self._chain else {}
            for number, row in enumerate(chunk.rows if len(done) < len(chunk) else (), chunk.first):
                if number in done:
                    continue
                outputs = begun.get(number, {})
                row.update(outputs)
                try:
                    if message := chunk.problems.get(number - chunk.first):
                        raise RowProblem("malformed", message)
                    made = self._make(number, row, len(outputs))
                except RowProblem as problem:
                    problems.append(_problem(number, problem, len(outputs)))
                    continue
                if self._chain:
                    self._values[number] = row
                yield made
            self._commit(problems)

    def _begun(self, known: list[ResultRow], done: set[int]) -> dict[int, dict[str, Any]]:
        """Return the outputs of the steps that rows have finished, without a gap from the first step on."""
        outputs: dict[int, dict[str, Any]] = {}
        for result in known:
            own = outputs.setdefault(result.row, {})
            if result.row not in done and result.error is None and result.step == len(own) and self._chain:
                step = self._chain.steps[result.step]
                with suppress(ChainError):  # an older version took it; the step is asked again
                    own[step.name] = parse_output(step, result.completion or "")
        return outputs

    def _admit(self, asked: list[RowRequest]) -> list[RowRequest]:
        """Return the requests that are new; the others get, or wait for, the result of their like."""
        if self._index is None:
            return asked
        new = [each for each in asked if not each.shareable]
        shared = [each for each in asked if each.shareable]
        digests = [blake2b(each.text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for each in shared]
        known = self._index.find(digests)
        results: list[ResultRow] = []
        for each, digest in zip(shared, digests, strict=True):
            number = each.number
            if (found := known.get(digest)) is not None:
                self._share(found, number, results)
            elif digest in self._waiting:
                self._waiting[digest].append(each)
                self._waiters += 1
            else:
                self._waiting[digest], self._digests[number] = [], digest
                new.append(each)
        if results:
            self._commit(results)
        return new


def _to_result(completion: Completion, row: int, step: int, digest: bytes | None) -> ResultRow:
    text = completion.text if completion.error is None else completion.text or None
    return ResultRow(
        row, step, text, completion.status, completion.finish_reason, completion.prompt_tokens,
        completion.generated_tokens, completion.seconds, completion.error, _details(completion), False, digest, True,
    )  # fmt: skip


def _is_sharable(result: ResultRow) -> bool:
    """Return whether equal prompts get the same; what failed or was cut for want of time may do better next time."""
    return result.error is None and result.finish_reason != "deadline"


def _problem(row: int, problem: RowProblem, step: int = 0) -> ResultRow:
    return ResultRow(row, step, None, problem.status, "error", error=problem.message)


_MORE = ("parsed", "alternatives", "logprobs", "tokens", "reasoning", "choice_probabilities")
_more_of = attrgetter(*_MORE)


def _details(completion: Completion) -> str | None:
    values = _more_of(completion)
    if completion.vector is None and not any(values):
        return None
    details = {name: value for name, value in zip(_MORE, values, strict=True) if value}
    if completion.vector is not None:
        details["vector"] = base64.b64encode(completion.vector.astype("<f4").tobytes()).decode()
    return json.dumps(details, ensure_ascii=False, default=str)


def make_windows(
    requests: Iterable[RowRequest], rows: int = WINDOW_ROWS, characters: int = WINDOW_CHARACTERS
) -> Iterator[list[RowRequest]]:
    """Yield the requests in lists that are bounded by their number and by the length of their texts together."""
    window: list[RowRequest] = []
    size = 0
    for request in requests:
        window.append(request)
        size += len(request.text)
        if len(window) >= rows or size >= characters:
            yield window
            window, size = [], 0
    if window:
        yield window


def order_window(window: list[RowRequest]) -> list[RowRequest]:
    """Return the requests of a window in the order in which an engine has the least work with them.

    Those that go on alike after what all have in common stand together, so that the engine finds their prefix in its
    cache. The others come by falling length, so that no long one is left for the end.
    """
    if len(window) < 3:
        return window
    texts = [request.text for request in window]
    common = len(os.path.commonprefix([min(texts), max(texts)]))
    prefixes = [each[common : common + PREFIX_CHARACTERS] for each in texts]
    shared = {each for each, count in Counter(prefixes).items() if count > 1 and len(each) == PREFIX_CHARACTERS}
    keys = [(each if each in shared else "", -len(text)) for each, text in zip(prefixes, texts, strict=True)]
    return [window[index] for index in sorted(range(len(window)), key=keys.__getitem__)]


def answer_row(engines: Sequence[Engine], chain: ChainRows, values: dict[str, Any]) -> list[ResultRow]:
    """Put one row of values through a chain and return what became of its steps, in their order.

    It is the same machinery as that of a table. The outputs of the steps are added to the values.
    """
    results: list[ResultRow] = []
    chunk = Chunk(0, 1, lambda: [values])
    feed = RowFeed(chain, [(chunk, [])], results.extend)
    for completions in run_requests(engines, feed, Room(1), should_stop=lambda: False):
        feed.finish(completions)
    return results
