"""Several processes that share a run make the update of one process, and end together."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import comparable, run_config
from safetensors.torch import load_file

from data import partition
from engine import Generation, join
from harness import ranks
from harness.configurator import PROJECT
from harness.errors import UserError
from harness.runfiles import read_jsonl
from settings import Config
from train import train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------- sharing the work


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_each_prompt_and_micro_batch_has_one_rank(n, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: n)
    parts = partition([40, 7, 33, 8, 21, 30, 5, 5, 12, 50, 9], 3, 60, seed=1, step=2)
    shares, hands = [], []
    for number in range(n):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        shares.append(list(ranks.share(range(7))))
        hands.append(ranks.deal(parts))
    assert sum(shares, []) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for i, mini in enumerate(parts):
        assert sorted(rows for hand in hands for rows in hand[i]) == sorted(mini)
        counts = [len(hand[i]) for hand in hands]
        assert max(counts) - min(counts) <= 1


def test_joined_generations_are_padded_to_the_widest():
    def part(length, width):
        n = len(length)
        values = torch.arange(1.0, n * width + 1).view(n, width)
        tensors = (torch.ones(n), torch.tensor(length), torch.ones(n).bool())
        return Generation(values.long(), *tensors, values[:, : max(length)])

    a, b = part([1, 2], 4), part([3], 6)
    both = join([a, b])
    assert both.tokens.shape == (3, 6) and both.sampler_logp.shape == (3, 3)
    assert torch.equal(both.tokens[:2, :4], a.tokens) and (both.tokens[:2, 4:] == 0).all()
    assert torch.equal(both.tokens[2], b.tokens[0]) and both.length.tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------ the same update


def configs(world: str, folder: Path) -> dict[str, dict]:
    """Runs with several micro-batches of uneven token counts in each of two updates a step."""
    base = replace(
        run_config(world, ""),
        updates_per_step=2,
        micro_batch_tokens=90,
        prompts_per_step=5,
        group_size=4,
        lr=1e-3,
        clip_low=1e-4,
        clip_high=1e-4,
        truncated="mask",
        eval_every=2,
        eval_n=7,
        eval_temperature=1.0,
        log_tokens=True,
    )
    runs = {
        "adamw": base,
        "sgd": replace(base, optimizer="sgd", lr=0.1, kl_coef=0.1, loss_agg="seq_mean"),
        # A reward that reads scores, which each rank has computed for its rows alone
        "scores": replace(base, reward="self_certainty", whiten=True),
        "full": replace(base, lora_r=0, optimizer="sgd", lr=0.1, reward="length"),
        "null": replace(base, lr=0.0, steps=1, dtype="bfloat16", eval_every=0),
        "resumed": replace(base, steps=1),
    }
    return {name: asdict(replace(cfg, out_dir=str(folder / name))) for name, cfg in runs.items()}


def start(n: int, folder: Path, runs: list[dict]) -> None:
    """Train on each configuration in n processes."""
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    command = [*TORCHRUN, f"--nproc_per_node={n}", "tests/ranks_worker.py", str(path)]
    done = subprocess.run(command, cwd=PROJECT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def resumed(run: dict) -> dict:
    return {**run, "resume": True, "steps": 2}


@pytest.fixture(scope="module")
def folders(tiny_random, tmp_path_factory):
    """The runs of configs in 1, 2 and 3 processes. `resumed` goes on in another number of them."""
    folders = {n: tmp_path_factory.mktemp(f"ranks{n}") for n in (1, 2, 3)}
    runs = {n: configs(tiny_random, folder) for n, folder in folders.items()}
    with redirect_stdout(io.StringIO()):
        for run in (*runs[1].values(), resumed(runs[1]["resumed"])):
            train(Config(**run))
    start(2, folders[2], list(runs[2].values()))
    start(3, folders[3], [*runs[3].values(), resumed(runs[2]["resumed"])])
    with redirect_stdout(io.StringIO()):
        train(Config(**resumed(runs[3]["resumed"])))
    return folders


def close(a, b) -> bool:
    """Whether metrics agree to 1e-6, relative to the larger of 1 and their size."""
    if isinstance(a, list):
        return all(map(close, a, b))
    return a == b or (None not in (a, b) and a == pytest.approx(b, rel=1e-6, abs=1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["adamw", "sgd", "scores", "full", "resumed"])
def test_n_processes_make_the_update_of_one(folders, name, n):
    one, many = (folders[k] / name for k in (1, n))
    states = [load_file(folder / "state.safetensors") for folder in (one, many)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 8
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], rtol=1e-6, atol=1e-6), key
    logs = [comparable(read_jsonl(folder / "metrics.jsonl")) for folder in (one, many)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        assert [key for key in a if not close(a[key], b[key])] == []
    assert sum(row["clip_frac_low"] + row["clip_frac_high"] for row in logs[0][1:]) > 0
    responses = [read_jsonl(folder / "samples.jsonl") for folder in (one, many)]
    assert [r["response"] for r in responses[0]] == [r["response"] for r in responses[1]]
    for a, b in zip(*responses, strict=True):
        assert close(a["entropy"], b["entropy"]) and close(a["log_ratio"], b["log_ratio"])
    if name == "adamw":  # a random reward, the same to the bit
        assert [r["reward"] for r in responses[0]] == [r["reward"] for r in responses[1]]
        assert [m.get("reward") for m in logs[0]] == [m.get("reward") for m in logs[1]]
    evals = [sorted((folder / "eval").iterdir()) for folder in (one, many)]
    rows = [[row for path in paths for row in read_jsonl(path)] for paths in evals]
    for a, b in zip(*rows, strict=True):
        assert a.pop("logprob") == pytest.approx(b.pop("logprob"), abs=1e-3)  # logged in 4 decimals
        assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_the_first_ratio_is_exactly_1_on_every_rank(folders, n):
    """In bf16, where an update on other micro-batches than the scored ones would show."""
    (row,) = read_jsonl(folders[n] / "null" / "metrics.jsonl")
    assert row["ratio_mean"] == row["ratio_max"] == 1 and row["grad_norm"] > 0
    assert row["clip_frac_low"] == row["clip_frac_high"] == 0


def test_weights_that_differ_between_ranks_are_an_error(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda value: [value, value])
    ranks.check_equal(weights)
    monkeypatch.setattr(ranks, "gather", lambda value: [value, value + 1e-9])
    with pytest.raises(UserError, match="5.0"):
        ranks.check_equal(weights)


# ---------------------------------------------------------------------------------- ending together


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_text()
    return int(re.search(r"\0RANK=(\d+)", environment)[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "torchrun"])
def test_a_rank_that_dies_ends_the_others(tiny_random, tmp_path, victim):
    """By kill -9 of a rank, or TERM to torchrun. The last complete step is saved by rank 0."""
    cfg = asdict(run_config(tiny_random, tmp_path / "run", steps=1000))
    given = [f"--{key}={value}" for key, value in cfg.items() if value != getattr(Config, key)]
    command = [*TORCHRUN, "--nproc_per_node=2", "train.py", *given]
    metrics, err = tmp_path / "run" / "metrics.jsonl", tmp_path / "err"
    with open(err, "w") as file:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=ENV, stdout=subprocess.DEVNULL, stderr=file
        )
    while len(read_jsonl(metrics)) < 2:
        assert process.poll() is None, err.read_text()[-2000:]
        time.sleep(0.1)
    pids = {rank_of(pid): pid for pid in children(process.pid)}
    began = time.monotonic()
    if victim == "torchrun":
        process.terminate()
    else:
        os.kill(pids[int(victim[-1])], signal.SIGKILL)
    assert process.wait(timeout=60) != 0 and time.monotonic() - began < 30
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    ours = re.findall(r"^(?:error|stopped): .*$", err.read_text(), re.MULTILINE)
    assert len(ours) == 1
    if victim != "rank 0":
        done = len(read_jsonl(metrics))
        assert f"step {done}" in ours[0]
        state = load_file(tmp_path / "run" / "state.safetensors")
        assert state[next(k for k in state if k.startswith("step:"))] == done * 8


@pytest.mark.slow
def test_an_error_of_every_rank_is_one_line(tiny_random, tmp_path):
    path = tmp_path / "runs.json"
    cfg = run_config(tiny_random, tmp_path / "run", prompts_per_step=2)
    path.write_text(json.dumps([asdict(cfg)]))
    command = [*TORCHRUN, "--nproc_per_node=3", "tests/ranks_worker.py", str(path)]
    done = subprocess.run(command, cwd=PROJECT, env=ENV, capture_output=True, text=True)
    assert len(re.findall("^error: .*prompts_per_step=2", done.stderr, re.MULTILINE)) == 1
    assert not (tmp_path / "run").exists()
