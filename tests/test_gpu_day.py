"""tools/gpu_day.sh without a GPU: every command of it is one that could run."""

import os
import re
import shlex
import subprocess

import pytest
import test_gpu

from harness.configurator import PROJECT, configure
from settings import Config, check
from tools import bench

SCRIPT = (PROJECT / "tools" / "gpu_day.sh").read_text()
PARTS = re.search(r"^PARTS=\((.*)\)$", SCRIPT, re.M)[1].split()


@pytest.fixture(scope="module")
def commands():
    """The command of each part, as DRY=1 prints it."""
    run = subprocess.run(
        ["bash", PROJECT / "tools" / "gpu_day.sh", *PARTS],
        env={**os.environ, "DRY": "1", "PYTHON": "python", "MODEL": "folder"},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(re.findall(r"^== (\w+): (.*)$", run.stdout, re.M))


def words(command, start):
    """The options behind `start`, less those whose value the shell computes."""
    command = re.sub(r"\$\([^)]*\)", "$COMPUTED", command)
    return [w for w in shlex.split(command.partition(start)[2]) if "$" not in w]


def test_every_part_has_a_command(commands):
    assert list(commands) == PARTS


@pytest.mark.parametrize("part", [p for p in PARTS if p.startswith("row")])
def test_measurements_are_settings_of_bench(commands, part):
    cfg, _ = configure(bench.BenchConfig, words(commands[part], "tools.bench "))
    bench.check(cfg)


@pytest.mark.parametrize("part", ["train", "model"])
def test_training_commands_are_settings_of_train(commands, part):
    cfg, _ = configure(Config, words(commands[part], "train.py "))
    check(cfg)


def test_named_tests_exist_and_no_test_of_the_gpu_is_left_out(commands):
    names = {name for name in vars(test_gpu) if name.startswith("test_")}
    kinds = {
        "captures": {n for n in names if "captured" in n},
        "nulls": {n for n in names if "lr_0" in n},
    }
    assert all(kinds.values())
    for part, word in (("captures", "captured"), ("nulls", "lr_0")):
        assert words(commands[part], "pytest ")[-1] == word
    assert "not captured and not lr_0" in commands["tests"]
    assert names - kinds["captures"] - kinds["nulls"]


def test_what_its_python_imports_is_there():
    codes = re.findall(r"^export (\w+_CODE)='(.*?)^'", SCRIPT, re.M | re.S)
    assert len(codes) >= 3
    for name, code in codes:
        compile(code, name, "exec")
        for line in re.findall(r"^(?:from|import) .*", code, re.M):
            exec(line, {})


def test_files_it_names_are_there():
    for name in re.findall(r"[\w/.]+\.py\b", SCRIPT):
        assert (PROJECT / name).is_file(), name
