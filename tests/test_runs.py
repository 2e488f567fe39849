"""What can go wrong around a run: kills, signals, damage, bad rewards, bad model folders."""

import builtins
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import comparable, run_config
from safetensors.torch import load_file, save_file
from test_train import weights

import eval as evaluation
import rewards
import sample
import train as trainer
from harness.adapters import load_adapter, save_adapter
from harness.configurator import PROJECT
from harness.errors import UserError, run
from harness.loading import load_model, load_tokenizer
from harness.runfiles import read_jsonl, read_record, read_state
from harness.stopping import LastStep, StopOnSignal
from lora import add_lora, trainable
from train import train

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tiny_random, tmp_path):
    """Four steps of 32 rollouts, a checkpoint only where one is due, evals at 0, 2 and 4."""
    cfg = run_config(tiny_random, tmp_path / "run")
    return replace(cfg, steps=4, eval_every=2, eval_temperature=1.0, lr=1e-3)


@pytest.fixture(scope="module")
def whole(tiny_random, tmp_path_factory):
    """(metrics, weights) of the uninterrupted run."""
    cfg = run_config(tiny_random, tmp_path_factory.mktemp("whole") / "run")
    history = train(replace(cfg, steps=4, eval_every=2, eval_temperature=1.0, lr=1e-3))
    return comparable(history), weights(cfg.out_dir)


def goes_on_as(whole, cfg):
    """The resumed run equals the uninterrupted one, to the bit."""
    history = train(replace(cfg, resume=True))
    rows = read_jsonl(Path(cfg.out_dir) / "metrics.jsonl")
    assert comparable(history) == comparable(rows) == whole[0]
    ours = weights(cfg.out_dir)
    assert all(torch.equal(v, ours[k]) for k, v in whole[1].items())
    adapter = Path(cfg.out_dir) / "adapter"
    assert read_record(adapter)["steps_done"] == cfg.steps
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, value in saved.items():
        name = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(value, ours[f"weight:{name}"])


class Killed(BaseException):
    """Stands for kill -9: whatever would be saved on the way out is not."""


def killed(monkeypatch, cfg, owner, name, call=1, after=False):
    """Run cfg; at the call-th call of owner.name it is as if the process had been killed."""
    real, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        patch.setattr(trainer.LastStep, "__exit__", lambda *_: None)
        with pytest.raises(Killed):
            train(cfg)


# ------------------------------------------------------------------------------- state and weights


@pytest.mark.parametrize("call", [1, 2])
def test_killed_between_state_and_adapter(small, whole, monkeypatch, capsys, call):
    """Also at the last step, where nothing is left to train: eval warns, resuming repairs."""
    from harness import checkpoint

    killed(monkeypatch, small, checkpoint, "save_adapter", call)
    assert read_state(small.out_dir)["steps_done"] == str(2 * call)
    if call == 2:
        capsys.readouterr()
        for command in (evaluation.main, sample.main):
            command([f"--run={small.out_dir}"])
            out = capsys.readouterr().out
            assert f"--out_dir={small.out_dir} --resume=True" in out and "warning" in out
    goes_on_as(whole, small)
    capsys.readouterr()
    evaluation.main([f"--run={small.out_dir}"])
    assert "warning" not in capsys.readouterr().out


def test_a_finished_run_repairs_its_weights(small):
    cfg = replace(small, steps=2, lora_r=0)
    train(cfg)
    record = Path(cfg.out_dir) / "model" / "nanorlvr.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"steps_done": 1}))
    before = load_file(f"{cfg.out_dir}/model/model.safetensors")
    train(replace(cfg, resume=True))
    assert read_record(record.parent)["steps_done"] == 2
    after = load_file(f"{cfg.out_dir}/model/model.safetensors")
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not (Path(cfg.out_dir) / "model.tmp").exists()


# ----------------------------------------------------------------------------------- order of eval


def test_killed_in_the_last_eval_costs_no_step_and_no_completion(small, whole, monkeypatch):
    """It goes on where it was: what was kept is not sampled again."""
    killed(monkeypatch, small, evaluation.Kept, "add", 26, after=True)  # 10 at step 0, 10 at 2
    assert read_state(small.out_dir)["steps_done"] == "4"
    rows = read_jsonl(Path(small.out_dir) / "metrics.jsonl")
    assert rows[-1]["step"] == 4 and "eval_accuracy" not in rows[-1]
    asked = []
    generate = evaluation.generate
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda m, prompts, *a, **k: (asked.append(len(prompts)), generate(m, prompts, *a, **k))[1],
    )
    goes_on_as(whole, small)
    assert asked == [4]
    assert not list((Path(small.out_dir) / "eval").glob("*.progress"))


def test_eval_on_the_command_line_goes_on_and_equals_an_uninterrupted_one(
    tiny_random, tmp_path, monkeypatch, capsys
):
    args = [
        f"--model={tiny_random}",
        f"--data={tiny_random}",
        "--prompt=none",
        "--n=12",
        "--k=3",
        "--temperature=1",
        "--max_prompt_tokens=32",
        "--max_new_tokens=8",
    ]
    evaluation.main([*args, f"--out={tmp_path}/a"])
    add, calls = evaluation.Kept.add, []

    def stop(*a):
        calls.append(add(*a))
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Kept, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluation.main([*args, f"--out={tmp_path}/b"])
    progress = tmp_path / "b" / "completions.jsonl.progress"
    with progress.open("a") as file:
        file.write('{"i": 11, "comp')  # cut off
    evaluation.main([*args, f"--out={tmp_path}/b"])
    assert "5 of 12 problems were done" in capsys.readouterr().out
    a, b = ((tmp_path / name / "completions.jsonl").read_text() for name in "ab")
    assert a == b and not progress.exists()


def test_completions_of_other_settings_are_not_kept(tmp_path):
    from harness.partial import Kept

    with Kept(tmp_path / "c", {"seed": 0}) as kept:
        kept.add(3, ["x"], ["stop"])
        with pytest.raises(UserError, match="c.progress"):
            Kept(tmp_path / "c", {"seed": 0})
    with Kept(tmp_path / "c", {"seed": 0}) as kept:
        assert kept.rows == {3: {"completions": ["x"], "finish_reason": ["stop"]}}
    with Kept(tmp_path / "c", {"seed": 1}) as kept:
        assert kept.rows == {}


# -------------------------------------------------------------------------------------------- logs


def drop(*steps):
    return lambda rows: [row for row in rows if row["step"] not in steps]


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: [],
        drop(0),
        drop(1),
        drop(2),
        drop(0, 1),
        lambda rows: [*rows, rows[-1]],
        lambda rows: [rows[0], "damaged", *rows[1:]],
    ],
)
def test_damaged_metrics_are_refused(small, damage):
    cfg = replace(small, steps=2)
    train(cfg)
    path = Path(cfg.out_dir) / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in damage(read_jsonl(path))))
    config = (path.parent / "config.json").read_text()
    with pytest.raises(UserError, match="metrics.jsonl") as error:
        train(replace(cfg, steps=4, resume=True))
    assert "\n" not in str(error.value)
    assert (path.parent / "config.json").read_text() == config


def test_a_folder_without_a_state_is_started_again_and_its_logs_kept(
    small, whole, monkeypatch, capsys
):
    cfg = replace(small, eval_every=0, save_every=0)
    for n in (1, 2):
        killed(monkeypatch, cfg, trainer, "update", 3)
        (Path(cfg.out_dir) / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="without --resume"):
            train(replace(cfg, resume=True))
        assert len(read_jsonl(Path(cfg.out_dir) / "metrics.jsonl")) == 2
        assert len(list(Path(cfg.out_dir).glob("interrupted-*"))) == n - 1
    train(cfg)
    for n in (1, 2):
        aside = Path(cfg.out_dir) / f"interrupted-{n}"
        assert f"interrupted-{n}" in capsys.readouterr().out or n == 2
        assert len(read_jsonl(aside / "metrics.jsonl")) == 2 and (aside / "config.json").exists()
    assert (Path(cfg.out_dir) / "notes.txt").read_text() == "mine"
    os.unlink(f"{cfg.out_dir}/state.safetensors")
    with pytest.raises(UserError, match="holds a run"):  # its adapter is worth something
        train(cfg)


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("where", ["sample_rollouts", "update", "evaluate"])
def test_a_signal_ends_the_step_and_saves(small, whole, monkeypatch, number, where):
    real, calls = getattr(trainer, where), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            if where == "update":
                os.kill(os.getpid(), signal.SIGTERM)  # batch systems repeat themselves
        return real(*args, **kwargs)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, where, function)
        patch.setattr(sys, "argv", ["train.py"])
        with pytest.raises(SystemExit) as end:
            run(lambda argv: train(small))
    assert end.value.code == 128 + number
    assert read_state(small.out_dir)["steps_done"] == "2"
    assert {s: signal.getsignal(s) for s in before} == before
    goes_on_as(whole, small)


def test_nohup_goes_on_without_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupted(function, call=1):
    """The function, with Ctrl-C pressed as its call-th call returns."""
    calls = []

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    return wrapped


@pytest.mark.parametrize("lora_r", [4, 0])
def test_an_interruption_right_after_a_checkpoint_keeps_it(
    small, whole, monkeypatch, capsys, lora_r
):
    cfg = replace(small, lora_r=lora_r)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.LastStep, "save", interrupted(trainer.LastStep.save))
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    assert read_state(cfg.out_dir)["steps_done"] == "2"
    err = capsys.readouterr().err
    assert "saved as of step 2" in err and "lost" not in err
    if lora_r:
        goes_on_as(whole, small)


@pytest.mark.parametrize("where", ["save", "copy", "update"])
def test_the_last_complete_step_is_saved_whatever_is_interrupted(tiny_random, capsys, where):
    """While step 2 is saved, while it is copied before that, and in the update of step 3."""
    model = load_model(tiny_random)
    add_lora(model, 4, 8)
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    weights, saved = {}, []

    def save(step):
        saved.append((step, [p.detach().clone() for p in parameters]))

    class Interrupting(torch.nn.Parameter):
        def to(self, *args, **kwargs):
            raise KeyboardInterrupt

    last = LastStep(model, optimizer, interrupted(save) if where == "save" else save)
    with pytest.raises(KeyboardInterrupt), last:
        for step in (1, 2, 3):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            weights[step] = [p.detach().clone() for p in parameters]
            if where == "update" and step == 3:
                raise KeyboardInterrupt
            if where == "copy" and step == 3:
                middle = optimizer.state[parameters[2]]
                middle["exp_avg"] = Interrupting(middle["exp_avg"])
            last.done(step)
            if step == 2:
                last.save(step)
    step, values = saved[-1]
    assert step == 2 and all(torch.equal(a, b) for a, b in zip(values, weights[2], strict=True))
    assert "lost" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("lora_r", [4, 0])
def test_an_error_costs_one_step_at_most(small, whole, monkeypatch, capsys, lora_r):
    """A bug in the third step, in the middle of its update or, all weights trained, before it."""
    cfg = replace(small, lora_r=lora_r, eval_every=0)
    name, owner, call = (
        ("describe", trainer, 4)
        if not lora_r
        else ("policy_loss", trainer.grpo, 3 * len(weights_calls(small)) + 3)
    )
    reference = train(replace(cfg, out_dir=small.out_dir + "whole"))
    real, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError("a bug")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(ZeroDivisionError):
            train(cfg)
    step = int(read_state(cfg.out_dir)["steps_done"])
    assert step >= 2 and f"saved as of step {step}" in capsys.readouterr().err
    assert comparable(train(replace(cfg, resume=True))) == comparable(reference)


def weights_calls(cfg):
    """At least so many micro-batches has a step."""
    return range(cfg.updates_per_step)


def test_a_gradient_that_is_not_finite_costs_one_step(small, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def norm(parameters, largest):
        calls.append(1)
        return clip(parameters, largest) if len(calls) < 12 else torch.tensor(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
        with pytest.raises(UserError, match="saved as of step 1"):
            train(replace(small, eval_every=0))
    assert len(train(replace(small, eval_every=0, resume=True))) == 4


@pytest.fixture
def bad(monkeypatch):
    """Registers a reward of that name, and of no other test."""
    monkeypatch.setattr(rewards, "REGISTRY", dict(rewards.REGISTRY))

    def register(function):
        def bad(rollouts):
            return function(rollouts, len(rollouts.text))

        rewards.reward(formula="bad", source="a test")(bad)

    return register


@pytest.mark.parametrize(
    "function",
    [
        lambda r, B: 1 / 0,
        lambda r, B: torch.full((B,), float("nan")),
        lambda r, B: torch.ones(B, 1),
        lambda r, B: torch.ones(B - 1),
        lambda r, B: torch.ones(B, dtype=torch.complex64),
        lambda r, B: [1.0] * B,
        lambda r, B: None,
    ],
)
def test_a_bad_reward_is_named_in_one_line(bad, function):
    bad(function)
    rollouts = SimpleNamespace(text=["a", "b", "c"])
    with pytest.raises(UserError, match="reward 'bad'") as error:
        rewards.parse("0.5*bad + format")(rollouts)
    assert "\n" not in str(error.value)


def test_a_reward_that_fails_late_costs_one_step(small, bad, monkeypatch):
    bad(lambda r, B: torch.rand(B) if r.step < 3 else 1 / 0)
    monkeypatch.setattr(rewards, "watched", lambda _: [])
    with pytest.raises(UserError, match="reward 'bad' failed at test_runs.py:.*as of step 2"):
        train(replace(small, reward="bad", eval_every=0))
    assert read_state(small.out_dir)["steps_done"] == "2"


# ---------------------------------------------------------------------------------- model folders


def altered(world, folder, file, change):
    """A copy of a model folder with a JSON file changed."""
    folder.mkdir()
    for path in Path(world).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | change))
    return str(folder)


CODE = {
    "AutoConfig": "own.Own",
    "AutoModelForCausalLM": "own.Own",
    "AutoTokenizer": ["own.Own", None],
}


@pytest.mark.parametrize(
    "file,change",
    [
        ("config.json", {"model_type": "own", "auto_map": CODE}),
        ("config.json", {"auto_map": CODE}),
        ("tokenizer_config.json", {"auto_map": CODE}),
        ("tokenizer_config.json", {"auto_map": CODE, "tokenizer_class": "Own"}),
    ],
)
def test_code_of_a_model_folder_is_never_run_nor_asked_about(
    tiny_random, tmp_path, monkeypatch, file, change
):
    folder = altered(tiny_random, tmp_path / "m", file, change)
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    load = load_model if file == "config.json" else load_tokenizer
    known = change == {"auto_map": CODE}  # transformers has a class of its own for it
    with contextlib.nullcontext() if known else pytest.raises(UserError, match="code of its own"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])  # tied heads, and not
def test_weights_that_are_missing_or_have_no_place_are_refused(
    model_folders, tmp_path, family, quant
):
    folder = altered(model_folders[family], tmp_path / "m", "config.json", {})
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        path,
        {"format": "pt"},
    )
    load_model(folder, quant)  # computed, whatever is stored
    name = "model.layers.1.mlp.up_proj.weight"
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {name.replace("1", "7"): tensors[name].clone()},
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(UserError, match="mlp.up_proj.weight"):
            load_model(folder, quant)
    if family == "llama":
        save_file(
            {k: v for k, v in tensors.items() if k != "lm_head.weight"}, path, {"format": "pt"}
        )
        with pytest.raises(UserError, match="lm_head.weight"):
            load_model(folder, quant)


# ---------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"alora_invocation_tokens": [5]},
        {"use_dora": True},
        {"use_rslora": True},
        {"use_qalora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["x"]},
        {"task_type": "SEQ_CLS"},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"a_method_of_tomorrow": {"on": 1}},
        {"kasa_config": {"k": 1}},
        {"r": 0},
        {"r": "4"},
        {"lora_alpha": None},
    ],
    ids=str,
)
def test_only_plain_lora_is_loaded(tiny_random, tmp_path, change):
    model = load_model(tiny_random)
    add_lora(model, 4, 8)
    save_adapter(model, tmp_path, tiny_random)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    peft = pytest.importorskip("peft")
    plain = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM").to_dict()
    path.write_text(json.dumps(plain | config, default=list))
    load_adapter(load_model(tiny_random), tmp_path)  # all of PEFT's keys, at their defaults
    path.write_text(json.dumps(plain | config | change, default=list))
    with pytest.raises(UserError) as error:
        load_adapter(load_model(tiny_random), tmp_path)
    assert "\n" not in str(error.value)


def test_half_an_adapter_is_refused(tiny_random, tmp_path):
    model = load_model(tiny_random)
    add_lora(model, 4, 8)
    save_adapter(model, tmp_path, tiny_random)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    dropped = next(name for name in tensors if "lora_B" in name)
    for left in ({k: v for k, v in tensors.items() if k != dropped}, {}):
        save_file(left, path)
        with pytest.raises(UserError):
            load_adapter(load_model(tiny_random), tmp_path)


@pytest.mark.parametrize("command", [evaluation, sample], ids=["eval", "sample"])
def test_an_adapter_goes_on_what_it_was_trained_over(small, tiny_random, command, capsys):
    train(replace(small, steps=1, eval_every=0, quant="nf4"))
    adapter = f"{small.out_dir}/adapter"
    cls = evaluation.EvalConfig if command is evaluation else sample.SampleConfig
    capsys.readouterr()
    cfg = command.fill(cls(adapter=adapter), {"adapter": adapter})
    assert (cfg.model, cfg.quant) == (tiny_random, "nf4")
    out = capsys.readouterr().out
    assert f"model={tiny_random}" in out and "quant=nf4" in out and out.count("\n") == 1
    typed = {"adapter": adapter, "quant": "none", "model": "other"}
    cfg = command.fill(cls(**typed), typed)
    assert (cfg.model, cfg.quant) == ("other", "none")
    assert capsys.readouterr().out.count("warning: ") == 2
    typed = {"run": small.out_dir, "quant": "none"}
    command.fill(cls(**typed), typed)
    assert "warning: " in capsys.readouterr().out
    command.fill(cls(run=small.out_dir), {"run": small.out_dir})
    assert capsys.readouterr().out == ""
    os.unlink(f"{adapter}/nanorlvr.json")  # as made elsewhere
    cfg = command.fill(cls(adapter=adapter), {"adapter": adapter})
    assert (cfg.model, cfg.quant) == (tiny_random, "none") and "quant" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ sweeps


@pytest.mark.skipif(sys.platform != "linux", reason="children learn of it on Linux alone")
def test_a_killed_sweep_leaves_no_run_behind(tmp_path):
    """Its runs get TERM, and so end their step and save."""
    code = (
        "import sys; from pathlib import Path; from tools.parts import jobs\n"
        f"jobs.PROJECT = Path({str(tmp_path)!r})\n"
        f"job = jobs.Job(Path({str(tmp_path)!r}) / 'run', ['config/model/tiny.py'])\n"
        "jobs.start(job); print(job.process.pid, flush=True); job.process.wait()"
    )
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"done = pathlib.Path({str(tmp_path)!r})\n"
        "def term(*_): (done / 'termed').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, term); (done / 'ready').touch(); time.sleep(60)\n"
    )
    sweep = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    pid = int(sweep.stdout.readline())
    wait_for(lambda: (tmp_path / "ready").exists())
    sweep.kill()
    sweep.wait()
    wait_for(lambda: (tmp_path / "termed").exists())
    wait_for(lambda: not running(pid))


def running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_restarted_job_deletes_nothing(tmp_path, monkeypatch):
    from tools.parts import jobs

    job = jobs.Job(tmp_path / "run", ["config/model/tiny.py"])
    job.folder.mkdir()
    (job.folder / "config.json").write_text(json.dumps({"config": asdict(job.config)}))
    (job.folder / "notes.txt").write_text("mine")
    job.log.write_text("before\n")
    assert jobs.state(job) == "restart"
    (tmp_path / "train.py").write_text("print('after')")
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)
    jobs.start(job)
    job.process.wait()
    assert (job.folder / "notes.txt").exists() and (job.folder / "config.json").exists()
    assert re.search("before\nafter", job.log.read_text())
