"""Grade batches in worker processes that can be killed. The rule is in grading/answers.py.

`Grader` settles most rows in the calling process (equal spellings, plain numbers, cache) and sends
the rest to workers. `correct` grades whole texts by their last box. No text of a model holds up the
caller for more than a few milliseconds (measured by tools/fuzz_grader.py).

A worker is a separate Python process that exchanges JSON lines over pipes, so grading works on any
thread and does not import the caller's main module. POSIX only (fork, interval timers).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from grading.answers import MAX_CHARS, is_equiv, quick_verdict
from grading.spelling import last_boxed, normalize

CACHE_SIZE = 100_000  # verdicts kept by a Grader
WORKER_BYTES = 1 << 30  # address space of a worker


class _Gone(RuntimeError):
    """A worker process has died or could not be started."""


class _Worker:
    """One worker process, started by the constructor. Its methods raise _Gone if it has died."""

    def __init__(self, timeout: float) -> None:
        self.patience = 10 * timeout + 10  # seconds of wall clock; `timeout` is processor time
        # Our folder goes last on the path, so that no file in it hides a module sympy imports.
        folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        code = f"import sys; sys.path.append({folder!r})\n"
        code += f"from grading import workers; workers.work({timeout})"
        command = [sys.executable, "-P", "-c", code]
        pipe = subprocess.PIPE
        # A separate session, so that Ctrl-C reaches only the parent.
        # Unbuffered, so that a fork between write and flush has nothing to write a second time.
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, start_new_session=True, bufsize=0
        )
        try:
            self._read(seconds=120)
        except _Gone:
            self.stop()
            raise _Gone("a grading worker did not start: is math-verify installed?") from None

    def _read(self, seconds: float) -> str:
        ready = select.select([self.process.stdout], [], [], seconds)[0]
        reply = self.process.stdout.readline().decode().strip() if ready else ""
        if not reply:
            raise _Gone
        return reply

    def ask(self, answer: str, gold: str) -> str:
        """The worker's reply: true, false, timeout or crash."""
        line = json.dumps([answer, gold]).encode() + b"\n"
        try:
            while line:
                line = line[self.process.stdin.write(line) :]
        except OSError:
            raise _Gone from None
        return self._read(self.patience)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Grader:
    """Grades batches in worker processes, which are started when first needed.

    An answer that uses more than `timeout` seconds of processor time is wrong, and its process is
    killed. `timeouts` counts these answers, and `repeats` how often one of them came again, which
    the cache settles. `errors` counts processes that died for another reason (out of memory, killed
    from outside). An answer whose process died twice is wrong, but only this once: all other
    verdicts are cached. Any thread may call `grade`; calls take turns. A forked child starts
    workers of its own. End the workers with `close` or a `with` block.
    """

    def __init__(self, workers: int = 2, timeout: float = 1.0) -> None:
        self.timeout = timeout
        self.timeouts = self.repeats = self.errors = 0
        self._workers: list[_Worker | None] = [None] * workers
        self._cache: dict[tuple[str | None, str], bool] = {}
        self._late: set[tuple[str | None, str]] = set()  # pairs of the cache that ran out of time
        self._lock = threading.Lock()
        atexit.register(self.close)
        _graders.add(self)

    def grade(self, answers: list[str | None], golds: list[str]) -> list[bool]:
        """Whether answers[i] equals golds[i] by `is_equiv`. An answer of None is wrong.

        Raises RuntimeError if no worker can be started.
        """
        with self._lock:
            verdicts: list[bool | None] = []
            slow: dict[tuple[str, str], list[int]] = {}  # pair -> its rows; each pair is sent once
            for row, pair in enumerate(zip(answers, golds, strict=True)):
                verdict = self._cache.get(pair)
                if verdict is None:
                    verdict = quick_verdict(*pair)
                    if verdict is None:
                        slow.setdefault(pair, []).append(row)
                    else:
                        self._keep(pair, verdict)
                verdicts.append(verdict)
                self.repeats += pair in self._late
            for (pair, rows), replies in zip(slow.items(), self._ask_all(list(slow)), strict=True):
                self.errors += replies.count("crash")
                if "timeout" in replies:
                    self.timeouts += 1
                    self.repeats += len(rows) - 1
                    self._late.add(pair)
                if replies[-1] != "crash":
                    self._keep(pair, "true" in replies)
                for row in rows:
                    verdicts[row] = "true" in replies
            return verdicts

    def _keep(self, pair: tuple[str | None, str], verdict: bool) -> None:
        if max(len(text or "") for text in pair) <= MAX_CHARS:  # longer ones fill memory
            if len(self._cache) >= CACHE_SIZE:
                oldest = next(iter(self._cache))
                del self._cache[oldest]
                self._late.discard(oldest)
            self._cache[pair] = verdict

    def _ask_all(self, pairs: list[tuple[str, str]]) -> list[list[str]]:
        """The replies to each pair: one, or two if the first worker died."""
        idle = queue.SimpleQueue()
        for slot in range(len(self._workers)):
            idle.put(slot)

        def ask(pair: tuple[str, str]) -> list[str]:
            slot, replies = idle.get(), []
            try:
                while replies in ([], ["crash"]):
                    try:
                        replies.append(self._started(slot).ask(*pair))
                    except _Gone:
                        if self._workers[slot] is None and replies:
                            raise  # the worker could not be started twice in a row
                        self._stop(slot)
                        replies.append("crash")
                return replies
            finally:
                idle.put(slot)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(ask, pairs))

    def _started(self, slot: int) -> _Worker:
        self._workers[slot] = self._workers[slot] or _Worker(self.timeout)
        return self._workers[slot]

    def _stop(self, slot: int) -> None:
        worker, self._workers[slot] = self._workers[slot], None
        if worker:
            worker.stop()

    def _after_fork(self) -> None:
        """In the child of a fork: leave the workers to the parent, whose pipes they read."""
        self._workers = [None] * len(self._workers)
        self._lock = threading.Lock()  # another thread of the parent may have held it

    def warm_up(self) -> None:
        """Start the workers now, which takes a second or two, instead of during the first batch."""
        with self._lock, ThreadPoolExecutor(len(self._workers)) as threads:
            list(threads.map(self._started, range(len(self._workers))))

    def close(self) -> None:
        """End the workers. A later `grade` starts new ones."""
        with self._lock:
            for slot in range(len(self._workers)):
                self._stop(slot)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


_graders: weakref.WeakSet[Grader] = weakref.WeakSet()  # of this process


def _leave_workers() -> None:
    for one in list(_graders):
        one._after_fork()


os.register_at_fork(after_in_child=_leave_workers)


@functools.cache
def grader() -> Grader:
    """The Grader of this process, made at the first call."""
    return Grader()


_process_grader = grader


def correct(texts: list[str], golds: list[str], grader: Grader | None = None) -> list[bool]:
    """Whether the last box of texts[i] equals golds[i]. Default grader: that of this process."""
    return (grader or _process_grader()).grade([last_boxed(text) for text in texts], golds)


def clusters(
    answers: list[str | None], groups: list[int], grader: Grader | None = None
) -> list[int]:
    """For each row, return the batch index of the first row of its cluster.

    A row without an answer gets -1. Two rows of a group belong together if `is_equiv` accepts one
    answer for the other. This is not quite transitive: 50% equals both 50 and 0.5, which differ. So
    the order of rows decides: an answer joins the first cluster whose first row it equals.
    """
    first: dict[tuple[int, str], int] = {}  # equal spellings need no grader
    cluster, pending = [], {}  # pending: group -> first rows that are not yet in a cluster
    for row, (answer, group) in enumerate(zip(answers, groups, strict=True)):
        answer = (answer or "").strip()
        spelling = normalize(answer) if len(answer) <= MAX_CHARS else answer
        cluster.append(first.setdefault((group, spelling), row) if spelling else -1)
        if cluster[-1] == row:
            pending.setdefault(group, []).append(row)
    while pending:  # each round completes the next cluster of every group
        pairs = [(row, rows[0]) for rows in pending.values() for row in rows[1:]]
        here, heads = [answers[row] for row, _ in pairs], [answers[head] for _, head in pairs]
        verdicts = (grader or _process_grader()).grade(here + heads, heads + here)
        for i, (row, head) in enumerate(pairs):
            cluster[row] = head if verdicts[i] or verdicts[i + len(pairs)] else row
        left = {g: [r for r in rows[1:] if cluster[r] == r] for g, rows in pending.items()}
        pending = {group: rows for group, rows in left.items() if rows}
    return [row if row < 0 else cluster[row] for row in cluster]


# ------------------------------------------------------------------------ inside a worker process

# Compared once before the first fork, because imports and the parser's tables take a second.
_WARM = [
    (r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}"),
    (r"x^2 - 2x + 1", r"(x-1)^2"),
    (r"y = 2x + 3", r"2x - y + 3 = 0"),
    (r"12\pi + 1", r"1 + 12 \cdot \pi"),
    (r"x > 3", r"3 < x"),
    (r"\sin(2x)", r"2 \sin x \cos x"),
    (r"6 - 5i", r"-5i + 6"),
    (r"\log_2 9 + |n|", r"n! + \binom{n}{2}"),
]


def work(timeout: float) -> None:
    """Compare the pairs on stdin in a forked child; one that dies is replaced for the next pair."""
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        _serve(timeout)


def _serve(timeout: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    logging.disable(logging.CRITICAL)
    for pair in _WARM:
        is_equiv(*pair)
    print("ready", flush=True)
    pid = 0
    for line in sys.stdin:
        if not pid:
            pid, channel = _fork(timeout)
        reply = ""
        with contextlib.suppress(OSError):
            channel.write(line)
            channel.flush()
            reply = channel.readline().strip()
        if not reply:
            with contextlib.suppress(OSError):
                channel.close()
            status = os.waitpid(pid, 0)[1]
            pid, reply = 0, "timeout" if os.WTERMSIG(status) == signal.SIGPROF else "crash"
        print(reply, flush=True)
    if pid:  # stdin has ended: closing the channel ends the child
        channel.close()
        os.waitpid(pid, 0)


def _fork(timeout: float) -> tuple[int, io.TextIOWrapper]:
    ours, theirs = socket.socketpair()
    if pid := os.fork():
        theirs.close()
        return pid, ours.makefile("rw")
    ours.close()
    channel = theirs.makefile("rw")
    for line in channel:
        signal.setitimer(signal.ITIMER_PROF, timeout)  # its signal kills, even within C code
        verdict = is_equiv(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.write("true\n" if verdict else "false\n")
        channel.flush()
    os._exit(0)
