"""Jobs, demo and sweep: plans, names, states and intervals, mostly on made-up run folders."""

import json
import os
import shutil
import signal
import threading
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats
from test_figures import write_run

from harness import configurator
from harness.errors import UserError
from tools import demo, plot, sweep
from tools.parts import jobs, report
from tools.parts.arms import Arm

# ---- demo and jobs


def test_demo_keeps_resumes_and_restarts(tmp_path):
    cfg = demo.DemoConfig(out=str(tmp_path), seeds=2, steps=4)
    planned = demo.plan(cfg)
    assert len({job.folder for job in planned}) == 2 * len(demo.EXPERIMENTS)
    job = planned[0]
    assert jobs.state(job) == "new"
    config = asdict(job.config)
    assert config["steps"] == 4 and config["model"] == "tiny"
    write_run(job.folder, last=2, **{k: v for k, v in config.items() if k != "seed"})
    assert jobs.state(job) == "restart"  # there is no checkpoint
    (job.folder / "state.safetensors").touch()
    assert jobs.state(job) == "resume"
    with (job.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # cut off in the middle
    assert jobs.state(job) == "resume"
    job.folder.joinpath("metrics.jsonl").write_text('{"step": 4}\n')
    assert jobs.state(job) == "complete"
    longer = demo.plan(demo.DemoConfig(out=str(tmp_path), steps=5))[0]
    with pytest.raises(UserError, match="steps=4, not 5"):
        jobs.state(longer)


def test_demo_runs_any_experiment(tmp_path):
    every = demo.plan(demo.DemoConfig(out=str(tmp_path), seeds=1, experiments=("all",)))
    assert len(every) == len(list((configurator.PROJECT / "config").glob("*.py"))) > 20
    two = demo.DemoConfig(out=str(tmp_path), seeds=1, experiments=("constant", "one_shot"))
    assert [job.args[0] for job in demo.plan(two)] == ["config/constant.py", "config/one_shot.py"]
    with pytest.raises(UserError, match="experiments=randm: no such file: there are constant"):
        demo.plan(demo.DemoConfig(experiments=("randm",)))


def test_demo_table_has_the_reward_and_arms_are_named_by_what_differs(tmp_path):
    for name, one_shot, values in (("a", "", (1, 2, 3)), ("b", "pi_1", (7, 7, 7))):
        write_run(tmp_path / name, reward="length", one_shot=one_shot)
        rows = [{"step": i, "reward": v, "eval_accuracy": 0.5} for i, v in enumerate(values)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    lines = demo.table(plot.load_arms([tmp_path / "a", tmp_path / "b"])).splitlines()
    assert lines[3] == "| length | 1 | 50.0 | - | - | 2 to 2 |"
    assert lines[4].startswith("| length, one_shot=pi_1 | 1 | 50.0 |")
    assert lines[4].endswith("| 7 to 7 |")


def test_demo_names_the_log_of_a_failed_run_and_ends_the_others(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(
        "import sys, time\n"
        "if '--seed=0' in sys.argv: print('step 1'); sys.exit('error: broken')\n"
        "time.sleep(60)\n"
    )
    started = demo.plan(demo.DemoConfig(out=str(tmp_path), seeds=2))[3:5]  # a seed 0 and a seed 1
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)
    with pytest.raises(UserError, match=r"seed0\.log: error: broken \(exit status 1\)"):
        jobs.run_jobs(started, at_once=2, poll=0.1)
    assert all(job.process.poll() is not None for job in started)


def test_demo_table_has_the_base_first(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed) for seed in range(3)]
    runs.append(write_run(tmp_path / "off", clip="off"))
    lines = demo.table(plot.load_arms(runs)).splitlines()
    assert lines[2] == "| before training | 3 | 50.0 | 65.0 | 80.0 |  |"  # the seeds agree there
    assert lines[3] == "| format, clip=both | 3 | 30.0 ± 15.3 | 65.0 | 80.0 |  |"


def write_complete(job, rows=None, **changes):
    """A finished run of a job: its config.json, as train.py writes it, and made-up metrics."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.json").write_text(json.dumps({"config": asdict(job.config) | changes}))
    rows = rows or [{"step": job.config.steps}]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_known_again_by_what_was_asked_not_by_what_memory_allowed(tmp_path):
    args = ["config/model/tiny.py", "--micro_batch_tokens=512"]
    settled = {"rollout_weights": "merged", "micro_batch_tokens": 256, "resume": True}
    for name, changes, verdict in [
        ("settled", settled, "complete"),
        ("larger", {"micro_batch_tokens": 1024}, "micro_batch_tokens=1024, not 512"),
        ("betas", {"adam_betas": [0.9, 0.95]}, "complete"),
        ("other", {"adam_betas": [0.9, 0.99]}, r"adam_betas=\[0.9, 0.99\], not \[0.9, 0.95\]"),
    ]:
        job = jobs.Job(tmp_path / name, args)
        write_complete(job, **changes)
        if verdict == "complete":
            assert jobs.state(job) == verdict
        else:
            with pytest.raises(UserError, match=verdict):
                jobs.state(job)
    # a run from before there was a knob had what is now its default
    for extra, verdict in (([], "complete"), (["--one_shot=pi_1"], "one_shot=, not pi_1")):
        job = jobs.Job(tmp_path / f"old{len(extra)}", [*args, *extra])
        write_complete(job)
        config = {k: v for k, v in asdict(job.config).items() if k != "one_shot"}
        (job.folder / "config.json").write_text(json.dumps({"config": config}))
        if verdict == "complete":
            assert jobs.state(job) == verdict
        else:
            with pytest.raises(UserError, match=verdict):
                jobs.state(job)


def test_term_ends_the_runs_like_ctrl_c(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)
    monkeypatch.setattr(jobs.tiny, "resolve", lambda name: name)
    planned = [jobs.Job(tmp_path / "out" / f"seed{i}", ["config/model/tiny.py"]) for i in (0, 1)]
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        jobs.run_all(planned, 2, tmp_path / "out")
    assert all(job.process.poll() is not None for job in planned)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "the same command goes on" in capsys.readouterr().err


def test_runs_at_a_time(tmp_path, monkeypatch):
    many = [jobs.Job(tmp_path, ["config/model/tiny.py"])] * 9
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.setattr(jobs, "available_memory", lambda: 100e9)
    assert jobs.how_many(many) == 5 and jobs.how_many(many[:2]) == 2
    monkeypatch.setattr(jobs, "available_memory", lambda: 4.6e9)
    assert jobs.how_many(many) == 3
    monkeypatch.setattr(jobs, "available_memory", lambda: 1e9)
    assert jobs.how_many(many) == 1
    monkeypatch.setattr(jobs, "available_memory", lambda: 100e9)
    monkeypatch.setattr(jobs.torch.cuda, "is_available", lambda: True)
    assert jobs.how_many(many) == 5  # its scale file names the CPU
    assert jobs.how_many([jobs.Job(tmp_path, ["config/model/tiny.py", "--device=auto"])] * 9) == 1


# ---- sweep: the plan

RUN = ["config/random_reward.py", "config/model/tiny.py"]


@pytest.mark.parametrize(
    "text, is_tuple, items",
    [
        ("both,off", False, ["both", "off"]),
        ("1e-4", False, ["1e-4"]),
        ("random(0.5), format & ~python", False, ["random(0.5)", "format & ~python"]),
        ("a(1,2),b((3,4),5)", False, ["a(1,2)", "b((3,4),5)"]),
        ("'one, two',three", False, ["'one, two'", "three"]),
        (".9,.95", True, [".9,.95"]),
        ("(.9,.95)", True, ["(.9,.95)"]),
        ("(.9,.95),(.9,.999)", True, ["(.9,.95)", "(.9,.999)"]),
        ("1,", False, ["1", ""]),
    ],
)
def test_comma_lists_split_at_the_top_only(text, is_tuple, items):
    assert sweep.split_list(text, is_tuple) == items


def test_arms_are_named_by_what_differs():
    grid = sweep.arms_of([*RUN, "--clip=both,off", "--lr=1e-4,3e-4", "--steps=6"])
    assert list(grid) == ["clip=both,lr=1e-4", "clip=both,lr=3e-4",
                          "clip=off,lr=1e-4", "clip=off,lr=3e-4"]  # fmt: skip
    assert grid["clip=off,lr=1e-4"] == [*RUN, "--steps=6", "--clip=off", "--lr=1e-4"]
    files = sweep.arms_of(["config/format.py", *RUN, "--adam_betas=.9,.95"])
    assert list(files) == ["format", "random_reward"]
    assert files["format"] == ["config/format.py", RUN[1], "--adam_betas=.9,.95"]
    assert list(sweep.arms_of(RUN)) == ["random_reward"]
    assert list(sweep.arms_of(RUN[1:])) == ["train"]
    rewards = sweep.arms_of([RUN[1], "--reward=random(0.5),format & ~python"])
    assert list(rewards) == ["reward=random_0.5", "reward=format_~python"]
    assert rewards["reward=format_~python"][-1] == "--reward=format & ~python"


def test_runs_are_planned_seed_by_seed(tmp_path, capsys):
    cfg = sweep.SweepConfig(seeds=2, out=str(tmp_path))
    planned = sweep.plan(cfg, [*RUN, "--clip=both,off", "--updates_per_step=1"])
    folders = [str(job.folder.relative_to(tmp_path)) for job in planned]
    assert folders == ["clip=both/seed0", "clip=off/seed0", "clip=both/seed1", "clip=off/seed1"]
    assert [job.config.seed for job in planned] == [0, 0, 1, 1]
    assert [job.config.clip for job in planned] == ["both", "off"] * 2
    assert planned[3].config.out_dir == str(planned[3].folder)
    printed = capsys.readouterr().out
    assert printed.count("warning: clip=both: clip=both cannot act") == 1  # once an arm


def test_errors_of_sweep_are_one_line(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "sweep.json").write_text('{"arms": ["a"]}')
    for argv, words in [
        ([*RUN, "--clip=both,of"], "clip must be one of both, high, low, off, got 'of'"),
        ([*RUN, "--lr=1e-4,"], "an empty value in the list: write lr=A,B"),
        ([*RUN, "--lr=1e-4,0.0001"], "lr=0.0001 and lr=1e-4 are the same configuration"),
        ([*RUN, "--lr=1e-4,1e-4"], "two arms are named lr=1e-4"),
        ([*RUN, "--lr=1,2", "--lr=3,4"], "lr is already given"),
        ([*RUN, "--lrr=1,2"], "unknown key 'lrr': did you mean lr"),
        ([*RUN, "-lr=1,2"], "write an option as one word"),
        ([*RUN, "--seed=1,2"], "the sweep sets it: use --seeds=N"),
        ([*RUN, "--resume=True"], "the sweep sets it$"),
        ([*RUN, "--seeds=0"], "seeds=0: must be at least 1"),
        ([*RUN, "--reward=random(0.5),fromat"], "no reward 'fromat'"),
        ([*RUN, "--only_report=True"], "only_report reads the folder"),
        (["--only_report=True"], "no readable sweep.json"),
        (["--only_report=True", f"--out={tmp_path}/done"], "no run of it is complete"),
    ]:
        out = [] if any("--out" in arg for arg in argv) else [f"--out={tmp_path}/none"]
        with pytest.raises(UserError, match=words) as error:
            sweep.main([*argv, *out])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()  # all of it was seen before anything was written


# ---- sweep: the report


def test_outcome_of_a_run_by_hand():
    rows = [{"step": 0, "eval_accuracy": 0.1},
            {"step": 1, "accuracy": 0.2, "clip_frac": 0.0, "clip_high_bins": [0.5, None]},
            {"step": 2, "accuracy": 0.4, "clip_frac": 0.03, "kl": None, "eval_accuracy": 0.3},
            {"step": 3, "accuracy": 0.8, "clip_frac": 0.0, "kl": None}]  # fmt: skip
    assert report.outcome(rows, "eval_accuracy", 2) == 0.3
    assert report.outcome(rows, "clip_frac", 2) == pytest.approx(0.01)
    assert report.outcome(rows, "accuracy", 2) == pytest.approx(0.6)
    assert np.isnan(report.outcome(rows, "kl", 2))
    assert np.isnan(report.outcome(rows, "clip_high_bins", 2))


def write_sweep(out, values, args=None, **changes):
    """A sweep's folder with complete runs of 4 steps: arm -> seed -> final accuracy.

    args: arm -> train.py arguments (None: the same of all); changes: of every config.json.
    """
    for name, seeds in values.items():
        for seed, value in seeds.items():
            more = [f"--seed={seed}", "--steps=4"]
            job = jobs.Job(out / name / f"seed{seed}", [*(args[name] if args else RUN), *more])
            rows = [{"step": 0, "eval_accuracy": 0.5, "eval_code_frequency": 0.6},
                    {"step": 4, "eval_accuracy": value, "eval_code_frequency": value / 2,
                     "accuracy": value, "clip_frac_low": 0.001,
                     "clip_frac_high": 4e-4}]  # fmt: skip
            write_complete(job, rows, **changes)
    (out / "sweep.json").write_text(json.dumps({"arms": list(values)}))


def test_paired_interval_is_that_of_scipy(tmp_path, capsys):
    values = {"clip=both": {0: 0.50, 1: 0.62, 2: 0.55, 10: 0.40},
              "clip=off": {0: 0.41, 1: 0.60, 2: 0.38, 3: 0.9}}  # fmt: skip
    write_sweep(tmp_path, values)
    half_done = tmp_path / "clip=off" / "seed10"
    write_complete(jobs.Job(half_done, [*RUN, "--steps=4"]), [{"step": 2, "eval_accuracy": 1.0}])
    begun = tmp_path / "clip=off" / "seed11"  # a sweep that runs beside
    write_complete(jobs.Job(begun, [*RUN, "--steps=4"]))
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
    assert table in printed and "conclusion" not in table
    assert "| clip=both | 4 | 51.8 ± 4.6 | 25.9 ± 2.3 | 51.8 ± 4.6 | 1.4e-03 ± 0 |" in table
    row = f"| -9.3 [{100 * expected.low:+.1f}, {100 * expected.high:+.1f}] |"
    assert f"| clip=off − clip=both | 3 {row}" in table
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_runs_of_an_arm_differ_in_their_seed_alone(tmp_path):
    """Two ranges of seeds at two learning rates in one folder are no arm."""
    old = {"a": {3: 0.4}}
    write_sweep(tmp_path, old, {"a": [*RUN, "--micro_batch_tokens=128"]}, rollout_weights="merged")
    path = tmp_path / "a" / "seed3" / "config.json"
    config = json.loads(path.read_text())["config"]
    del config["optimizer"]  # a run from before there was a choice had adamw
    path.write_text(json.dumps({"config": config}))
    write_sweep(tmp_path, {"a": {0: 0.5, 1: 0.6}}, {"a": [*RUN, "--adam_betas=.9,.95"]})
    (arm,) = report.load_sweep(tmp_path)
    assert len(arm.runs) == 3
    write_sweep(tmp_path, {"a": {5: 0.9}}, {"a": [*RUN, "--lr=3e-4"]})
    words = r"a/seed5: holds a run with lr=0.0003, not [\de.-]+ as in .*a/seed0: the runs of an arm"
    with pytest.raises(UserError, match=words):
        report.load_sweep(tmp_path)


COINS = ["--clip=off,both", "--reward=random(0.5),~random(0.5)"]
AVERAGE = ["--only_report=True", "--average=reward", "--report=accuracy", "--last=1"]


def test_a_seed_counts_once_and_sweeps_are_pooled(tmp_path, capsys):
    """--average: the mean of a seed's two runs; --pool: seed 0 of either sweep is its own."""
    coin, flipped = "reward=random_0.5", "reward=~random_0.5"
    first = {f"clip=off,{coin}": {0: 0.2, 1: 0.4, 2: 0.3}, f"clip=off,{flipped}": {0: 0.6, 1: 0.5},
             f"clip=both,{coin}": {0: 0.7, 1: 0.8},
             f"clip=both,{flipped}": {0: 0.3, 1: 0.2}}  # fmt: skip
    second = {name: {0: 0.1 * i, 5: 0.2} for i, name in enumerate(first)}
    write_sweep(tmp_path / "a", first, sweep.arms_of([*RUN, *COINS]))
    write_sweep(tmp_path / "b", second, sweep.arms_of([*RUN, *COINS, "--model=tiny_bad"]))
    sweep.main([*AVERAGE, f"--out={tmp_path}/a"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["arms"]["clip=off"]["accuracy"]["values"] == pytest.approx([0.4, 0.45])
    assert result["arms"]["clip=both"]["accuracy"]["values"] == pytest.approx([0.5, 0.5])
    assert "A seed counts once, as the mean of its runs over reward." in printed
    assert "Pooled" not in printed
    sweep.main([*AVERAGE, f"--out={tmp_path}/a", f"--pool={tmp_path}/b"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    both, off = [0.5, 0.5, 0.25, 0.2], [0.4, 0.45, 0.05, 0.2]
    assert result["arms"]["clip=off"]["accuracy"]["values"] == pytest.approx(off)
    expected = stats.ttest_rel(both, off).confidence_interval(0.95)
    (pair,) = result["pairs"]
    assert (pair["a"], pair["n"]) == ("clip=off", 4)
    assert (pair["low"], pair["high"]) == pytest.approx((expected.low, expected.high))
    assert "Pooled over model=tiny, tiny_bad (2 sweeps). A seed counts once" in printed
    with pytest.raises(UserError, match="average=lr: no two arms differ in it alone"):
        sweep.main(["--only_report=True", f"--out={tmp_path}/a", "--average=lr"])
    shutil.rmtree(tmp_path / "a" / f"clip=off,{coin}")
    with pytest.raises(UserError, match="average=reward: no run of clip=off,reward=random_0.5 is"):
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
        ("out", "the same folder as"),
        ("link", "pool=.*link: the same folder as .*out: name it once"),
        ("same", "its a/seed1 has the configuration and seed of .*out/a/seed1: a run counts once"),
        ("fewer", "fewer has no arm b"),
        ("more", "out has no arm c"),
        ("mixed", "arm a differs from that of .* in model, b in model, lr"),
        ("half", "its a/seed0 has the configuration and seed"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            sweep.main(
                ["--only_report=True", f"--out={tmp_path}/out", f"--pool={tmp_path}/{other}"]
            )
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="further: the same folder as .*further"):
        report.pool([tmp_path / "out", *[tmp_path / "further"] * 2])
    arms, knobs = report.pool([tmp_path / "out", tmp_path / "further"])
    assert [len(arm.runs) for arm in arms] == [3, 1] and knobs == {}
    sweep.main(["--only_report=True", f"--out={tmp_path}/out", f"--pool={tmp_path}/further"])
    assert "Pooled over seeds alone (2 sweeps)." in capsys.readouterr().out


def test_averages_are_by_configuration_and_named_less_the_key(tmp_path):
    """Values hold commas, and an experiment file may set the key that is averaged over."""
    betas = sweep.arms_of([*RUN, "--adam_betas=(.9,.95),(.9,.999)", "--clip=both,off"])
    values = {name: {0: 0.1 * i} for i, name in enumerate(betas)}
    write_sweep(tmp_path / "a", values, betas)
    arms = report.load_sweep(tmp_path / "a")
    assert [arm.label for arm in report.average(arms, "adam_betas")] == ["clip=both", "clip=off"]
    means = [arm.runs[0][-1]["accuracy"] for arm in report.average(arms, "adam_betas")]
    assert means == pytest.approx([0.1, 0.2])  # of 0 and .2, of .1 and .3
    labels = [arm.label for arm in report.average(arms, "clip")]
    assert labels == ["adam_betas=_.9,.95", "adam_betas=_.9,.999"]
    assert report.parts_of("a,b,lr=1,adam_betas=_.9,.95_,clip=off") == [
        "a,b", "lr=1", "adam_betas=_.9,.95_", "clip=off"]  # fmt: skip
    files = {"coin": [*RUN, "--reward=random(0.5)"], "flipped": [*RUN, "--reward=~random(0.5)"]}
    write_sweep(tmp_path / "b", {"coin": {0: 0.2}, "flipped": {0: 0.4}}, files)
    (one,) = report.average(report.load_sweep(tmp_path / "b"), "reward")
    assert one.label == "coin" and one.runs[0][-1]["accuracy"] == pytest.approx(0.3)


def test_averages_tell_apart_what_memory_settles_only_where_it_was_asked_for():
    def arm(name, reward, weights):
        return Arm(name, [], [], {"reward": reward, "rollout_weights": weights})

    settled = [arm("reward=a", "a", "merged"), arm("reward=b", "b", "adapter")]
    assert [one.label for one in report.average(settled, "reward")] == ["reward"]
    asked = [arm(f"rollout_weights={w},reward={r}", r, w)
             for w in ("merged", "adapter") for r in "ab"]  # fmt: skip
    labels = [one.label for one in report.average(asked, "reward")]
    assert labels == ["rollout_weights=merged", "rollout_weights=adapter"]
    assert [one.label for one in report.average(asked, "rollout_weights")] == [
        "reward=a",
        "reward=b",
    ]


def test_report_of_few_seeds_and_of_many_arms(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "draw", lambda arms, path, *keys: drawn.append((arms, *keys)))
    drawn: list = []
    write_sweep(tmp_path, {name: {0: 0.5, 1: 0.6} for name in "abcde"} | {"f": {}})
    only = ["--only_report=True", f"--out={tmp_path}"]
    sweep.main([*only, "--report=clip_frac,accuracy", "--last=3"])
    printed = capsys.readouterr().out
    assert "**Fewer than 3 seeds: no conclusion.**" in (tmp_path / "table.md").read_text()
    pairs = json.loads(printed.splitlines()[-1])["pairs"]
    assert {pair["a"] for pair in pairs} == {"a"} and len(pairs) == 5 * 2  # each with the first
    assert [arm.label for arm in drawn[0][0]] == list("abcde")
    assert drawn[0][1] == ["clip_frac", "accuracy"]
    assert "| f | 0 | - | - |" in printed and "| f − a | 0 | - | - |" in printed
    with pytest.raises(UserError, match="report=acuracy: no number .* did you mean accuracy"):
        sweep.main([*only, "--report=acuracy"])


FAKE = """
import json, pathlib, sys
given = dict(arg[2:].split("=", 1) for arg in sys.argv[1:] if arg.startswith("--"))
base = json.loads(pathlib.Path(__file__).with_name("base.json").read_text())
folder = pathlib.Path(given["out_dir"])
assert ("resume" in given) == (folder / "state.safetensors").exists()
changes = {"clip": given["clip"], "seed": int(given["seed"]), "rollout_weights": "merged"}
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps({"config": base | changes}))
row = {"step": 1, "accuracy": 0.1 * changes["seed"] + (given["clip"] == "off")}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
"""


def test_a_sweep_runs_resumes_is_kept_and_grows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)  # its train.py takes no time
    monkeypatch.setattr(jobs.tiny, "resolve", lambda name: name)
    monkeypatch.setattr(report, "draw", lambda *args: None)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: threading.Event().wait(0.05))
    (tmp_path / "train.py").write_text(FAKE)
    config = asdict(jobs.Job(tmp_path, [*RUN, "--steps=1"]).config)
    (tmp_path / "base.json").write_text(json.dumps(config))

    def figures(*more):
        sweep.main([*RUN, "--steps=1", "--clip=both,off", f"--out={tmp_path}/sweep", *more])
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    result, printed = figures("--seeds=2", "--jobs=2")
    assert "2 arms x 2 seeds, 2 at a time" in printed and "are complete" not in printed
    assert [arm["seeds"] for arm in result["arms"].values()] == [[0, 1], [0, 1]]
    assert result["pairs"][0]["difference"] == pytest.approx(1)
    stopped = tmp_path / "sweep" / "clip=off" / "seed1"
    (stopped / "metrics.jsonl").write_text("")
    (stopped / "state.safetensors").touch()
    again, printed = figures("--seeds=2", "--jobs=2")
    assert "3 of 4 runs are complete and kept" in printed and again == result
    more, printed = figures("--seeds=3", "--jobs=2")
    assert "4 of 6 runs are complete and kept" in printed
    assert more["arms"]["clip=off"]["accuracy"]["values"] == pytest.approx([1, 1.1, 1.2])
    with pytest.raises(UserError, match="clip=both/seed0: holds a run with steps=1, not 2"):
        sweep.main([*RUN, "--steps=2", "--clip=both,off", f"--out={tmp_path}/sweep"])
    # seeds of another configuration are refused before they are run
    with pytest.raises(UserError, match=r"clip=both/seed0: holds a run with lr=[\de.-]+, not 0.5"):
        figures("--seeds=1", "--first_seed=7", "--lr=0.5")
    assert not (tmp_path / "sweep" / "clip=both" / "seed7").exists()
