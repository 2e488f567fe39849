"""tools.kill_runs and tools.fuzz_parsers: that they find a fault, and a short run of each."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.errors import UserError
from harness.runfiles import STATE
from tools import fuzz_parsers, kill_runs


@pytest.mark.parametrize("name", fuzz_parsers.PARSERS)
def test_no_random_input_breaks_a_parser(tmp_path, name):
    cfg = fuzz_parsers.FuzzConfig(n=200, seed=7)
    assert fuzz_parsers.fuzz(name, cfg, tmp_path) == []


def test_the_fuzzer_sees_every_kind_of_fault():
    def raises(error):
        def call():
            raise error

        return call

    assert "KeyError" in fuzz_parsers.fault_of(raises(KeyError("x")), 5)
    assert "RecursionError" in fuzz_parsers.fault_of(raises(RecursionError()), 5)
    assert "took" in fuzz_parsers.fault_of(lambda: sum(range(10**5)), 1e-9)
    assert fuzz_parsers.fault_of(raises(UserError("a\nb")), 5) == ""  # printed as one line
    assert fuzz_parsers.fault_of(lambda: None, 5) == ""


@pytest.mark.slow
def test_killed_in_writes_and_equal(tiny_random, tmp_path):
    cfg = kill_runs.KillConfig(steps=2)
    whole, folder = tmp_path / "whole", tmp_path / "run0"
    kill_runs.finish(kill_runs.arguments(cfg, tiny_random, whole, False), tmp_path / "log")
    row = kill_runs.killed_run(cfg, tiny_random, folder, whole, ["write"], 1.0)
    assert row == {"run": "run0", "time": 0, "write": 1, "differences": []}
    # A difference in a log, in the weights, or a file that was left behind is found.
    state = load_file(folder / STATE)
    name = sorted(state)[-1]
    save_file(state | {name: torch.nextafter(state[name], torch.tensor(9.0))}, folder / STATE)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["reward"] += 1e-9
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "x.tmp").touch()
    found = kill_runs.differences(folder, whole)
    assert found == ["reward at step 2", STATE, "left behind: x.tmp"]


def test_both_kinds_of_kills_come_by_turns():
    cfg = kill_runs.KillConfig(kills=2, in_writes=3)
    kinds = kill_runs.kinds_left(cfg, {"time": 0, "write": 0})
    assert kinds == ["time", "write", "time", "write", "write"]
    assert kill_runs.kinds_left(cfg, {"time": 2, "write": 3}) == []
