"""Run train.py in several processes, for tools.demo and tools.sweep. Each run has its own folder.

A complete run is kept, a stopped run continues from its checkpoint, and a run of another
configuration is refused.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from tqdm import tqdm

from harness.configurator import PROJECT, configure
from harness.errors import UserError
from harness.files import no_follow
from harness.locks import lock
from harness.plan import device_memory
from harness.runfiles import (
    is_complete,
    read_jsonl,
    read_state,
    stale,
    trained_weights,
)
from harness.scale import choose_scale
from harness.stopping import StopOnSignal
from settings import Config, read_settings
from tasks import tiny
from tools.parts.arms import as_saved, differences

LIBC = ctypes.CDLL(None)
MEMORY_OF_RUN = 1.5e9  # bytes that a run of the tiny world needs with its libraries, rounded up


@dataclass
class Job:
    """One run: its folder, its train.py arguments without out_dir, and its process once started."""

    folder: Path
    args: list[str]
    process: subprocess.Popen | None = None

    @cached_property
    def config(self) -> Config:
        """The configuration that train.py will use. Raises UserError for a wrong argument."""
        return configure(Config, [*self.args, f"--out_dir={self.folder}"], choose_scale)[0]

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def steps_done(self) -> int:
        rows = read_jsonl(self.folder / "metrics.jsonl")
        return rows[-1].get("step", 0) if rows else 0


def state(job: Job) -> str:
    """The state of a run: "new", "resume", "complete", or "restart" (it has no checkpoint).

    The checkpoint decides and not the metrics, because a step is logged before it is saved. Raises
    UserError if the folder is in use or holds a run of another configuration.
    """
    if not (job.folder / "config.json").exists():
        return "new"
    _wait_until_free(job.folder)
    different = differences(read_settings(job.folder), as_saved(job.config))
    for key, (before, value) in different.items():
        if not _settled(key, value, before):
            raise UserError(
                f"{job.folder}: holds a run with {key}={before}, not {value}: "
                "delete the folder, or name another --out"
            )
    if read_state(job.folder) is None:
        return "restart"
    repaired = not any(map(stale, trained_weights(job.folder).values()))
    return "complete" if is_complete(job.folder) and repaired else "resume"


def _wait_until_free(folder: Path, seconds: float = 60.0) -> None:
    """Wait for a run whose sweep was killed, until it has ended its step (see start)."""
    deadline, waited = time.monotonic() + seconds, False
    with open(folder / "lock", "a", opener=no_follow) as file:
        while True:
            try:
                lock(file)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"{folder}: another process is running in it") from error
            if not waited:
                print(f"{folder}: another process is running in it: waiting up to {seconds:.0f} s")
                waited = True
            time.sleep(0.2)


def _settled(key: str, wanted, saved) -> bool:
    """Whether the wanted and the saved value of a setting can belong to the same run.

    config.json has the values that train.py chose to fit the memory, and it keeps them when it
    resumes. The place of a run does not matter.
    """
    return (
        key in ("out_dir", "resume", "resume_step")
        or (key == "rollout_weights" and wanted == "auto")
        or (key in ("micro_batch_tokens", "rollout_rows") and saved < wanted)
    )


def start(job: Job) -> None:
    """Start a run as a process that writes to its log. On the CPU it gets one thread."""
    todo = state(job)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    args = [*job.args, f"--out_dir={job.folder}"]
    if todo == "resume":
        args.append("--resume=True")
    # If all runs together had more threads than cores, threads would wait for one another.
    threads = {"OMP_NUM_THREADS": "1"} if _on_cpu(job) else {}
    with open(job.log, "w" if todo == "new" else "a") as log:
        job.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
            preexec_fn=partial(_end_with, os.getpid()) if sys.platform == "linux" else None,
        )


PR_SET_PDEATHSIG = 1  # an option of prctl on Linux


def _end_with(parent: int) -> None:
    """In the child: get SIGTERM when the parent dies, even by kill -9, so that the run saves."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent is already dead
        os.kill(os.getpid(), signal.SIGTERM)


def run_jobs(jobs: Sequence[Job], at_once: int, poll: float = 1.0) -> None:
    """Run the jobs that are not complete. Raises UserError, which names the log, if a run fails.

    All processes have ended when this returns or raises. A stopped run keeps its checkpoint.
    """
    waiting = [job for job in jobs if state(job) != "complete"]
    running: list[Job] = []
    steps = {job.folder: job.steps_done for job in jobs}
    total = sum(job.config.steps for job in jobs)
    bar = tqdm(total=total, initial=sum(steps.values()), desc=f"{len(jobs)} runs", unit="step")
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                start(waiting[0])
                running.append(waiting.pop(0))
            time.sleep(poll)
            for job in list(running):
                status = job.process.poll()
                steps[job.folder] = job.steps_done
                if status:
                    raise UserError(f"{job.log}: {_last_line(job.log)} (exit status {status})")
                if status == 0:
                    running.remove(job)
            bar.n = sum(steps.values())
            bar.refresh()
    finally:
        bar.close()
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def run_all(jobs: Sequence[Job], at_once: int, out: Path) -> None:
    """run_jobs for a command: prints what is kept. Ctrl-C, SIGTERM and SIGHUP also end the runs."""
    kept = sum(state(job) == "complete" for job in jobs)
    if kept:
        print(f"{kept} of {len(jobs)} runs are complete and kept (delete {out} to start again)")
    if kept == len(jobs):
        return
    out.mkdir(parents=True, exist_ok=True)
    # Built once here, because otherwise several runs would build it at the same time.
    for name in dict.fromkeys(job.config.model for job in jobs):
        tiny.resolve(name)
    try:
        with StopOnSignal() as stop, stop.at_once():
            run_jobs(jobs, at_once)
    except KeyboardInterrupt:
        print(f"stopped: the same command continues; logs are in {out}", file=sys.stderr)
        raise


def how_many(jobs: Sequence[Job]) -> int:
    """The number of runs at a time: one on CUDA, else one per core if the free memory allows."""
    if not all(map(_on_cpu, jobs)):
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(available_memory() / MEMORY_OF_RUN), len(jobs)))


def available_memory() -> float:
    """Bytes of memory that a new process can use, on this machine or in its container."""
    limit = device_memory(torch.device("cpu"))
    info = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: +(\d+) kB", info.read_text()) if info.is_file() else None
    return min(limit, 1024 * int(free[1])) if free else limit


def _on_cpu(job: Job) -> bool:
    device = job.config.device
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())
