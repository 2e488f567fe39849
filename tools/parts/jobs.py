"""Training runs as processes of train.py, some at a time, each in a folder it can be resumed in.

What tools.demo and tools.sweep share. A run that is complete is kept, one that was stopped goes on
from its checkpoint, and one of another configuration is refused.
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
from harness.locks import lock
from harness.plan import device_memory
from harness.runfiles import (
    is_complete,
    read_config,
    read_jsonl,
    read_state,
    stale,
    trained_weights,
)
from harness.scale import choose_scale
from harness.stopping import StopOnSignal
from settings import Config
from tasks import tiny
from tools.parts.arms import as_saved, differences

LIBC = ctypes.CDLL(None)
MEMORY_OF_RUN = 1.5e9  # bytes of a run of the tiny world, libraries included, rounded up


@dataclass
class Job:
    """One run: its folder, its train.py arguments (out_dir excepted), its process once started."""

    folder: Path
    args: list[str]
    process: subprocess.Popen | None = None

    @cached_property
    def config(self) -> Config:
        """What train.py will make of the arguments. Raises UserError where they are wrong."""
        return configure(Config, [*self.args, f"--out_dir={self.folder}"], choose_scale)[0]

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def steps_done(self) -> int:
        rows = read_jsonl(self.folder / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0


def state(job: Job) -> str:
    """What is to be done with a run: "new", "resume", "complete", or "restart" (no checkpoint).

    The run's state decides, not its metrics, since a step is logged before it is saved. Raises
    UserError where the folder is in use or holds a run of another configuration.
    """
    if not (job.folder / "config.json").exists():
        return "new"
    _wait_until_free(job.folder)
    different = differences(read_config(job.folder), as_saved(job.config))
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
    """Wait while a run whose sweep was killed ends its step (see start)."""
    deadline, waited = time.monotonic() + seconds, False
    with open(folder / "lock", "a") as file:
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
    """Whether two values mean the same run: config.json has what memory allowed of what was asked
    (train.py keeps to it when it resumes), and where a run lies says nothing of it."""
    return (
        key in ("out_dir", "resume")
        or (key == "rollout_weights" and wanted == "auto")
        or (key in ("micro_batch_tokens", "rollout_rows") and saved < wanted)
    )


def start(job: Job) -> None:
    """Start a run as a process of its own, its output going to the log; on the CPU on one core."""
    todo = state(job)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    args = [*job.args, f"--out_dir={job.folder}", *["--resume=True"] * (todo == "resume")]
    # more threads than cores in all would wait for one another
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


PR_SET_PDEATHSIG = 1  # of Linux' prctl


def _end_with(parent: int) -> None:
    """In the child: get TERM when the parent dies, also by kill -9. The run then saves and ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has died already
        os.kill(os.getpid(), signal.SIGTERM)


def run_jobs(jobs: Sequence[Job], at_once: int, poll: float = 1.0) -> None:
    """Run what is not complete. Raises UserError naming the log of a run that fails.

    However this ends, no process is left behind; a run that was stopped keeps its checkpoint.
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
    """run_jobs for a command line: says what is kept; Ctrl-C, TERM and HUP end the runs, too."""
    kept = sum(state(job) == "complete" for job in jobs)
    if kept:
        print(f"{kept} of {len(jobs)} runs are complete and kept (delete {out} to start anew)")
    if kept == len(jobs):
        return
    out.mkdir(parents=True, exist_ok=True)
    # built once, before several runs would each do it
    for name in dict.fromkeys(job.config.model for job in jobs):
        tiny.resolve(name)
    try:
        with StopOnSignal() as stop, stop.at_once():
            run_jobs(jobs, at_once)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on, logs are in {out}", file=sys.stderr)
        raise


def how_many(jobs: Sequence[Job]) -> int:
    """Runs at a time: one on CUDA; else one a core, as far as the free memory reaches."""
    if not all(map(_on_cpu, jobs)):
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(available_memory() / MEMORY_OF_RUN), len(jobs)))


def available_memory() -> float:
    """Bytes of memory that a new process can have, of this machine or of its container."""
    limit = device_memory(torch.device("cpu"))
    info = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: +(\d+) kB", info.read_text()) if info.is_file() else None
    return min(limit, 1024 * int(free[1])) if free else limit


def _on_cpu(job: Job) -> bool:
    device = job.config.device
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())
