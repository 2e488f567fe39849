"""Kill runs of the tiny world at random moments, and compare them with an uninterrupted run.

    python -m tools.kill_runs --kills=30 --in_writes=20
    python -m tools.kill_runs --kills=30 --full=True     (train all weights)

A run is started and killed by SIGKILL, resumed and killed again, until --per_run kills are done. It
is then resumed to its end. Its metrics, its last state and its adapter must equal those of the
uninterrupted run, bit for bit. --kills of them come at a random moment of the run. --in_writes come
while a checkpoint, a log or an adapter is written, before or after a random one of the calls that
create, sync, rename or delete a file in the run folder. Nothing of Python runs after SIGKILL.

Each run that is done is noted in OUT/kills.jsonl, and the same command continues from there. The
last line printed is one JSON object. The exit status is 1 if a run differs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from harness.configurator import PROJECT, configure
from harness.errors import UserError, run
from harness.files import write_whole
from harness.runfiles import STATE, read_jsonl
from tasks import tiny

TIMINGS = ("seconds", "tokens_per_s", "peak_memory", "reserved_memory", "grader")  # differ anyway


@dataclass
class KillConfig:
    """Kill runs at random moments, and compare them with an uninterrupted run."""

    kills: int = 30  # kills at a random moment
    in_writes: int = 20  # kills at a random call that writes a file
    per_run: int = 5  # kills of one run before it is let through to its end
    steps: int = 8  # steps of a run; a checkpoint after each
    full: bool = False  # train all weights instead of an adapter
    seed: int = 0  # seed of the moments
    out: str = "out/kill_runs"  # folder of the runs


# Runs in the process of the run, before train.py. Every call that changes the run folder is
# counted. The process kills itself before or after the chosen one.
KILL_IN_WRITES = """
import os, runpy, signal, sys
at, after, folder = int(sys.argv[1]), sys.argv[2] == "after", sys.argv[3]
sys.argv = ["train.py", *sys.argv[4:]]
count = 0
def watch(event, args):
    global count
    names = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.chmod")
    if event not in names or not str(args[0]).startswith(folder):
        return
    if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    count += 1
    if count >= at:
        if after:  # the call is made, and the next line of Python is the last
            sys.settrace(lambda *_: os.kill(os.getpid(), 9))
        else:
            os.kill(os.getpid(), 9)
sys.addaudithook(watch)
runpy.run_path("train.py", run_name="__main__")
"""


def arguments(cfg: KillConfig, world: str, folder: Path, resume: bool) -> list[str]:
    """The arguments of train.py for a short run in the folder."""
    values = dict(
        model=world,
        train_data=world,
        eval_data=world,
        steps=cfg.steps,
        prompts_per_step=4,
        group_size=8,
        max_new_tokens=12,
        eval_every=4,
        eval_n=8,
        eval_temperature=1.0,
        save_every=1,
        lr=1e-3,
        reward="random(0.5)",
        device="cpu",
        dtype="float32",
        threads=1,
        out_dir=folder,
        resume=resume,
    )
    values |= {"lora_r": 0} if cfg.full else {"lora_r": 4, "lora_alpha": 8}
    return ["config/model/tiny.py", *(f"--{key}={value}" for key, value in values.items())]


def start(args: list[str], log: Path, killer: list[str] | None = None) -> subprocess.Popen:
    """Start train.py. killer is (at, before or after, folder), for a kill within a write."""
    program = ["-c", KILL_IN_WRITES, *killer] if killer else ["train.py"]
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, *program, *args],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(args: list[str], log: Path) -> float:
    """Run train.py to its end. Return its seconds. Raises UserError if it fails."""
    started = time.monotonic()
    if status := start(args, log).wait():
        raise UserError(f"{log}: train.py ended with exit status {status}")
    return time.monotonic() - started


def differences(folder: Path, whole: Path) -> list[str]:
    """What differs between two finished runs: metrics by name, and files of tensors."""
    different = []
    rows, wanted = (read_jsonl(path / "metrics.jsonl") for path in (folder, whole))
    if [row["step"] for row in rows] != [row["step"] for row in wanted]:
        different.append("steps of metrics.jsonl")
    for row, other in zip(rows, wanted, strict=False):
        for key in sorted(row.keys() | other.keys()):
            if not key.startswith(TIMINGS) and row.get(key) != other.get(key):
                different.append(f"{key} at step {row['step']}")
    files = [STATE, "adapter/adapter_model.safetensors", "model/model.safetensors"]
    for name in (name for name in files if (whole / name).exists()):
        ours, theirs = load_file(folder / name), load_file(whole / name)
        same = ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
        different += [] if same else [name]
    left = [path.name for path in folder.rglob("*.tmp")]
    return different + [f"left behind: {name}" for name in left]


def killed_run(
    cfg: KillConfig, world: str, folder: Path, whole: Path, kinds: list[str], seconds: float
) -> dict:
    """Kill a run once for each of kinds ("time" or "write"), let it end, and compare it."""
    rng = random.Random(f"{cfg.seed} {folder.name}")
    shutil.rmtree(folder, ignore_errors=True)
    log, hit = folder.with_suffix(".log"), {"time": 0, "write": 0}
    for kind in kinds:
        resume = (folder / STATE).exists()
        args = arguments(cfg, world, folder, resume)
        if kind == "write":
            when = rng.choice(("before", "after"))
            killer = [str(rng.randint(1, 40)), when, f"{folder}/"]
            status = start(args, log, killer).wait()
        else:
            process = start(args, log)
            try:
                process.wait(timeout=rng.uniform(0.2, 0.7 * seconds))
            except subprocess.TimeoutExpired:
                process.kill()
            status = process.wait()
        if status not in (0, -signal.SIGKILL):
            raise UserError(f"{log}: train.py ended with exit status {status}")
        if status == 0:  # the run had ended before
            break
        hit[kind] += 1
    finish(arguments(cfg, world, folder, (folder / STATE).exists()), log)
    return {"run": folder.name, **hit, "differences": differences(folder, whole)}


def main(argv: list[str]) -> None:
    cfg, _ = configure(KillConfig, argv)
    for key in ("per_run", "steps"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    out = Path(cfg.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    settings, note = json.loads(json.dumps(vars(cfg) | {"out": ""})), out / "kills.jsonl"
    first, *rows = read_jsonl(note) or [settings]
    fixed = ("steps", "full", "seed", "per_run")
    if any(first.get(key) != settings[key] for key in fixed):
        raise UserError(f"{note}: made with other settings: name another --out")
    world, whole = out / "world", out / "whole"
    if not world.exists():
        tiny.build("tiny", world, steps=1)
    shutil.rmtree(whole, ignore_errors=True)
    seconds = finish(arguments(cfg, str(world), whole, False), out / "whole.log")
    done = {kind: sum(row[kind] for row in rows) for kind in ("time", "write")}
    while (left := kinds_left(cfg, done)) and not any(row["differences"] for row in rows):
        folder = out / f"run{len(rows)}"
        row = killed_run(cfg, str(world), folder, whole, left[: cfg.per_run], seconds)
        rows.append(row)
        write_whole(note, "".join(json.dumps(r) + "\n" for r in [settings, *rows]))
        for kind in done:
            done[kind] += row[kind]
        print(
            f"{row['run']}: {row['time']} + {row['write']} kills, {row['differences'] or 'equal'}"
        )
        if not row["differences"]:
            shutil.rmtree(folder)
    different = [row for row in rows if row["differences"]]
    print(json.dumps({"runs": len(rows), **done, "different": different}))
    if different:
        raise SystemExit(1)


def kinds_left(cfg: KillConfig, done: dict[str, int]) -> list[str]:
    """The kills that are still to do, both kinds by turns."""
    left = {"time": cfg.kills - done["time"], "write": cfg.in_writes - done["write"]}
    kinds: list[str] = []
    for i in range(max(0, *left.values())):
        kinds += [kind for kind, n in left.items() if i < n]
    return kinds


if __name__ == "__main__":
    run(main)
