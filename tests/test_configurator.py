"""configurator.py: what may be written, what wins, and how a mistake is named."""

import errno
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from harness import configurator
from harness.configurator import configure, format_config
from harness.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Settings:
    """Settings for these tests.

    This paragraph is not printed.
    """

    # Optimiser
    lr: float = 1e-5  # step size, AdamW
    steps: int = 10  # optimiser steps # at most
    betas: tuple[float, float] = (0.9, 0.95)
    # Clip
    clip_low: float = 0.2  # lower side
    clip_high: float = 0.2
    arm: Literal["both", "high", "none"] = "both"
    # Rest
    model: str = "tiny"
    fast: bool = False
    cap: float | None = None
    note: str | None = None
    seeds: tuple[int, ...] = (1,)
    k: Literal[1, 2] = 1

    def check(self) -> None:  # not a setting
        pass


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write("config/a.py", text): a file under an empty working folder that is the project too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configurator, "PROJECT", tmp_path)

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write_file


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        configure(Settings, list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_precedence_does_not_depend_on_the_order_typed(write):
    write("config/model/big.py", "lr = 1.0\nsteps = 1\nclip_low = 0.1\nmodel = 'big'")
    write("config/one.py", "lr = 2.0\nsteps = 2\nclip_low = 0.2")
    write("config/two.py", "lr = 3.0\nsteps = 3")
    argv = ["config/model/big.py", "config/one.py", "config/two.py", "--lr=4"]
    for order in itertools.permutations(argv):
        cfg, sources = configure(Settings, list(order))
        files = [a for a in order if a in argv[1:3]]
        assert cfg.lr == 4 and cfg.model == "big" and cfg.clip_low == 0.2 and cfg.clip_high == 0.2
        assert cfg.steps == (3 if files[-1].endswith("two.py") else 2)  # later of the experiments
        assert sources.experiments == [Path(f).stem for f in files] and sources.scale == "big"
        assert sources.given == {"lr": 4.0, "steps": cfg.steps, "clip_low": 0.2}
        assert sources.origin["lr"] == "command line" and sources.origin["steps"] == files[-1]
        assert sources.origin["model"] == "config/model/big.py"
        assert sources.origin["fast"] == "default" and sources.reason == ""


def test_default_scale_lies_under_everything_named_and_only_where_none_is(write):
    write("config/model/small.py", "lr = 1.0\nsteps = 1")
    write("config/one.py", "lr = 2.0")
    seen = []

    def choose(values):
        seen.append(values)
        return "config/model/small.py", "no GPU here"

    cfg, sources = configure(Settings, ["config/one.py", "--fast=True"], choose)
    assert (cfg.lr, cfg.steps, cfg.fast) == (2.0, 1, True)
    assert seen == [{"lr": 2.0, "fast": True}]
    assert (sources.scale, sources.reason) == ("small", "no GPU here")

    cfg, sources = configure(Settings, ["--lr=5"], lambda values: ({"lr": 3, "steps": 4}, "why"))
    assert (cfg.lr, cfg.steps, sources.scale, sources.reason) == (5.0, 4, "", "why")

    _, sources = configure(Settings, ["config/model/small.py"], choose)
    assert len(seen) == 1 and sources.reason == ""


def test_scale_twice_and_key_twice_are_refused(write):
    a, b = write("config/model/a.py", ""), write("config/model/b.py", "")
    assert "config/model/a.py" in refused(a, b)
    assert "lr" in refused("--lr=1", "--lr=1")
    name = write("config/x.py", "lr = 1\n\nlr = 2")
    assert refused(name).startswith("config/x.py:3: lr")


def test_files_are_found_from_any_folder_and_the_working_folder_comes_first(write, monkeypatch):
    write("config/one.py", "steps = 7")
    write("away/here.txt", "")
    monkeypatch.chdir("away")
    assert configure(Settings, ["config/one.py"])[0].steps == 7
    write("away/config/one.py", "steps = 8")
    assert configure(Settings, ["config/one.py"])[0].steps == 8
    write("away/model/m.py", "steps = 9")
    monkeypatch.chdir("model")
    assert configure(Settings, ["m.py"])[1].scale == "m"  # its folder counts, not what was typed


def test_missing_file_names_the_nearest(write):
    write("config/random_reward.py", "")
    write("config/model/tiny.py", "")
    assert "config/random_reward.py" in refused("config/random_rewards.py")
    assert "config/random_reward.py" in refused("random")
    assert "config/model/tiny.py" in refused("tiny")
    assert "no such config file" in refused("config")  # a folder


def test_nothing_in_a_config_file_is_run(write):
    for text in (
        "import os",
        "open('made', 'w')",
        "steps = len(open('made', 'w').name)",
        "steps = [n for n in (1, 2)]",
        "steps = 1 if True else 2",
        "steps = 2 ** 9",
        "steps = 1 + 1",
        "model = 'a' * 3",
        "model = f'{1}'",
        "model = b'a'",
        "lr = steps = 1",
        "lr, steps = 1, 2",
        "lr: float = 1",
        "lr += 1",
        "model.name = 1",
        "steps = -'1'",
        "if True:\n    lr = 1",
        "lr = {}",
        "lr = 1e-5j",
        "lr =",
        "model = 'a\\mb'",
        "steps = 64 * 1024",
        "lr = " + "(" * 5000 + "1" + ")" * 5000,
    ):
        name = write("config/bad.py", "# a comment\n\n" + text)
        message = refused(name)
        assert message.startswith("config/bad.py:"), text
        assert message.startswith("config/bad.py:3") or "too " in message, message
    assert not Path("made").exists()


def test_what_a_config_file_may_hold(write):
    name = write(
        "config/good.py",
        '"""What it is for."""\n'
        "lr = -2e-3  # a comment\n"
        "steps = 65_536\n"
        "betas = [0.5, 1]\n"
        "seeds = (1, 2_000, 3e3)\n"
        "arm = 'none'\nfast = True\ncap = None\nnote = 'a' 'b'\n",
    )
    cfg, _ = configure(Settings, [name])
    assert cfg == Settings(
        -2e-3, 65536, (0.5, 1.0), arm="none", fast=True, note="ab", seeds=cfg.seeds
    )
    assert cfg.seeds == (1, 2000, 3000) and all(type(seed) is int for seed in cfg.seeds)
    assert type(cfg.betas[1]) is float


def test_a_base_file_is_read_first(write):
    write("config/study/grandparent.py", "lr = 1.0\nsteps = 1\nmodel = 'g'")
    write("config/study/parent.py", "base = 'grandparent.py'\nlr = 2.0\nsteps = 2")
    name = write("config/study/child.py", "lr = 3.0\nbase = 'parent.py'")
    cfg, sources = configure(Settings, [name])
    assert (cfg.lr, cfg.steps, cfg.model) == (3.0, 2, "g")
    assert sources.given == {"lr": 3.0, "steps": 2, "model": "g"}
    assert sources.origin["steps"] == name
    write("config/model/big.py", "steps = 9\nclip_low = 0.1")
    scale = write("config/model/bigger.py", "base = 'big.py'\nsteps = 10")
    cfg, _ = configure(Settings, [scale, name])
    assert (cfg.steps, cfg.clip_low) == (2, 0.1)


def test_a_wrong_base_is_refused_by_name(write):
    write("config/a.py", "base = 'b.py'")
    name = write("config/b.py", "lr = 1.0\nbase = 'a.py'")
    assert "circle" in refused(name) and "a.py" in refused(name)
    assert refused(write("config/c.py", "\nbase = 'none.py'")).startswith("config/c.py:2: ")
    assert refused(write("config/d.py", "base = 3")).startswith("config/d.py:1: base ")
    assert "base" in refused("--base=a.py")


def test_unknown_keys_are_refused_with_the_nearest_name(write):
    name = write("config/typo.py", "lr = 1\nclip_hihg = 0.3")
    message = refused(name)
    assert message.startswith("config/typo.py:2: ") and "did you mean clip_high" in message
    assert "did you mean steps" in refused("--step=3")
    assert "clip_low or clip_high" in refused("--clip=3")
    assert "did you mean clip_high" in refused("--clip-high=3")
    assert "did you mean lr" in refused("--LR=3")
    assert "--help" in refused("--zzz=3")
    assert "--help" in refused("--=3") and "--help" in refused("--")
    assert "unknown key" in refused("--check=1")  # a method


def test_how_to_write_an_option():
    assert "--lr=VALUE" in refused("--lr")
    assert "--lr=3" in refused("--lr", "3")
    assert "--lr=3" in refused("-lr", "3")
    assert "--lr=3" in refused("-lr=3")
    assert "--lr=3" in refused("lr=3")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--steps=1e5", 100_000),
        ("--steps=1_000", 1000),
        ("--steps=-3", -3),
        ("--lr=3", 3.0),
        ("--lr=-1e-6", -1e-6),
        ("--fast=true", True),
        ("--fast=False", False),
        ("--model=a/b-1.5", "a/b-1.5"),
        ("--model='a b'", "a b"),
        ('--model="1"', "1"),
        ("--model=1e5", "1e5"),
        ("--model=none", "none"),
        ("--model=True", "True"),
        ("--model=", ""),
        ("--model=a=b", "a=b"),
        ("--model=\\boxed{}, (x)", "\\boxed{}, (x)"),
        ("--arm=none", "none"),
        ("--k=2", 2),
        ("--cap=none", None),
        ("--cap=None", None),
        ("--cap=12", 12.0),
        ("--note=None", None),
        ("--note=12", "12"),
        ("--betas=0.8,0.9", (0.8, 0.9)),
        ("--betas=(0.8, 0.9)", (0.8, 0.9)),
        ("--seeds=3", (3,)),
        ("--seeds=3,4,5", (3, 4, 5)),
    ],
)
def test_command_line_values(argument, expected):
    key = argument[2:].partition("=")[0]
    value = getattr(configure(Settings, [argument])[0], key)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "argument",
    [
        "--steps=1.5",
        "--steps=True",
        "--steps=ten",
        "--steps=",
        "--steps=1e999",
        "--lr=nan",
        "--lr=inf",
        "--lr=1e999",
        "--lr=1" + "0" * 400,
        "--lr=1,",
        "--lr=True",
        "--lr=None",
        "--fast=1",
        "--fast=yes",
        "--arm=BOTH!",
        "--betas=0.9",
        "--betas=0.9,x",
        "--betas=1,2,3",
        "--cap=x",
        "--seeds=1,2.5",
    ],
)
def test_refused_values_name_the_argument_and_the_key(argument):
    message = refused(argument)
    key = argument[2:].partition("=")[0]
    assert message.startswith(f"{argument}: {key} ")


def test_refused_values_in_files_name_file_and_line(write):
    for text, word in [
        ("steps = True", "whole number"),
        ("steps = 1.5", "whole number"),
        ("steps = '3'", "whole number"),
        ("lr = 1e999", "finite"),
        ("lr = '1e-5'", "number"),
        ("fast = 1", "True or False"),
        ("model = 3", "text in quotes"),
        ("arm = 'bth'", "did you mean both?"),
        ("k = True", "one of 1, 2"),
        ("betas = 0.9", "float,float"),
        ("betas = (0.9,)", "2 values"),
        ("cap = 'x'", "number"),
    ]:
        message = refused(write("config/bad.py", "\n" + text))
        assert message.startswith("config/bad.py:2: ") and word in message, message


def test_unreadable_files_are_named(write, tmp_path):
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00 = 1")
    assert refused("bytes.py").startswith("bytes.py: ")
    write("null.py", "lr = 1\x00")
    assert refused("null.py").startswith("null.py")
    write("bom.py", "\ufefflr = 1")
    assert configure(Settings, ["bom.py"])[0].lr == 1


def test_format_config_is_a_config_file_again(write):
    argv = ["--betas=0.1,0.2", "--cap=none", "--model=a'b # \"c", "--steps=1e3"]
    cfg, sources = configure(Settings, argv)
    text = format_config(cfg, sources)
    again, _ = configure(Settings, [write("saved.py", text)])
    assert again == cfg
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["steps"].endswith("# command line") and "#" not in lines["lr"]
    assert len({line.index(" = ") for line in lines.values()}) == 1  # aligned


def test_help_prints_every_setting_with_its_comment(capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            configure(Settings, ["--lr", flag])
        assert caught.value.code == 0
    lines = capsys.readouterr().out.split("usage:")[1].splitlines()
    assert "Settings for these tests." in lines and "not printed" not in " ".join(lines)
    by_key = {line.split("=")[0].strip(): line for line in lines if line.startswith("  --")}
    assert [key[2:] for key in by_key] == list(Settings.__dataclass_fields__)
    assert by_key["--lr"].split() == ["--lr=1e-05", "(float)", "step", "size,", "AdamW"]
    assert by_key["--steps"].endswith("optimiser steps # at most")
    assert by_key["--betas"].split() == ["--betas=0.9,0.95", "(float,float)"]
    assert "both|high|none" in by_key["--arm"] and "float or none" in by_key["--cap"]
    assert lines[lines.index(by_key["--clip_low"]) - 1] == "Clip"


# ---- run: how a program ends


def script(body: str, **kwargs) -> subprocess.CompletedProcess:
    code = f"from harness.errors import *\ndef main(argv):\n    {body}\nrun(main)"
    command = [sys.executable, "-c", code, "an argument"]
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # buffered, as users have it
    return subprocess.run(command, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE, **kwargs)


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("assert argv == ['an argument']", 0, ""),
        ("raise UserError('a.py:3: no')", 2, "error: a.py:3: no\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        (f"raise OSError({errno.ENOSPC}, 'No space', 'f.bin')", 2, "error: the disk is full"),
    ],
)
def test_run_ends_with_one_line(body, status, line):
    done = script(body)
    assert done.returncode == status
    assert done.stderr.startswith(line) and done.stderr.count("\n") == bool(line)


def test_run_keeps_the_traceback_of_a_fault_of_ours():
    for body in ("raise ValueError('a bug')", "raise FileNotFoundError(2, 'a bug')"):
        done = script(body)
        assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


def test_run_into_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = script("print('x' * 100_000)", stdout=writer)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_run_onto_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = script("print('x')", stdout=full)
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full")
    assert done.stderr.count("\n") == 1
