"""Faults of the machine and hostile files. docs/RELIABILITY.md lists what each of them costs."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import comparable, run_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_train import weights
from transformers import LlamaForCausalLM

import eval as evaluation
import grading
import sample
import train as trainer
from eval import EvalConfig, load_for_eval
from harness import adapters, loading, states
from harness.adapters import load_adapter, save_adapter
from harness.configurator import PROJECT
from harness.errors import UserError
from harness.inputs import of_weights
from harness.leftovers import remove_leftovers
from harness.loading import load_model, load_tokenizer
from harness.runfiles import (
    PREVIOUS,
    STATE,
    UNUSED,
    over_its_base,
    read_jsonl,
    read_record,
    read_state,
    write_json,
)
from lora import add_lora, trainable
from tasks.datasets import load_completions, load_problems
from tools.parts.arms import load_arms
from train import train


@pytest.fixture
def small(tiny_random, tmp_path):
    return run_config(tiny_random, tmp_path / "run", steps=3, save_every=1, lr=1e-3)


@pytest.fixture(scope="module")
def whole(tiny_random, tmp_path_factory):
    """(metrics, weights) of the uninterrupted run of three steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    cfg = run_config(tiny_random, folder, steps=3, save_every=1, lr=1e-3)
    return comparable(train(cfg)), weights(cfg.out_dir)


def goes_on_as(whole, cfg):
    """The resumed run equals the uninterrupted one, to the bit, and so does its adapter."""
    history = train(replace(cfg, resume=True))
    assert comparable(history) == whole[0]
    assert comparable(read_jsonl(Path(cfg.out_dir) / "metrics.jsonl")) == whole[0]
    ours = weights(cfg.out_dir)
    assert all(torch.equal(v, ours[k]) for k, v in whole[1].items())
    assert read_record(f"{cfg.out_dir}/adapter")["steps_done"] == 3


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def two_states(tiny_random, tmp_path_factory):
    """A small model with an optimiser, and a folder with its states of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("states")
    model, optimizer = adapted(tiny_random)
    for step in (1, 2):
        for parameter in trainable(model).values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states.write(folder, model, optimizer, step, logged=step)
    return folder, model, optimizer


def adapted(world):
    model = load_model(world)
    add_lora(model, 4, 8)
    return model, torch.optim.AdamW(trainable(model).values(), lr=0.1)


def copy_of(folder, to):
    for name in (STATE, PREVIOUS):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_any_flipped_bit_is_noticed_and_the_state_before_is_used(two_states, tmp_path, capsys):
    folder = copy_of(two_states[0], tmp_path)
    bits = 8 * (folder / STATE).stat().st_size
    generator = torch.Generator().manual_seed(0)
    for bit in [*range(0, 64, 7), *torch.randint(bits, (200,), generator=generator).tolist()]:
        flip(folder / STATE, bit)
        path, numbers = states.choose(folder)
        out = capsys.readouterr().out
        assert path.name == PREVIOUS and numbers["steps_done"] == "1", bit
        assert str(folder / STATE) in out and "step 1" in out and out.count("\n") == 1
        flip(folder / STATE, bit)
    assert states.choose(folder)[0].name == STATE
    for name in (STATE, PREVIOUS):
        flip(folder / name, bits // 2)
    with pytest.raises(UserError, match=STATE):
        states.choose(folder)


@pytest.mark.parametrize("size", [0, 5, 100, 10_000])
def test_a_state_that_is_cut_off_is_noticed(two_states, tmp_path, size):
    folder = copy_of(two_states[0], tmp_path)
    os.truncate(folder / STATE, size)
    assert states.choose(folder)[1]["steps_done"] == "1"
    assert read_state(folder)["steps_done"] == "1"


def rewritten(change, metadata=None):
    """A function that changes the tensors of a state and drops its checksum, as an old run's."""

    def apply(path):
        tensors = change(load_file(path))
        save_file(tensors, path, metadata or {"steps_done": "2", "logged": "2"})

    return apply


def name_of(tensors, kind):
    return next(name for name in sorted(tensors) if name.startswith(kind))


def changed(kind, function):
    return lambda t: t | {name_of(t, kind): function(t[name_of(t, kind)])}


def without(kind):
    return lambda t: {name: value for name, value in t.items() if name != name_of(t, kind)}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (changed("weight", lambda v: v[:1].clone()), "weight"),  # would be broadcast
        (changed("weight", lambda v: v.double()), "float64"),
        (changed("weight", lambda v: v.to(torch.int32)), "int32"),
        (changed("exp_avg:", lambda v: v[:1].clone()), "exp_avg"),
        (changed("step", lambda v: v + 1), "step"),
        (changed("step", lambda v: v.reshape(1)), "step"),
        (without("weight"), "weight"),
        (without("exp_avg:"), "exp_avg"),
        (without("exp_avg_sq"), "exp_avg_sq"),
        (without("step"), "step"),
        (lambda t: {k: v for k, v in t.items() if k.startswith("weight")}, "exp_avg"),
        (lambda t: t | {"weight:other": torch.zeros(1)}, "other"),
    ],
)
def test_a_state_with_other_tensors_is_refused(two_states, tmp_path, tiny_random, change, word):
    folder = copy_of(two_states[0], tmp_path)
    rewritten(change)(folder / STATE)
    model, optimizer = adapted(tiny_random)
    before = [p.clone() for p in trainable(model).values()]
    with pytest.raises(UserError, match=f"{STATE}.*{word}"):
        states.restore(folder / STATE, model, optimizer, updates_per_step=1)
    assert all(map(torch.equal, before, trainable(model).values()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_used(two_states, tmp_path, capsys, value):
    folder = copy_of(two_states[0], tmp_path)
    rewritten(changed("exp_avg:", lambda v: v.index_fill(0, torch.tensor(0), value)))(
        folder / STATE
    )
    assert states.choose(folder)[1]["steps_done"] == "1"
    assert "not finite" in capsys.readouterr().out


def test_weights_that_are_not_finite_never_replace_a_good_state(tiny_random, tmp_path):
    model, optimizer = adapted(tiny_random)
    states.write(tmp_path, model, optimizer, 1, 1)
    before = (tmp_path / STATE).read_bytes()
    with torch.no_grad():
        next(iter(trainable(model).values()))[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        states.write(tmp_path, model, optimizer, 2, 2)
    assert (tmp_path / STATE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("lora_r", [4, 0])
def test_a_step_that_poisons_the_weights_costs_one_step(small, monkeypatch, lora_r):
    update = trainer.update

    def poison(model, optimizer, rollouts, *args):
        metrics = update(model, optimizer, rollouts, *args)
        if rollouts.step == 3:
            next(iter(trainable(model).values())).data[0] = float("inf")
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", poison)
        with pytest.raises(UserError, match="not finite after step 3"):
            train(replace(small, lora_r=lora_r))
    assert read_state(small.out_dir)["steps_done"] == "2"
    assert len(train(replace(small, lora_r=lora_r, resume=True))) == 3


@pytest.mark.slow
def test_a_damaged_newest_state_costs_the_steps_since_the_one_before(small, whole, capsys):
    train(replace(small, steps=2))
    folder = Path(small.out_dir)
    flip(folder / STATE, 8 * ((folder / STATE).stat().st_size - 100))
    damaged = (folder / STATE).read_bytes()
    capsys.readouterr()
    goes_on_as(whole, small)
    out = capsys.readouterr().out
    assert f"{folder / STATE}: damaged" in out and "resumed after step 1" in out
    assert (folder / UNUSED).read_bytes() == damaged


@pytest.mark.slow
def test_resume_step_goes_back_to_the_checkpoint_before(small, whole, capsys):
    train(small)
    with pytest.raises(UserError, match="resume_step=1.* 3 and 2"):
        train(replace(small, resume=True, resume_step=1))
    with pytest.raises(UserError, match="resume_step"):
        train(replace(small, out_dir=small.out_dir + "2", resume_step=1))
    goes_on_as(whole, replace(small, resume_step=2))
    assert "resumed after step 2" in capsys.readouterr().out
    train(replace(small, resume=True))  # resume_step does not stay in force
    assert "resumed after step 3" in capsys.readouterr().out


@pytest.mark.parametrize("links", [True, False])
def test_the_previous_state_is_kept(two_states, tmp_path, monkeypatch, links):
    _, model, optimizer = two_states
    if not links:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", lambda *_: exec("raise OSError"), raising=False)
    for step in (1, 2, 3):
        states.write(tmp_path, model, optimizer, step, logged=step)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {STATE, PREVIOUS}
    assert states.choose(tmp_path)[1]["steps_done"] == "3"
    assert states.choose(tmp_path, 2)[0].name == PREVIOUS


@pytest.mark.parametrize("call", ["link", "replace"])
def test_a_kill_between_two_renames_leaves_a_state(two_states, tmp_path, monkeypatch, call):
    folder, model, optimizer = two_states
    copy_of(folder, tmp_path)
    real = getattr(os, call)

    class Killed(BaseException):
        pass

    for after in (False, True):

        def killed(*args, after=after):
            if after:
                real(*args)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            with pytest.raises(Killed):
                states.write(tmp_path, model, optimizer, 3, logged=3)
        assert states.choose(tmp_path)[1]["steps_done"] in ("2", "3")
    states.write(tmp_path, model, optimizer, 3, logged=3)
    assert {path.name for path in tmp_path.iterdir()} == {STATE, PREVIOUS}
    assert states.choose(tmp_path)[1]["steps_done"] == "3"


def test_files_have_the_permissions_that_the_umask_asks_for(two_states):
    from harness.files import UMASK

    for path in two_states[0].iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~UMASK


# ------------------------------------------------------------------------------------------ inputs


def own_data(world, folder):
    """A copy of the world's training problems that a test may change."""
    path = folder / "mine.jsonl"
    lines = (Path(world) / "train.jsonl").read_text().splitlines()[:40]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("what", ["train_data", "eval_data"])
def test_other_rows_under_the_same_name_are_refused_on_resume(small, tiny_random, tmp_path, what):
    data = own_data(tiny_random, tmp_path)
    cfg = replace(small, **{what: str(data)})
    train(replace(cfg, steps=2))
    config = Path(small.out_dir, "config.json").read_text()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for change in ({"answer": "77"}, {"problem": "Start: 1 add 1?"}):
        data.write_text("".join(json.dumps(row | change) + "\n" for row in [rows[0], *rows[1:2]]))
        with pytest.raises(UserError, match=f"{what} .*mine.jsonl"):
            train(replace(cfg, resume=True))
        assert Path(small.out_dir, "config.json").read_text() == config
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(train(replace(cfg, resume=True))) == 3


def test_other_weights_under_the_same_name_are_refused_on_resume(small, tiny_random, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_random, model)
    cfg = replace(small, model=str(model))
    train(replace(cfg, steps=2))
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = name_of(tensors, "model.layers.0.mlp")
    changed = tensors | {name: tensors[name].clone()}
    changed[name][0, 0] = changed[name][0, 0].nextafter(torch.tensor(1.0))  # the last bit
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(UserError, match="resume: model"):
        train(replace(cfg, resume=True))
    save_file(tensors, file, {"format": "pt"})
    assert len(train(replace(cfg, resume=True))) == 3


def test_a_fingerprint_of_weights_does_not_depend_on_the_threads(tiny_random):
    model = load_model(tiny_random)
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.add(of_weights(model))
    torch.set_num_threads(1)
    odd = torch.nn.Linear(3, 1).bfloat16()  # 6 and 2 bytes: no whole number of 64-bit integers
    found.add(of_weights(odd))
    odd.weight.data[0, 2] += 1
    found.add(of_weights(odd))
    assert len(found) == 3


# ------------------------------------------------------------------------------------------ grader


@pytest.mark.slow
def test_a_forked_child_has_workers_of_its_own():
    """Both grade at the same time. With shared pipes one would read the other's replies."""
    pairs = [(f"n+{i}", f"{i}+n" if i % 2 else f"{i}-n") for i in range(60)]
    right = [bool(i % 2) for i in range(60)]
    with grading.Grader(workers=1) as grader:
        assert grader.grade(["x+1"], ["1+x"]) == [True]
        pids = {worker.process.pid for worker in grader._workers}
        child = os.fork()
        if not child:
            verdicts = grader.grade(*map(list, zip(*pairs, strict=True)))
            grader.close()
            os._exit(0 if verdicts == right else 1)
        shuffled = pairs[::-1]
        assert grader.grade(*map(list, zip(*shuffled, strict=True))) == right[::-1]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert {worker.process.pid for worker in grader._workers} == pids
        assert grader.errors == 0 and grader.timeouts == 0


def test_time_outs_that_come_again_and_crashes_are_counted(monkeypatch):
    replies = {"slow": ["timeout"], "gone": ["crash", "crash"], "late": ["crash", "true"]}
    with grading.Grader(workers=1) as grader:
        monkeypatch.setattr(grader, "_ask_all", lambda pairs: [replies[a[:4]] for a, _ in pairs])
        answers = ["slow+n", "slow+n", "gone+n", "late+n"]
        assert grader.grade(answers, ["n+1"] * 4) == [False, False, False, True]
        assert (grader.timeouts, grader.repeats, grader.errors) == (1, 1, 3)
        replies["gone"] = ["true"]  # a crash is not remembered as a verdict
        assert grader.grade(answers, ["n+1"] * 4) == [False, False, True, True]
        assert (grader.timeouts, grader.repeats, grader.errors) == (1, 3, 3)


def test_the_log_has_what_the_grader_failed_at(small):
    row = train(replace(small, steps=1))[0]
    assert {"grader_timeouts", "grader_repeats", "grader_crashes"} <= set(row)


# ------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    "name",
    [
        "lock",
        "config.json.tmp",
        "metrics.jsonl.tmp",
        "samples.jsonl.tmp",
        "state.safetensors.tmp",
        "state.previous.safetensors.tmp",
        "adapter/adapter_config.json.tmp",
        "adapter/adapter_model.safetensors.tmp",
        "adapter/nanorlvr.json.tmp",
        "metrics.jsonl",
        "samples.jsonl",
        "eval/step_00000.jsonl.progress",
        "eval/step_00000.jsonl.tmp",
    ],
)
def test_nothing_is_written_through_a_link_in_a_run_folder(small, tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    os.chmod(precious, 0o640)
    link = Path(small.out_dir) / name
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    cfg = replace(small, steps=2, eval_every=2)
    with contextlib.suppress(UserError):  # a lock that is a link is refused
        if name.startswith("adapter/"):  # a folder with an adapter is refused
            model, _ = adapted(cfg.model)
            save_adapter(model, link.parent, cfg.model)
            write_json(link.parent / "nanorlvr.json", {})
        else:
            train(cfg)
    assert precious.read_text() == "mine" and stat.S_IMODE(precious.stat().st_mode) == 0o640


def test_a_link_named_model_tmp_is_removed_and_not_followed(small, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes").write_text("mine")
    Path(small.out_dir).mkdir()
    (Path(small.out_dir) / "model.tmp").symlink_to(precious)
    train(replace(small, lora_r=0, steps=1))
    assert [path.name for path in precious.iterdir()] == ["notes"]
    assert (Path(small.out_dir) / "model" / "model.safetensors").exists()


# ----------------------------------------------------------------------------- hostile content

DEEP = b"[" * 100_000
ODD = {
    "binary": bytes(range(256)),
    "a list": b"[1]",
    "null": b"null",
    "deep": DEEP,
    "a deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "5,000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "text": b'"x"',
    "empty": b"",
    "NaN": b"NaN",
    "half a surrogate pair": b'{"peft_type": "\\ud800"}',
}


def one_line(function, *args):
    """Call a function that must end with a UserError of one line. Return the line."""
    with pytest.raises(UserError) as error:
        function(*args)
    line = str(error.value)
    assert line and "\n" not in line
    return line


@pytest.fixture(scope="module")
def adapter(tiny_random, tmp_path_factory):
    """The content of an adapter_config.json, and a folder with an adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted(tiny_random)[0], folder, tiny_random)
    return json.loads((folder / "adapter_config.json").read_text()), folder


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_an_odd_adapter_config_is_one_line(adapter, tiny_random, content):
    _, folder = adapter
    (folder / "adapter_config.json").write_bytes(content)
    assert str(folder) in one_line(load_adapter, load_model(tiny_random), folder)
    cfg = EvalConfig(adapter=str(folder))
    one_line(lambda: load_for_eval(over_its_base(cfg, {})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 10**30),
        ("r", True),
        ("lora_alpha", 10**400),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", True),
        ("base_model_name_or_path", 5),
        ("base_model_name_or_path", ["x"]),
        ("base_model_name_or_path", {"a": 1}),
        ("base_model_name_or_path", "x" * 300),
        ("base_model_name_or_path", "\ud800"),
        ("base_model_name_or_path", "a\0b"),
    ],
)
def test_an_odd_value_in_an_adapter_config_is_one_line(adapter, tiny_random, key, value):
    config, folder = adapter
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    cfg = EvalConfig(adapter=str(folder))
    one_line(lambda: load_for_eval(over_its_base(cfg, {})))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["a list", "deep", "binary", "5,000 digits"])
def test_an_odd_model_folder_is_one_line(tiny_random, tmp_path, file, kind):
    folder = tmp_path / "model"
    shutil.copytree(tiny_random, folder)
    (folder / file).write_bytes(ODD[kind])

    def load():
        load_tokenizer(str(folder))
        load_model(str(folder))

    if (file, kind) != ("generation_config.json", "binary"):  # which transformers ignores
        assert str(folder) in one_line(load)


DATA = {
    "deep": DEEP,
    "a deep list": b"[" + b"[" * 5000 + b"]" * 5000 + b"]",
    "5,000 digits": b'{"problem": ' + b"9" * 5000 + b', "answer": 1}',
    "surrogate": b'{"problem": "\\ud800", "answer": "1"}',
    "binary": bytes(range(256)),
    "no object": b"7",
}


@pytest.mark.parametrize("content", DATA.values(), ids=DATA)
def test_odd_data_lines_are_named(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert str(path) in one_line(load_problems, str(path), "train")
    assert str(path) in one_line(load_completions, str(path))


def test_a_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"problem": "\\ud83d\\ude00", "answer": "1"}')
    assert load_problems(str(tmp_path / "d.jsonl"), "train")[0].problem == "\N{GRINNING FACE}"


@pytest.fixture(scope="module")
def finished(tiny_random, tmp_path_factory):
    cfg = run_config(tiny_random, tmp_path_factory.mktemp("finished") / "run", steps=1)
    train(cfg)
    return cfg


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of a finished run that a test may damage, and its configuration."""
    folder = tmp_path / "damaged"
    shutil.copytree(finished.out_dir, folder)
    return folder, replace(finished, out_dir=str(folder), resume=True, steps=2)


@pytest.mark.parametrize("kind", [*ODD, "empty config", "other types"])
def test_an_odd_config_of_a_run_is_one_line(damaged, kind):
    folder, cfg = damaged
    config = json.loads((folder / "config.json").read_text())["config"]
    more = {"empty config": {}, "other types": dict.fromkeys(config, [1])}
    content = ODD[kind] if kind in ODD else json.dumps({"config": more[kind]}).encode()
    (folder / "config.json").write_bytes(content)
    for command in (evaluation.main, sample.main):
        one_line(command, [f"--run={folder}"])
    if kind != "empty config":  # an older run lacks the settings that are new
        one_line(load_arms, [folder])
        one_line(train, cfg)


@pytest.mark.parametrize("kind", ODD)
def test_odd_metrics_of_a_run_are_one_line(damaged, kind):
    folder, cfg = damaged
    (folder / "metrics.jsonl").write_bytes(ODD[kind] + b"\n")
    assert "metrics.jsonl" in one_line(train, cfg)
    one_line(load_arms, [folder])


@pytest.mark.parametrize("kind", ODD)
def test_odd_samples_and_records_are_repaired(damaged, kind):
    folder, cfg = damaged
    (folder / "samples.jsonl").write_bytes(ODD[kind] + b"\n")
    (folder / "adapter" / "nanorlvr.json").write_bytes(ODD[kind])
    train(cfg)
    assert read_record(folder / "adapter")["steps_done"] == 2
    assert read_jsonl(folder / "samples.jsonl")[0]["step"] == 2


# -------------------------------------------------------------------------------- the command line


def command(*args, **kwargs):
    """Run a command of the project. Return its exit status and what it wrote to stderr."""
    run = subprocess.run(
        [sys.executable, *args], cwd=PROJECT, capture_output=True, text=True, **kwargs
    )
    return run.returncode, run.stderr


@pytest.mark.slow
def test_data_cannot_control_the_terminal(tiny_random, tmp_path):
    row = {"problem": "a\x1b[31m", "answer": "\x1b]0;x\x07", "level": "\x1b[2J"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    model = [f"--model={tiny_random}", "--device=cpu", f"--data={tmp_path}/test.jsonl"]
    status, err = command("eval.py", *model, "--level=3")
    assert status == 2 and "level" in err and "\x1b" not in err and err.count("\n") == 1
    (tmp_path / "test.jsonl").write_text('{"pro\x1b[31mblem": "\x1b')
    assert "\x1b" not in command("eval.py", *model)[1]


@pytest.mark.slow
def test_a_name_that_is_too_long_is_one_line(tiny_random, tmp_path):
    name = "x" * 300
    world = ["model", "train_data", "eval_data"]
    for key in ("train_data", "out_dir", "model"):
        args = [f"--{k}={tiny_random}" for k in world if k != key] + [f"--{key}={name}"]
        status, err = command("train.py", "config/model/tiny.py", "--device=cpu", *args)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_debug_shows_the_traceback(debug):
    code = (
        "from harness.errors import *\ndef main(argv):\n    raise UserError(str(argv))\nrun(main)"
    )
    status, err = command("-c", code, *debug)
    assert status == 2 and err.endswith("error: []\n")
    assert ("Traceback" in err) == bool(debug)


def test_ctrl_c_during_imports_is_one_line():
    code = "import harness, os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport torch"
    status, err = command("-c", code)
    assert status == -signal.SIGINT and err == "interrupted\n"


@pytest.mark.parametrize("lora_r", [4, 0])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(small, monkeypatch, lora_r):
    """The disk is full while step 2 is saved, and free again when the run is resumed."""
    cfg = replace(small, lora_r=lora_r)
    train(replace(cfg, steps=1))
    full = SafetensorError("I/O error: No space left on device (os error 28)")

    def save_file(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise full

    def save_pretrained(self, folder):
        folder.mkdir()
        save_file({}, folder / "model.safetensors")

    for owner, name, function in (
        (adapters, "save_file", save_file),
        (LlamaForCausalLM, "save_pretrained", save_pretrained),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            if lora_r == 0 or owner is adapters:
                line = one_line(train, replace(cfg, resume=True))
                assert "No space left" in line
                saved = read_state(cfg.out_dir)["steps_done"]
                assert f"saved as of step {saved}" in line or f"checkpoint of step {saved}" in line
        left = {path.name for path in Path(cfg.out_dir).rglob("*.tmp")}
        assert not left and read_state(cfg.out_dir)["steps_done"] in ("1", "2")
    assert len(train(replace(cfg, resume=True))) == 3


# ------------------------------------------------------------------------------------ hub and cache


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def head(url, timeout):
        asked.append((url, timeout))
        raise OSError("no network")

    monkeypatch.setattr(loading, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", False)
    loading._hub_answers.cache_clear()
    started = time.monotonic()
    for load in (load_tokenizer, load_model):
        assert "nobody/nothing" in one_line(load, "nobody/nothing")
    assert time.monotonic() - started < 10 and len(asked) == 1 and asked[0][1] <= 5
    assert loading.constants.HF_HUB_OFFLINE is False
    loading._hub_answers.cache_clear()


def test_what_a_killed_build_left_is_deleted_after_a_day(tmp_path):
    names = [
        "tiny-0123abcd.abc_d123",
        "gguf-0123456789ab.q1w2e3r4",
        "tiny-0123abcd",
        "mine.abcdefgh",
    ]
    for name in (*names, "tiny_bad-0123abcd.abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text("half")
    for name in names:
        for path in (tmp_path / name / "model", tmp_path / name):
            os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"tiny-0123abcd", "mine.abcdefgh", "tiny_bad-0123abcd.abcdefgh"}
