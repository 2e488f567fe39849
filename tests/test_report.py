"""The report of a sweep, on made-up run folders: intervals, pooling and averages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_sweep import RUN, write_complete

from harness.errors import UserError
from tools import sweep
from tools.parts.arms import Arm
from tools.parts.jobs import Job
from tools.parts.report import outcome, report_tables, summarize_arms
from tools.parts.sweep_runs import average_arms, load_sweep, parts_of, pool_sweeps
from tools.parts.tables import FEW_SEEDS


def test_outcome_of_a_run_by_hand():
    rows = [
        {"step": 0, "eval_accuracy": 0.1},
        {"step": 1, "accuracy": 0.2, "clip_frac": 0.0, "clip_high_bins": [0.5, None]},
        {"step": 2, "accuracy": 0.4, "clip_frac": 0.03, "kl": None, "eval_accuracy": 0.3},
        {"step": 3, "accuracy": 0.8, "clip_frac": 0.0, "kl": None},
    ]
    assert outcome(rows, "eval_accuracy", 2) == 0.3
    assert outcome(rows, "clip_frac", 2) == pytest.approx(0.01)
    assert outcome(rows, "accuracy", 2) == pytest.approx(0.6)
    assert np.isnan(outcome(rows, "kl", 2))
    assert np.isnan(outcome(rows, "clip_high_bins", 2))


def write_sweep(out, values, args=None, **changes):
    """Make a sweep's folder with complete runs of 4 steps.

    values: arm -> seed -> accuracy at the end. args: arm -> train.py arguments (None: RUN for all).
    changes: to every config.json.
    """
    for name, seeds in values.items():
        for seed, value in seeds.items():
            arm_args = args[name] if args else RUN
            more = [f"--seed={seed}", "--steps=4"]
            job = Job(out / name / f"seed{seed}", [*arm_args, *more])
            first = {"step": 0, "eval_accuracy": 0.5, "eval_code_frequency": 0.6}
            last = {"step": 4, "eval_accuracy": value, "eval_code_frequency": value / 2}
            last |= {"accuracy": value, "clip_frac_low": 0.001, "clip_frac_high": 4e-4}
            write_complete(job, [first, last], **changes)
    (out / "sweep.json").write_text(json.dumps({"arms": list(values)}))


def test_paired_interval_is_that_of_scipy(tmp_path, capsys):
    values = {
        "clip=both": {0: 0.50, 1: 0.62, 2: 0.55, 10: 0.40},
        "clip=off": {0: 0.41, 1: 0.60, 2: 0.38, 3: 0.9},
    }
    write_sweep(tmp_path, values)
    half_done = tmp_path / "clip=off" / "seed10"
    write_complete(Job(half_done, [*RUN, "--steps=4"]), [{"step": 2, "eval_accuracy": 1.0}])
    begun = tmp_path / "clip=off" / "seed11"  # a sweep that is still running
    write_complete(Job(begun, [*RUN, "--steps=4"]))
    (begun / "metrics.jsonl").write_text("")
    sweep.main(["--only_report=True", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["arms"]["clip=both"]["seeds"] == [0, 1, 2, 10]
    assert result["arms"]["clip=off"]["seeds"] == [0, 1, 2, 3]
    pair = result["pairs"][0]
    off, both = ([values[arm][seed] for seed in (0, 1, 2)] for arm in ("clip=off", "clip=both"))
    expected = stats.ttest_rel(off, both).confidence_interval(0.95)
    assert (pair["a"], pair["b"], pair["n"]) == ("clip=both", "clip=off", 3)
    assert (pair["low"], pair["high"]) == pytest.approx((expected.low, expected.high))
    assert pair["difference"] == pytest.approx(np.mean(np.subtract(off, both)))
    both = list(values["clip=both"].values())
    entry = result["arms"]["clip=both"]["eval_accuracy"]
    assert entry["values"] == both and entry["mean"] == pytest.approx(np.mean(both))
    assert entry["stderr"] == pytest.approx(np.std(both, ddof=1) / 2)
    table = (tmp_path / "table.md").read_text()
    assert table in printed and FEW_SEEDS.capitalize() not in table
    assert "| clip=both | 4 | 51.8 ± 4.6 | 25.9 ± 2.3 | 51.8 ± 4.6 | 1.4e-03 ± 0 |" in table
    row = f"| -9.3 [{100 * expected.low:+.1f}, {100 * expected.high:+.1f}] |"
    assert f"| clip=off − clip=both | 3 {row}" in table
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_sweep_says_which_runs_collapsed():
    def arm(label: str, *ends: float) -> Arm:
        runs = [
            [{"step": i, "accuracy": 0.5 if i <= 10 else end} for i in range(1, 21)] for end in ends
        ]
        return Arm(label, [Path(f"{label}/seed{i}") for i in range(len(ends))], runs)

    result = summarize_arms([arm("a", 0.1, 0.6, 0.1), arm("b", 0.5, 0.5, 0.5)], ["accuracy"], 5)
    assert result["arms"]["a"]["collapsed"] == [14, None, 14]
    table = report_tables(result, ["accuracy"], 5)
    assert "2 of 3 (step 14, 14)" in table and "0 of 3" in table
    whole = summarize_arms([arm("b", 0.5, 0.5, 0.5)], ["accuracy"], 5)
    assert "collapsed" not in report_tables(whole, ["accuracy"], 5)


def test_runs_of_an_arm_differ_only_in_their_seed(tmp_path):
    """Seeds at two learning rates in one folder are refused."""
    old = {"a": {3: 0.4}}
    write_sweep(tmp_path, old, {"a": [*RUN, "--micro_batch_tokens=128"]}, rollout_weights="merged")
    path = tmp_path / "a" / "seed3" / "config.json"
    config = json.loads(path.read_text())["config"]
    del config["optimizer"]  # an older run, from when adamw was the only optimizer
    path.write_text(json.dumps({"config": config}))
    write_sweep(tmp_path, {"a": {0: 0.5, 1: 0.6}}, {"a": [*RUN, "--adam_betas=.9,.95"]})
    (arm,) = load_sweep(tmp_path)
    assert len(arm.runs) == 3
    write_sweep(tmp_path, {"a": {5: 0.9}}, {"a": [*RUN, "--lr=3e-4"]})
    with pytest.raises(UserError, match=r"a/seed5: .*lr=0.0003, .*a/seed0"):
        load_sweep(tmp_path)


COINS = ["--clip=off,both", "--reward=random(0.5),~random(0.5)"]
AVERAGE = ["--only_report=True", "--average=reward", "--report=accuracy", "--last=1"]


def test_a_seed_counts_once_and_sweeps_are_pooled(tmp_path, capsys):
    """--average takes the mean of a seed's two runs; --pool keeps seed 0 of both sweeps apart."""
    coin, flipped = "reward=random_0.5", "reward=~random_0.5"
    first = {
        f"clip=off,{coin}": {0: 0.2, 1: 0.4, 2: 0.3},
        f"clip=off,{flipped}": {0: 0.6, 1: 0.5},
        f"clip=both,{coin}": {0: 0.7, 1: 0.8},
        f"clip=both,{flipped}": {0: 0.3, 1: 0.2},
    }
    second = {name: {0: 0.1 * i, 5: 0.2} for i, name in enumerate(first)}
    write_sweep(tmp_path / "a", first, sweep.arms_of([*RUN, *COINS]))
    write_sweep(tmp_path / "b", second, sweep.arms_of([*RUN, *COINS, "--model=tiny_bad"]))
    sweep.main([*AVERAGE, f"--out={tmp_path}/a"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["arms"]["clip=off"]["accuracy"]["values"] == pytest.approx([0.4, 0.45])
    assert result["arms"]["clip=both"]["accuracy"]["values"] == pytest.approx([0.5, 0.5])
    sweep.main([*AVERAGE, f"--out={tmp_path}/a", f"--pool={tmp_path}/b"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    both, off = [0.5, 0.5, 0.25, 0.2], [0.4, 0.45, 0.05, 0.2]
    assert result["arms"]["clip=off"]["accuracy"]["values"] == pytest.approx(off)
    expected = stats.ttest_rel(both, off).confidence_interval(0.95)
    (pair,) = result["pairs"]
    assert (pair["a"], pair["n"]) == ("clip=off", 4)
    assert (pair["low"], pair["high"]) == pytest.approx((expected.low, expected.high))
    assert "model=tiny, tiny_bad (2 sweeps)" in printed
    with pytest.raises(UserError, match="average=lr"):
        sweep.main(["--only_report=True", f"--out={tmp_path}/a", "--average=lr"])
    shutil.rmtree(tmp_path / "a" / f"clip=off,{coin}")
    with pytest.raises(UserError, match="average=reward: .*clip=off,reward=random_0.5"):
        sweep.main([*AVERAGE, f"--out={tmp_path}/a"])


def test_what_cannot_be_pooled(tmp_path, capsys):
    a, b = ([*RUN, f"--clip={clip}"] for clip in ("both", "off"))
    values = {"a": {0: 0.5, 1: 0.6}, "b": {0: 0.4}}
    sweeps = {
        "out": (values, {"a": a, "b": b}),
        "same": ({"a": {1: 0.6}, "b": {4: 0.4}}, {"a": a, "b": b}),
        "fewer": ({"a": {2: 0.6}}, {"a": a}),
        "more": ({"a": {2: 0.6}, "b": {2: 0.6}, "c": {2: 0.6}}, {"a": a, "b": b, "c": RUN}),
        "mixed": (values, {"a": [*a, "--model=tiny_bad"], "b": [*b, "--model=tiny_bad", "--lr=1"]}),
        "half": (values, {"a": a, "b": [*b, "--lr=1"]}),
        "further": ({"a": {2: 0.6}, "b": {}}, {"a": a, "b": b}),
    }
    for name, (runs, args) in sweeps.items():
        write_sweep(tmp_path / name, runs, args)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for other, words in [
        ("out", "pool=.*out: .*out"),
        ("link", "pool=.*link: .*out"),
        ("same", "a/seed1 .*out/a/seed1"),
        ("fewer", "fewer .* b:"),
        ("more", "out .* c:"),
        ("mixed", "arm a .* model, .* b .* model, lr"),
        ("half", "half: .*a/seed0 .*out/a/seed0"),
    ]:
        command = ["--only_report=True", f"--out={tmp_path}/out", f"--pool={tmp_path}/{other}"]
        with pytest.raises(UserError, match=words) as error:
            sweep.main(command)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="further: .*further"):
        pool_sweeps([tmp_path / "out", *[tmp_path / "further"] * 2])
    arms, different = pool_sweeps([tmp_path / "out", tmp_path / "further"])
    assert [len(arm.runs) for arm in arms] == [3, 1] and different == {}
    sweep.main(["--only_report=True", f"--out={tmp_path}/out", f"--pool={tmp_path}/further"])
    assert "(2 sweeps)" in capsys.readouterr().out


def test_averages_are_by_configuration_and_named_without_the_key(tmp_path):
    """Values may hold commas, and an experiment file may set the averaged key."""
    betas = sweep.arms_of([*RUN, "--adam_betas=(.9,.95),(.9,.999)", "--clip=both,off"])
    values = {name: {0: 0.1 * i} for i, name in enumerate(betas)}
    write_sweep(tmp_path / "a", values, betas)
    arms = load_sweep(tmp_path / "a")
    assert [arm.label for arm in average_arms(arms, "adam_betas")] == ["clip=both", "clip=off"]
    means = [arm.runs[0][-1]["accuracy"] for arm in average_arms(arms, "adam_betas")]
    assert means == pytest.approx([0.1, 0.2])  # of 0 and .2, of .1 and .3
    labels = [arm.label for arm in average_arms(arms, "clip")]
    assert labels == ["adam_betas=_.9,.95", "adam_betas=_.9,.999"]
    parts = ["a,b", "lr=1", "adam_betas=_.9,.95_", "clip=off"]
    assert parts_of(",".join(parts)) == parts
    files = {"coin": [*RUN, "--reward=random(0.5)"], "flipped": [*RUN, "--reward=~random(0.5)"]}
    write_sweep(tmp_path / "b", {"coin": {0: 0.2}, "flipped": {0: 0.4}}, files)
    (one,) = average_arms(load_sweep(tmp_path / "b"), "reward")
    assert one.label == "coin" and one.runs[0][-1]["accuracy"] == pytest.approx(0.3)


def test_averages_separate_memory_settings_only_if_they_were_asked_for():
    def arm(name, reward, weights):
        return Arm(name, [], [], {"reward": reward, "rollout_weights": weights})

    settled = [arm("reward=a", "a", "merged"), arm("reward=b", "b", "adapter")]
    assert [one.label for one in average_arms(settled, "reward")] == ["reward"]
    asked = []
    for weights in ("merged", "adapter"):
        for reward in ("a", "b"):
            asked.append(arm(f"rollout_weights={weights},reward={reward}", reward, weights))
    labels = [one.label for one in average_arms(asked, "reward")]
    assert labels == ["rollout_weights=merged", "rollout_weights=adapter"]
    labels = [one.label for one in average_arms(asked, "rollout_weights")]
    assert labels == ["reward=a", "reward=b"]


def test_report_of_few_seeds_and_of_many_arms(tmp_path, capsys):
    write_sweep(tmp_path, {name: {0: 0.5, 1: 0.6} for name in "abcde"} | {"f": {}})
    only = ["--only_report=True", f"--out={tmp_path}"]
    sweep.main([*only, "--report=clip_frac,accuracy", "--last=3"])
    printed = capsys.readouterr().out
    assert FEW_SEEDS.capitalize() in (tmp_path / "table.md").read_text()
    pairs = json.loads(printed.splitlines()[-1])["pairs"]
    assert {pair["a"] for pair in pairs} == {"a"} and len(pairs) == 5 * 2  # each arm with the first
    assert (tmp_path / "figure.png").stat().st_size > 10_000  # of the five arms with runs
    assert "| f | 0 | - | - |" in printed and "| f − a | 0 | - | - |" in printed
    with pytest.raises(UserError, match="report=acuracy.* accuracy"):
        sweep.main([*only, "--report=acuracy"])
