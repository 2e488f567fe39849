"""The training loop: exact nulls, resume, what reaches the loss, user errors."""

import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import comparable, run_config, write_state

import rewards
import train as trainer
from data import Problem, Rollouts, partition
from harness import configurator
from harness.checkpoint import FREE, RunFolder
from harness.errors import UserError
from harness.loading import load_model
from harness.runfiles import read_config, read_jsonl, save_rows, write_json
from harness.scale import choose_scale
from lora import add_lora, lora_layers, trainable
from model import token_stats
from settings import Config, can_clip, check, early_warning, hoelder_exponent, learning_rate
from tasks.problems import PI_1, pick_one
from train import train


@pytest.fixture
def small(tiny_random, tmp_path):
    return run_config(tiny_random, tmp_path / "run")


# ------------------------------------------------------------------------------------------- nulls


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_with_lr_0_every_ratio_is_exactly_1(small, dtype, quant):
    """8 updates a step, several micro-batches each, prompts and responses of all lengths; sampled
    by merged weights, whose rounding is the sampler's alone."""
    cfg = replace(small, lr=0.0, dtype=dtype, quant=quant, gradient_checkpointing=True)
    for m in train(replace(cfg, rollout_weights="merged")):
        assert m["sampler_gap_max"] < (1e-4 if dtype == "float32" else 0.5)
        assert m["ratio_mean"] == 1 and m["ratio_max"] == 1
        assert m["clip_frac_low"] == 0 and m["clip_frac_high"] == 0
        assert m["kl"] == 0  # B = 0: the policy equals the base model bit for bit
        assert m["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["gspo", "cispo", "hoelder"])
def test_with_lr_0_no_arm_clips(small, loss):
    for m in train(replace(small, lr=0.0, loss=loss)):
        assert m["ratio_mean"] == 1 and m["ratio_max"] == 1
        assert m["clip_frac_low"] == 0 and m["clip_frac_high"] == 0


@pytest.mark.slow
def test_the_first_ratio_of_every_step_is_exactly_1(small, monkeypatch):
    """The null also holds after the weights have moved, because old_logp is this step's."""
    first = []
    policy_loss = trainer.grpo.policy_loss

    def spy(logp, old_logp, *args, **kwargs):
        first.append((logp - old_logp).abs().max().item())
        return policy_loss(logp, old_logp, *args, **kwargs)

    monkeypatch.setattr(trainer.grpo, "policy_loss", spy)
    history = train(replace(small, updates_per_step=1, steps=3))
    assert max(first) == 0 and history[-1]["kl"] > 0
    first.clear()
    train(replace(small, out_dir=small.out_dir + "2"))
    assert max(first) > 0


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["constant", "constant(0.3)", "random(0)", "random(1)"])
def test_a_constant_reward_moves_no_weight(small, reward):
    train(replace(small, reward=reward))
    a = weights(small.out_dir)
    train(replace(small, reward=reward, lr=0.0, out_dir=small.out_dir + "0"))
    b = weights(small.out_dir + "0")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights(folder):
    from safetensors.torch import load_file

    tensors = load_file(f"{folder}/state.safetensors")
    return {k: v for k, v in tensors.items() if k.startswith("weight:")}


# ------------------------------------------------------------------------------------------ resume


def test_sgd_steps_along_the_gradient(small):
    """With plain SGD, each update moves the adapter by -lr times the clipped gradient."""
    cfg = replace(small, optimizer="sgd", lr=0.5, steps=1, updates_per_step=1, max_grad_norm=1e9)
    (m,) = train(cfg)
    tensors = weights(cfg.out_dir)
    moved = math.sqrt(sum(float((t**2).sum()) for name, t in tensors.items() if "lora_B" in name))
    assert moved == pytest.approx(
        0.5 * m["grad_norm"], rel=1e-4
    )  # B starts at 0, A's gradient is 0


@pytest.mark.slow
def test_evals_have_a_budget_of_their_own(small):
    """A run trained on one token and evaluated on longer answers."""
    cfg = replace(small, max_new_tokens=1, eval_every=2, eval_temperature=1.0)
    short, whole = (
        train(replace(cfg, eval_new_tokens=n, out_dir=f"{small.out_dir}{n}")) for n in (0, 60)
    )
    assert short[-1]["eval_truncated"] == 1 > whole[-1]["eval_truncated"]
    assert short[-1]["length"] == whole[-1]["length"] == 1
    assert short[-1]["grad_norm"] == whole[-1]["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [4, 0])
def test_resumed_equals_uninterrupted(small, lora_r):
    cfg = replace(small, steps=4, lora_r=lora_r, lr=1e-3, eval_every=2, eval_temperature=1.0)
    whole = train(replace(cfg, out_dir=small.out_dir + "whole"))
    train(replace(cfg, steps=2))
    with open(f"{cfg.out_dir}/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward": 9}\n{"step": 4, "rew')  # as after a crash
    resumed = train(replace(cfg, resume=True))
    assert comparable(resumed) == comparable(whole)
    assert comparable(read_jsonl_of(cfg)) == comparable(whole)
    assert all(
        torch.equal(v, weights(cfg.out_dir)[k]) for k, v in weights(small.out_dir + "whole").items()
    )
    assert whole[-1]["kl"] is None if lora_r == 0 else whole[-1]["kl"] > 0


@pytest.mark.slow
def test_a_resumed_run_keeps_its_schedules(small, monkeypatch):
    """A run stopped within the third of four steps, with a checkpoint at the second."""
    cfg = replace(
        small,
        steps=4,
        lr=1e-3,
        lr_schedule="linear",
        save_every=2,
        loss="hoelder",
        hoelder_p=3.0,
        clip_high=1e-3,
        loss_agg="constant",
        whiten=True,
        base_every=2,
    )
    whole = train(replace(cfg, out_dir=small.out_dir + "whole"))
    assert [m["kl"] is None for m in whole] == [True, False, True, False]
    assert sum(m["clip_frac_high"] for m in whole) > 0
    update, calls = trainer.update, []
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer, "update", lambda *a: calls.append(1) or update(*a) if len(calls) < 2 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            train(cfg)
    assert comparable(train(replace(cfg, resume=True))) == comparable(whole)
    a, b = weights(cfg.out_dir), weights(small.out_dir + "whole")
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize(
    "change", [{"lr_schedule": "cosine"}, {"warmup": 0.5}, {"loss": "hoelder"}]
)
def test_a_resumed_run_keeps_the_steps_of_its_schedule(small, change):
    """The fault: with other steps the learning rate jumped, and config.json named one schedule."""
    cfg = asdict(replace(small, steps=2, **change))
    folder = Path(small.out_dir)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": cfg}))
    with pytest.raises(UserError, match="steps"):
        RunFolder._compare(SimpleNamespace(folder=folder), cfg | {"steps": 4}, 2)
    RunFolder._compare(SimpleNamespace(folder=folder), cfg, 2)


def read_jsonl_of(cfg):

    return read_jsonl(Path(cfg.out_dir) / "metrics.jsonl")


@pytest.mark.slow
def test_a_folder_with_a_run_is_refused_and_resume_says_what_changed(small, capsys):
    train(small)
    with pytest.raises(UserError, match="--resume=True"):
        train(small)
    with pytest.raises(UserError, match="lora_r.* 4 .* 8"):
        train(replace(small, lora_r=8, resume=True))
    train(replace(small, steps=3, micro_batch_tokens=100, resume=True))
    out = capsys.readouterr().out
    assert "micro_batch_tokens was 200, from here on 100" in out and "steps was 2" in out
    with pytest.raises(UserError, match="steps=2, .* 3 steps"):
        train(replace(small, resume=True))
    with pytest.raises(UserError, match="no checkpoint"):
        train(replace(small, out_dir=small.out_dir + "new", resume=True))


@pytest.fixture
def two_steps_done(tmp_path):
    """A run folder with config, log and state of two steps, without weights."""
    write_json(tmp_path / "config.json", {"config": asdict(Config(steps=4))})
    save_rows([{"step": 1}, {"step": 2}], tmp_path / "metrics.jsonl")
    write_state(tmp_path, 2)
    return tmp_path


@pytest.mark.parametrize("key", [f.name for f in fields(Config)])
def test_resuming_refuses_another_experiment(two_steps_done, key, capsys):
    """Every setting that is not known to be harmless, such as the reward and those of the eval."""
    value = 2 if key == "resume_step" else 7777  # there must be a checkpoint of that step
    config = asdict(Config(steps=4)) | {key: value}
    if key in FREE or key in ("out_dir", "resume", "resume_step"):
        with RunFolder(two_steps_done, config, resume=True) as folder:
            assert [row["step"] for row in folder.history] == [1, 2]
        assert (key in capsys.readouterr().out) == (key in FREE)
        assert read_config(two_steps_done)[key] == value
    else:
        with pytest.raises(UserError, match=f"{key} was"):
            RunFolder(two_steps_done, config, resume=True)
        assert read_config(two_steps_done) == json.loads(json.dumps(asdict(Config(steps=4))))


def test_the_docs_name_the_settings_that_may_change_on_resume():
    text = (configurator.PROJECT / "docs" / "TRAINING.md").read_text()
    listed = text.partition("only these settings may change:")[2].partition(".\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(FREE)


def test_resuming_with_fewer_steps_than_were_made_is_refused(two_steps_done):
    with pytest.raises(UserError, match="steps=1, .* 2 steps"):
        RunFolder(two_steps_done, asdict(Config(steps=1)), resume=True)
    assert read_config(two_steps_done)["steps"] == 4
    RunFolder(two_steps_done, asdict(Config(steps=2)), resume=True)


@pytest.mark.slow
def test_a_run_from_before_a_setting_existed_goes_on(small, capsys):
    train(small)
    path = f"{small.out_dir}/config.json"
    with open(path) as file:
        saved = json.load(file)
    del saved["config"]["one_shot"], saved["config"]["threads"]
    with open(path, "w") as file:
        json.dump(saved, file)
    assert len(train(replace(small, steps=3, resume=True))) == 3
    assert "one_shot" not in capsys.readouterr().out.partition("resumed after")[0]


def test_a_setting_that_is_gone_does_not_stop_a_resume(small):
    folder = Path(small.out_dir)
    folder.mkdir()
    saved = {"config": {"weight_decay": 0.0, "lr": 0.5}}
    (folder / "config.json").write_text(json.dumps(saved))
    values, reason = choose_scale({"resume": True, "out_dir": small.out_dir})
    assert values == {"lr": 0.5} and small.out_dir in reason


@pytest.mark.slow
def test_two_runs_in_one_folder(small):

    with RunFolder(Path(small.out_dir), {"model": "x"}, resume=False):
        with pytest.raises(UserError, match=small.out_dir):
            train(small)
    assert len(train(small)) == 2


@pytest.mark.slow
def test_a_damaged_state_is_one_line(small):
    train(small)
    with open(f"{small.out_dir}/state.safetensors", "wb") as file:
        file.write(b"half a state")
    with pytest.raises(UserError, match="state.safetensors"):
        train(replace(small, resume=True))


# -------------------------------------------------------------------------------- what is recorded


def test_metrics_samples_and_config_are_there(small):
    history = train(replace(small, eval_every=1, kl_coef=0.1))
    wanted = (
        "step reward reward_std flat_groups accuracy code_frequency boxed length truncated "
        "clip_frac_low clip_frac_high ratio_mean ratio_max entropy kl grad_norm "
        "sampler_gap tokens_per_s seconds self_certainty/mean random/std length/auroc"
    ).split()
    assert [m["step"] for m in history] == [0, 1, 2] and "eval_accuracy" in history[0]
    for m in history[1:]:
        assert set(wanted) <= set(m) and all(math.isfinite(m[k] or 0) for k in wanted)
        assert m["sampler_gap_max"] < 1e-4
        assert 0 < m["token_prob"] < 1 and sum(m["prob_bins"]) == pytest.approx(1)
        for side in ("high", "low"):
            bins = m[f"clip_{side}_bins"]
            assert [share is None for share in bins] == [n == 0 for n in m["prob_bins"]]
            total = sum((share or 0) * n for share, n in zip(bins, m["prob_bins"], strict=True))
            assert total == pytest.approx(m[f"clip_frac_{side}"]) and total > 0
            assert m[f"clip_pull_{side}"] != 0
        json.dumps(m, allow_nan=False)
    with open(f"{small.out_dir}/samples.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 8 and {r["reward"] for r in rows} <= {0.0, 1.0}
    with open(f"{small.out_dir}/config.json") as file:
        saved = json.load(file)
    assert saved["config"]["kl_coef"] == 0.1 and saved["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_logged_reward_is_the_trained_one_and_random_is_the_same_again(small):
    """Guards against an unseeded random reward that is drawn once to train and again to log."""
    a = train(small)
    b = train(replace(small, out_dir=small.out_dir + "b"))
    assert comparable(a) == comparable(b)
    c = train(replace(small, seed=1, out_dir=small.out_dir + "c"))
    assert [m["reward"] for m in a] != [m["reward"] for m in c]


# ------------------------------------------------------------------------------------ every reward

CONFIGS = sorted((configurator.PROJECT / "config").glob("*.py"))


@pytest.mark.parametrize("file", [path.stem for path in CONFIGS])
def test_every_reward_config_runs(small, tiny_random, tmp_path, file):
    """Run one step of each experiment file on the untrained tiny world with wrong labels."""
    labelled = labels_file(tiny_random, tmp_path, right=0)
    experiment, _ = configurator.configure(Config, [f"config/{file}.py"])
    cfg = replace(
        small,
        reward=experiment.reward.replace("cross_model", f"cross_model('{tiny_random}')"),
        one_shot="0" if experiment.one_shot else "",
        steps=1,
        train_data=labelled if "label" in rewards.parse(experiment.reward).needs else tiny_random,
    )
    (metrics,) = train(cfg)
    assert math.isfinite(metrics["reward"]) and 0 <= metrics["flat_groups"] <= 1
    same = [k for k in metrics if k == f"{cfg.reward}/mean"]
    assert all(metrics[k] == metrics["reward"] for k in same)


def labels_file(world, folder, right: int, wrong: int = 8) -> str:
    """Write problems: `right` with a right label, `wrong` with a wrong one, one without."""
    with open(f"{world}/train.jsonl") as file:
        rows = [json.loads(next(file)) for _ in range(right + wrong + 1)]
    for i, row in enumerate(rows[:-1]):
        row["label"] = str((int(row["answer"]) + (i >= right)) % 10)
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def warnings_with(word: str, printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "warning:" in line and word in line]


@pytest.mark.slow
def test_a_reward_that_tells_nobody_apart_is_warned_of_once(small, capsys):
    train(replace(small, reward="no_repetition", steps=7, prompts_per_step=1))
    assert len(warnings_with("reward=no_repetition", capsys.readouterr().out)) == 1
    train(replace(small, steps=5, prompts_per_step=1, out_dir=small.out_dir + "2"))
    assert not warnings_with("reward=", capsys.readouterr().out)


def test_labels_reach_the_rewards_and_incorrect_keeps_the_wrong_ones(
    small, tiny_random, tmp_path, capsys
):
    cfg = replace(small, train_data=labels_file(tiny_random, tmp_path, right=5, wrong=3), steps=1)
    (m,) = train(replace(cfg, reward="majority"))
    assert "train: 8 problems" in capsys.readouterr().out  # 1 has no label
    assert {"majority/mean", "incorrect/auroc", "majority(online)/flat"} <= set(m)
    train(replace(cfg, reward="incorrect & ~python", out_dir=small.out_dir + "i"))
    assert "train: 3 problems" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train_data=.*--labels="):
        train(replace(small, reward="majority", out_dir=small.out_dir + "n"))
    right = labels_file(tiny_random, tmp_path, right=2, wrong=0)
    with pytest.raises(UserError, match=right):
        train(replace(cfg, train_data=right, reward="incorrect", out_dir=small.out_dir + "r"))


def test_one_shot_fills_the_batch_with_one_problem(small, capsys, monkeypatch):
    seen = []
    advantages = trainer.grpo.advantages
    monkeypatch.setattr(trainer, "describe", spy_rollouts(seen, trainer.describe))
    train(replace(small, one_shot="7", steps=1))
    (r,) = seen
    assert len({p.problem for p in r.problem}) == 1 and r.problem[0].id == "7"
    assert r.prompt_index.tolist() == [i // 8 for i in range(32)]  # there are still four groups
    assert len(set(r.text)) > 8 and trainer.grpo.advantages is advantages
    assert r.problem[0].problem[:20] in capsys.readouterr().out
    with pytest.raises(UserError, match="one_shot=add"):
        train(replace(small, one_shot="add", out_dir=small.out_dir + "2"))


def test_every_problem_is_used_once_before_any_comes_back(
    small, tiny_random, tmp_path, monkeypatch
):
    """With 10 problems and 4 per step, steps 1 to 5 are exactly two epochs."""
    with open(f"{tiny_random}/train.jsonl") as file:
        (tmp_path / "ten.jsonl").write_text("".join(next(file) for _ in range(10)))
    seen = []
    monkeypatch.setattr(trainer, "describe", spy_rollouts(seen, trainer.describe))
    train(replace(small, train_data=str(tmp_path / "ten.jsonl"), steps=5, group_size=2, lr=0.0))
    order = [p.problem for r in seen for p in r.problem[::2]]
    assert len(order) == 20 and len(set(order[:10])) == len(set(order[10:])) == 10


def spy_rollouts(seen, function):
    return lambda r, *args: seen.append(r) or function(r, *args)


def test_pi_1_is_found_by_its_content_or_restated():
    other = Problem("A train leaves", "5", "0")
    sail = Problem("... exerted by wind on a Sail varies ...", "12.8", "1")
    assert pick_one([other, sail], "pi_1") is sail
    assert pick_one([other], "pi_1") is PI_1
    assert pick_one([other, sail], "TRAIN") is other and pick_one([other, sail], "1") is sail
    k = 4 / (2 * 8**3)
    assert k * 4 * 12.8**3 == pytest.approx(32, rel=0.03) and PI_1.answer == "12.8"


def test_every_reward_is_logged_at_weight_0(small, monkeypatch):
    """The logged metrics equal those computed from the rollouts by hand."""
    seen = []
    monkeypatch.setattr(trainer, "describe", spy_rollouts(seen, trainer.describe))
    history = train(small)
    for r, m in zip(seen, history, strict=True):
        value = rewards.parse("length")(r)
        groups = value.view(4, 8)
        assert m["length/mean"] == pytest.approx(value.mean().item())
        assert m["length/std"] == pytest.approx(groups.std(1).mean().item())
        assert m["constant/flat"] == 1 and m["constant/std"] == 0
        assert m["length/flat"] == (groups.amin(1) == groups.amax(1)).float().mean()
        assert m["accuracy"] == m["ground_truth/mean"] == 0 and m["length/auroc"] is None
        assert m["random/mean"] == rewards.parse("random")(r).mean()
        assert "majority/mean" not in m and "cross_model/mean" not in m  # no label, no second model
        assert m["random/mean"] == m["reward"] and m["random/std"] == m["reward_std"]
    first, second = history
    # With B = 0 the policy equals the base model. After an update it does not.
    assert first["self_certainty/mean"] == first["self_certainty(base)/mean"]
    assert second["self_certainty/mean"] != second["self_certainty(base)/mean"]


def test_auroc_of_the_trained_reward_is_logged(small, monkeypatch):
    right = [True, False] * 16
    monkeypatch.setattr(
        trainer.rewards.grading, "correct", lambda texts, golds: right[: len(texts)]
    )
    (m,) = train(replace(small, reward="ground_truth + 0.5*random(1)", steps=1))
    assert m["reward_auroc"] == 1 and m["constant/auroc"] == 0.5
    assert 0 < m["random/auroc"] < 1 and m["length_correct"] > 0 and m["length_wrong"] > 0


@pytest.mark.slow
def test_offline_self_certainty_is_that_of_the_untouched_base(small, tiny_random, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "describe", spy_rollouts(seen, trainer.describe))
    for lora_r in (4, 0):
        folder = f"{small.out_dir}{lora_r}"
        cfg = replace(small, reward="self_certainty(base)", lora_r=lora_r, out_dir=folder)
        train(cfg)
        r = seen[-1]
        stats = token_stats(load_model(tiny_random), r.tokens, r.prompt_len, r.length)
        assert torch.allclose(r.base_self_certainty, stats.self_certainty, atol=1e-5)
        assert (r.self_certainty - stats.self_certainty).abs().max() > 1e-3


# -------------------------------------------------------------------------- settings of the loss

STUDY = sorted((configurator.PROJECT / "config" / "study").glob("*.py"))


@pytest.mark.parametrize("path", STUDY, ids=lambda path: path.stem)
def test_study_configs_warn_of_nothing(path):
    """They warn neither alone nor at the tiny scale, in either order, and they name the run."""
    for scale in ("config/model/tiny.py", "config/model/qwen2.5_math_1.5b_paper.py"):
        for argv in ([str(path), scale], [scale, str(path)]):
            cfg, sources = configurator.configure(Config, argv)
            assert check(cfg) == []
            assert sources.experiments == [path.stem]


TIGHT = {"clip_low": 1e-4, "clip_high": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "base,changes",
    [
        ({}, {"loss": "gspo"}),
        ({}, {"loss": "cispo"}),
        ({}, {"loss": "hoelder"}),
        ({}, {"clip": "off"}),
        ({}, {"clip": "high"}),
        ({}, {"whiten": True}),
        ({}, {"adv_norm": "raw"}),
        ({}, {"loss_agg": "constant"}),
        ({"adv_norm": "group_mean", "max_grad_norm": 1e9}, {"adv_norm": "leave_one_out"}),
        ({"loss": "cispo"}, {"cispo_cap": 1.001}),
        ({"loss": "gspo"}, TIGHT),
        ({"loss": "gspo"} | TIGHT, {"clip": "low"}),
        ({"loss": "gspo"}, {"loss": "hoelder"}),
        ({"loss": "hoelder"}, {"hoelder_p": 1.0}),
        ({"loss": "hoelder"}, {"hoelder_p_end": 1.0}),
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()) or "default",
)
def test_every_setting_of_the_loss_acts(one_step, base, changes):
    a, b = one_step(base), one_step(base | changes)
    assert any((a[k] - b[k]).abs().max() > 1e-6 for k in a)


@pytest.fixture(scope="module")
def one_step(tiny_random, tmp_path_factory):
    """A function: changes -> the adapter after one step of a run with them. Cached."""
    done = {}

    def run(changes):
        key = repr(sorted(changes.items()))
        if key not in done:
            folder = str(tmp_path_factory.mktemp("setting") / "run")
            train(run_config(tiny_random, folder, **{"steps": 1} | changes))
            done[key] = weights(folder)
        return done[key]

    return run


@pytest.mark.slow
def test_one_update_a_step_makes_all_arms_one(one_step):
    """The clip arms agree bit for bit, and all losses up to rounding, with one aggregation."""
    base = {"updates_per_step": 1, "loss_agg": "seq_mean"}
    plain = one_step(base)
    for clip in ("high", "low", "off"):
        assert all(torch.equal(plain[k], v) for k, v in one_step(base | {"clip": clip}).items())
    for loss in ("gspo", "cispo", "hoelder"):
        other = one_step(base | {"loss": loss})
        assert all(torch.allclose(plain[k], other[k], atol=2e-4) for k in plain)


@pytest.mark.slow
def test_base_every_leaves_the_weights_alone(small):
    runs = {}
    for every in (1, 3):
        cfg = replace(small, steps=3, base_every=every, out_dir=f"{small.out_dir}{every}")
        runs[every] = (train(cfg), weights(cfg.out_dir))
    asked, spared = runs[1][0], runs[3][0]
    assert all(torch.equal(v, runs[3][1][k]) for k, v in runs[1][1].items())
    for a, b in zip(comparable(asked), comparable(spared), strict=True):
        null = {"kl", *(f"self_certainty(base)/{n}" for n in ("mean", "std", "flat", "auroc"))}
        assert a.keys() == b.keys() and a["kl"] is not None
        changed = {k for k in a if a[k] != b[k]}
        assert changed == (null - {"self_certainty(base)/auroc"} if b["step"] < 3 else set())
        assert all(b[k] is None for k in changed)
    held = train(replace(small, steps=1, kl_coef=0.1, base_every=3, out_dir=small.out_dir + "kl"))
    assert all(m["kl"] is not None for m in held)  # the loss needs it


def test_early_warnings():
    cfg = Config()
    idle = {"flat_groups": 0.5, "clip_frac_low": 0.0, "clip_frac_high": 0.0}
    idle |= {"grad_norm": 1.0, "truncated": 0.0}
    flat, clipped = idle | {"flat_groups": 1.0}, idle | {"clip_frac_high": 1e-4}
    line = early_warning(cfg, [idle] * 10)
    assert "nothing was clipped in 10 steps, so clip=both is not being tested" in line
    assert "lower clip_low and clip_high" in line and "\n" not in line
    assert early_warning(replace(cfg, clip="low"), [idle] * 10).endswith("lower clip_low")
    assert "cispo_cap" in early_warning(replace(cfg, loss="cispo"), [idle] * 10)
    for changes in ({"clip": "off"}, {"updates_per_step": 1}, {"lr": 0.0}):
        assert early_warning(replace(cfg, **changes), [idle] * 10) == ""
    for steps in ([idle] * 9, [idle] * 11, [flat] * 10, [idle] * 9 + [clipped]):
        assert early_warning(cfg, steps) == ""
    assert "reward=ground_truth" in early_warning(cfg, [flat] * 5)
    assert early_warning(replace(cfg, adv_norm="raw"), [flat] * 5) == ""
    assert early_warning(cfg, [flat] * 4 + [idle]) == early_warning(cfg, []) == ""
    watching = replace(cfg, watch='contains("so"); majority; ')
    logged = {'contains("so")/mean': None}  # as a watched reward that failed is logged
    line = early_warning(watching, [logged])
    assert "majority" in line and "label" in line and "contains" not in line
    assert early_warning(watching, [logged | {"majority/mean": 0.5}]) == ""
    # If nearly every response is cut off, the warning names this cause and not the flat groups.
    cut = {"truncated": 0.97}
    for changes, row in (({}, flat), ({"truncated": "zero"}, flat), ({"truncated": "mask"}, idle)):
        line = early_warning(replace(cfg, **changes), [row | cut] * 5)
        assert "97%" in line and "max_new_tokens=3072" in line and "\n" not in line
    assert early_warning(cfg, [idle | cut] * 5) == ""
    masked = idle | {"grad_norm": 0.0, "truncated": 1.0}
    assert early_warning(replace(cfg, truncated="mask"), [masked] * 10) == ""


@pytest.mark.slow
def test_a_clip_that_nothing_meets_is_warned_of_once(small, capsys):
    cfg = replace(small, steps=11, lr=1e-9, prompts_per_step=1, max_new_tokens=4)
    cfg = replace(cfg, updates_per_step=2)
    train(cfg)
    assert len(warnings_with("clip=", capsys.readouterr().out)) == 1


# ----------------------------------------------------------------------------- what enters the loss


def rollouts(tokenizer_end=0):
    """Two groups of two by hand: the last response of each is cut off."""
    tokens = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 8, 9, 9], [5, 7, 0, 0, 0], [5, 8, 8, 8, 0]])
    length = torch.tensor([2, 3, 2, 3])
    return Rollouts(
        tokens=tokens,
        prompt_len=torch.tensor([2, 2, 1, 1]),
        length=length,
        text=["a", "b", "c", "d"],
        problem=[Problem("p", "1", "0")] * 4,
        finished=torch.tensor([True, False, True, False]),
        group_size=2,
        seed=0,
        step=1,
        sampler_logp=None,
    )


def sgd_step(model, cfg, parts, r, advantage):
    """How far one SGD update of train.update moves the adapter."""
    before = {k: v.detach().clone() for k, v in trainable(model).items()}
    trainer.score(model, r, parts, replace(cfg, base_every=2))
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    trainer.update(model, optimizer, r, advantage, parts, replace(cfg, lr=1.0))
    moved = {k: v.detach() - before[k] for k, v in trainable(model).items()}
    with torch.no_grad():
        for k, v in trainable(model).items():
            v.copy_(before[k])
    return torch.cat([v.flatten() for v in moved.values()])


@pytest.fixture
def adapted(tiny_random):
    model = load_model(tiny_random)
    add_lora(model, 4, 8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean", "constant"])
def test_the_gradient_does_not_depend_on_the_micro_batch(adapted, small, loss_agg):
    cfg = replace(small, loss_agg=loss_agg, max_grad_norm=1e9)
    A = torch.tensor([1.0, -1.0, 0.5, -0.5])
    moves = [
        sgd_step(adapted, cfg, [mini], rollouts(), A)
        for mini in ([[0, 1, 2, 3]], [[1], [3, 0], [2]], [[0], [1], [2], [3]])
    ]
    assert moves[0].abs().max() > 1e-4
    for other in moves[1:]:
        assert torch.allclose(moves[0], other, atol=1e-6 * float(moves[0].abs().max()) * 10)


def test_the_end_token_is_trained_although_it_is_the_padding_token(adapted, small):
    """An SGD step on row 0 equals the gradient of the mean over both its tokens."""
    r = rollouts()
    assert r.tokens[0].tolist() == [5, 6, 7, 0, 0] and r.length[0] == 2  # 7, then the end token 0
    moved = sgd_step(
        adapted, replace(small, max_grad_norm=1e9), [[[0]]], r, torch.tensor([2.0, 0, 0, 0])
    )
    adapted.zero_grad()
    logp = adapted(torch.tensor([[5, 6, 7, 0]])).logits[0].log_softmax(-1)
    (2.0 * (logp[1, 7] + logp[2, 0]) / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in trainable(adapted).values()])
    assert torch.allclose(moved, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean", "constant"])
def test_leaving_out_rows_without_gradient_leaves_the_gradient_alone(adapted, small, loss_agg):
    """In float64, and the share of clipped tokens counts them too."""
    cfg = replace(small, loss_agg=loss_agg, max_grad_norm=1e9)
    adapted.double()
    A = torch.tensor([0.0, -1.0, 0.0, 1.0], dtype=torch.float64)
    whole = sgd_step(adapted, cfg, [[[0, 1, 2, 3]]], rollouts(), A)
    apart = sgd_step(adapted, cfg, [[[1, 3], [0, 2]]], rollouts(), A)
    assert whole.abs().max() > 1e-4 and torch.allclose(whole, apart, rtol=1e-9, atol=1e-12)
    rows = trainer.no_gradient(rollouts(), A, cfg)
    assert rows.tolist() == [True, False, True, False]
    assert not trainer.no_gradient(rollouts(), A, replace(cfg, kl_coef=0.1)).any()
    masked = trainer.no_gradient(rollouts(), A + 1, replace(cfg, kl_coef=0.1, truncated="mask"))
    assert masked.tolist() == [False, True, False, True]  # rows 1 and 3 were cut off


def test_left_out_rows_count_in_the_shares_of_clipped_tokens():
    r = rollouts()
    logp = torch.full((4, 3), -0.1).masked_fill(~r.mask, 0)
    A = torch.tensor([1.0, 1.0, 0.0, 0.0])

    def stats(rows):
        moved = logp[rows] + 1
        return trainer.grpo.policy_loss(moved, logp[rows], A[rows], r.mask[rows], 1.0)[1]

    whole = trainer.describe_clip([stats([0, 1, 2, 3])])
    part = trainer.describe_clip([stats([0, 1])], logp[[2, 3]], r.mask[[2, 3]])
    assert part["clip_frac_high"] == whole["clip_frac_high"] == 0.5
    for key in ("prob_bins", "clip_low_bins", "clip_high_bins"):
        assert part[key] == whole[key]
    nothing = trainer.describe_clip([], logp, r.mask)
    assert nothing["clip_frac_high"] == 0 and nothing["ratio_mean"] is None
    assert nothing["prob_bins"] == whole["prob_bins"]


@pytest.mark.slow
def test_more_rewards_can_be_watched(small):
    history = train(replace(small, steps=1, watch='contains("A"); contains(word="no such")'))
    assert 0 < history[0]['contains("A")/mean'] <= 1
    assert history[0]['contains(word="no such")/mean'] == 0
    with pytest.raises(UserError, match="containz"):
        train(replace(small, watch="containz(1)", out_dir=small.out_dir + "2"))


@pytest.mark.slow
def test_a_step_without_gradient_costs_no_update_but_adam_goes_on(small, monkeypatch):
    """All groups flat from step 2 on: the momentum still moves the weights, as with zeros."""
    first = train(replace(small, steps=1))
    before = weights(small.out_dir)
    entry = rewards.REGISTRY["random"]

    def flat_later(rollouts, p: float = 0.5):
        return entry.function(rollouts, p) * (rollouts.step == 1)

    monkeypatch.setitem(rewards.REGISTRY, "random", replace(entry, function=flat_later))
    both = train(replace(small, steps=2, out_dir=small.out_dir + "2"))
    assert comparable(both)[0] == comparable(first)[0]
    assert both[1]["rows_left_out"] == 1 and both[1]["grad_norm"] == 0
    assert both[1]["ratio_mean"] is None and both[1]["clip_frac_low"] == 0
    after = weights(small.out_dir + "2")
    assert any((after[k] - v).abs().max() > 1e-4 for k, v in before.items())


def test_truncated_mask_takes_cut_off_responses_out_of_the_loss(adapted, small):
    cfg = replace(small, max_grad_norm=1e9)
    A = torch.tensor([1.0, -1.0, 0.5, -0.5])
    masked = sgd_step(adapted, replace(cfg, truncated="mask"), [[[0, 1, 2, 3]]], rollouts(), A)
    kept_rows = sgd_step(adapted, cfg, [[[0, 2]]], rollouts(), A)
    assert torch.allclose(masked, kept_rows, atol=1e-6)
    kept = sgd_step(adapted, cfg, [[[0, 1, 2, 3]]], rollouts(), A)
    assert not torch.allclose(masked, kept, rtol=1e-2)


@pytest.mark.slow
def test_truncated_zero_zeroes_the_reward(small):
    cfg = replace(small, reward="random(1)", max_new_tokens=6)
    kept = train(cfg)
    zeroed = train(replace(cfg, truncated="zero", out_dir=small.out_dir + "z"))
    assert kept[0]["truncated"] > 0 and kept[0]["reward"] == 1
    assert zeroed[0]["reward"] == pytest.approx(1 - zeroed[0]["truncated"])


@pytest.mark.slow
def test_kl_in_the_loss_holds_the_policy_back(small):
    free = train(replace(small, steps=3))
    held = train(replace(small, steps=3, kl_coef=10.0, out_dir=small.out_dir + "kl"))
    assert held[-1]["kl"] < 0.5 * free[-1]["kl"]


def test_partition_covers_every_row_once():
    parts = partition(list(range(10, 47)), 8, 100, seed=0, step=3)
    assert len(parts) == 8
    assert sorted(i for mini in parts for rows in mini for i in rows) == list(range(37))


# ------------------------------------------------------------------------------- settings, mistakes

FULL = {"lora_r": 0, "quant": "none"}


def test_learning_rate_by_hand():
    cfg = Config(steps=5, updates_per_step=4, lr=1.0, warmup=0.2)  # 20 updates, 4 of them warm
    assert [learning_rate(cfg, i) for i in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = replace(cfg, lr_schedule="linear")
    assert learning_rate(linear, 12) == pytest.approx(0.5)
    cosine = replace(cfg, lr_schedule="cosine")
    assert learning_rate(cosine, 4) == 1 and learning_rate(cosine, 12) == pytest.approx(0.5)
    assert learning_rate(cosine, 8) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_the_hoelder_exponent_is_linear_over_the_run():
    cfg = Config(steps=3, updates_per_step=3, loss="hoelder", hoelder_p=2.0, hoelder_p_end=-2.0)
    assert [hoelder_exponent(cfg, i) for i in (0, 2, 4, 8)] == [2.0, 1.0, 0.0, -2.0]
    assert hoelder_exponent(replace(cfg, steps=1, updates_per_step=1), 0) == 2.0


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"updates_per_step": 1}, "clip=both has no effect"),
        ({"updates_per_step": 1, "loss": "gspo"}, "loss=gspo has no effect"),
        ({"updates_per_step": 1, "loss": "cispo", "clip": "both"}, "loss=cispo has no effect"),
        ({"cispo_cap": 4.0}, "cispo_cap=4.0 has no effect with loss=grpo"),
        ({"hoelder_p": 1.0, "loss": "gspo"}, "hoelder_p=1.0 has no effect with loss=gspo"),
        ({"hoelder_p_end": 1.0}, "hoelder_p_end=1.0 has no effect"),
        ({"loss": "cispo", "clip": "off"}, "clip=off has no effect with loss=cispo, which has"),
        ({"loss": "cispo", "clip_high": 0.28}, "clip_high=0.28 has no effect with loss=cispo"),
        ({"clip_low": 1.0}, "clip_low=1.0 has no effect"),
        ({"clip_low": 1.0, "clip": "low"}, "clip_low=1.0 has no effect"),
        ({"base_every": 5, "kl_coef": 0.1}, "base_every=5 has no effect"),
        ({"base_every": 5, "reward": "self_certainty(base)"}, "base_every=5 has no effect"),
        ({"base_every": 5, **FULL}, "base_every=5 has no effect with lora_r=0"),
        ({"base_every": 5, "kl_coef": 0.1, **FULL}, "base_every=5 has no effect"),
        ({"lora_alpha": 16, **FULL}, "lora_alpha=16 has no effect with lora_r=0"),
        ({"rollout_weights": "merged", **FULL}, "rollout_weights=merged has no effect with lora_r"),
        ({"eval_every": 0, "eval_n": 9}, "eval_n=9 has no effect on training with eval_every=0"),
        ({"eval_every": 0, "eval_k": 4}, "eval_k=4 has no effect on training with eval_every=0"),
        ({"eval_every": 0, "eval_temperature": 0.5}, "eval_temperature=0.5 has no effect"),
        ({"eval_every": 0, "eval_new_tokens": 9}, "eval_new_tokens=9 has no effect"),
        ({"one_shot": "pi_1", "keep_duplicates": True}, "keep_duplicates=True has no effect"),
        ({"group_size": 1}, "every advantage is 0"),
        ({"clip": "off", "clip_high": 0.28}, "clip_high=0.28 has no effect"),
        ({"clip": "high", "clip_low": 0.1}, "clip_low=0.1 has no effect"),
        ({"kl_type": "k1"}, "kl_type=k1 has no effect"),
        ({"eval_k": 4}, "eval_k=4 has no effect"),
        ({"optimizer": "sgd", "adam_betas": (0.9, 0.999)}, "has no effect with optimizer=sgd"),
        ({"reward": "constant(0.5)"}, "no weight moves"),
        ({"reward": "constant(0.5)", "truncated": "mask"}, "no weight moves"),
        ({"reward": "constant(0.5)", "kl_coef": 0.1}, "teaches nothing"),
    ],
)
def test_a_setting_without_effect_warns_once(changes, word):
    warnings = check(replace(Config(), **changes))
    assert sum(word in w for w in warnings) == 1 and len(warnings) == 1
    assert check(Config()) == []
    assert check(Config(group_size=1, adv_norm="raw", loss="gspo", base_every=7)) == []
    # A constant reward acts without a baseline, or if cut-off responses get another reward.
    assert check(Config(reward="constant", adv_norm="raw")) == []
    assert check(Config(reward="constant", truncated="zero")) == []
    # The KL moves weights whatever the reward is.
    assert "no weight moves" not in check(Config(reward="constant", kl_coef=0.1))[0]


@pytest.mark.parametrize(
    "changes,clips",
    [
        ({}, True),
        ({"updates_per_step": 1}, False),
        ({"clip": "off"}, False),
        ({"clip": "off", "loss": "cispo"}, True),
        ({"clip": "low", "clip_low": 0.99}, True),
        ({"clip": "low", "clip_low": 1.0}, False),
        ({"clip": "both", "clip_low": 1.0}, True),
        ({"clip": "high", "clip_low": 1.0}, True),
        ({"clip": "low", "clip_low": 1.0, "loss": "cispo"}, True),
    ],
)
def test_whether_anything_can_be_clipped(changes, clips):
    cfg = Config(**changes)
    assert can_clip(cfg) == clips
    idle = {"flat_groups": 0.5, "clip_frac_low": 0.0, "clip_frac_high": 0.0, "grad_norm": 1.0}
    assert bool(early_warning(cfg, [idle | {"truncated": 0.0}] * 10)) == clips


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 1, "adv_norm": "leave_one_out"}, "adv_norm=leave_one_out"),
        ({"cispo_cap": 1.0}, "cispo_cap=1.0"),
        ({"base_every": 0}, "base_every=0"),
        ({"prompts_per_step": 1, "group_size": 4}, "updates_per_step=8"),
        ({"lora_r": 0, "quant": "nf4"}, "--quant=none"),
        ({"lora_r": 0, "quant": "none", "dtype": "bfloat16"}, "--dtype=float32"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"max_new_tokens": 1000}, "256 positions"),
        ({"max_prompt_tokens": 2}, "max_prompt_tokens"),
        ({"reward": "formt"}, "format"),
        ({"train_data": "no/such.jsonl"}, "no/such.jsonl"),
        ({"device": "warp"}, "warp"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run_behind(small, changes, word, tmp_path):
    with pytest.raises(UserError) as error:
        train(replace(small, **changes))
    assert word in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_whole_eval_set_is_kept_out_of_training_whatever_eval_n(small, tiny_random, capsys):
    with pytest.raises(UserError, match="eval_data"):
        train(replace(small, train_data=f"{tiny_random}/test.jsonl", eval_n=10))
    with open(f"{tiny_random}/test.jsonl") as a, open(f"{small.out_dir}.jsonl", "w") as b:
        b.write(a.read())
        b.write('{"problem": "Start: 1 add 1?", "answer": "2"}\n')
    train(replace(small, train_data=f"{small.out_dir}.jsonl", eval_n=10))
    assert "train: 1 problems" in capsys.readouterr().out


@pytest.mark.slow
def test_threads_are_set_and_a_small_model_has_one(small):
    try:
        train(replace(small, steps=1))
        assert torch.get_num_threads() == 1
        train(replace(small, steps=1, threads=2, out_dir=small.out_dir + "2"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_no_cuda_means_the_tiny_scale(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scale, reason = choose_scale({})
    assert scale.endswith("tiny.py") and "CUDA" in reason and "config/model" in reason


# --------------------------------------------------------------------------------------- real model


@pytest.mark.slow
def test_a_real_model_on_real_problems(shared, tmp_path):
    """stories260K in NF4 on MATH problems, from text to an updated adapter."""
    cfg = run_config(
        str(shared / "models" / "stories260K"),
        tmp_path / "run",
        quant="nf4",
        train_data=str(shared / "data" / "math_train" / "train.jsonl"),
        eval_data=str(shared / "data" / "math500" / "test.jsonl"),
        max_prompt_tokens=64,
        max_new_tokens=16,
        group_size=4,
        lr=1e-3,
        eval_every=2,
        eval_n=4,
        dtype="auto",
    )
    history = train(cfg)
    assert [m["step"] for m in history] == [0, 1, 2] and history[-1]["kl"] > 0
    assert history[-1]["grad_norm"] > 0 and history[-1]["ratio_max"] > 1
