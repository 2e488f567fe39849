"""Jobs, demo and sweep: planning, naming and state of runs, mostly with made-up run folders."""

import json
import os
import signal
import threading
from dataclasses import asdict, replace

import pytest
from conftest import write_state
from test_figures import write_run

from harness import configurator
from harness.errors import UserError
from tools import demo, sweep
from tools.demo import demo_jobs, demo_table
from tools.parts import jobs
from tools.parts.arms import load_arms

# ---- demo and jobs


def test_demo_keeps_resumes_and_restarts(tmp_path):
    cfg = demo.DemoConfig(out=str(tmp_path), seeds=2, steps=4)
    planned = demo_jobs(cfg)
    assert len({job.folder for job in planned}) == 2 * len(demo.EXPERIMENTS)
    job = planned[0]
    assert jobs.state(job) == "new"
    config = asdict(job.config)
    assert config["steps"] == 4 and config["model"] == "tiny"
    write_run(job.folder, last=2, **{k: v for k, v in config.items() if k != "seed"})
    assert jobs.state(job) == "restart"  # there is no checkpoint
    write_state(job.folder, 2)
    assert jobs.state(job) == "resume"
    with (job.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # cut off in the middle
    assert jobs.state(job) == "resume"
    # A step is logged before it is saved, and saved before it is evaluated.
    rows = ['{"step": 4}\n', '{"step": 4, "eval_accuracy": 0.5}\n']
    job.folder.joinpath("metrics.jsonl").write_text(rows[1])
    assert jobs.state(job) == "resume"
    write_state(job.folder, 4)
    assert jobs.state(job) == "complete"
    job.folder.joinpath("metrics.jsonl").write_text(rows[0])
    assert jobs.state(job) == "resume"
    longer = demo_jobs(demo.DemoConfig(out=str(tmp_path), steps=5))[0]
    with pytest.raises(UserError, match="steps=4.* 5"):
        jobs.state(longer)


def test_demo_runs_any_experiment(tmp_path):
    every = demo_jobs(demo.DemoConfig(out=str(tmp_path), seeds=1, experiments=("all",)))
    assert len(every) == len(list((configurator.PROJECT / "config").glob("*.py"))) > 20
    two = demo.DemoConfig(out=str(tmp_path), seeds=1, experiments=("constant", "one_shot"))
    assert [job.args[0] for job in demo_jobs(two)] == ["config/constant.py", "config/one_shot.py"]
    with pytest.raises(UserError, match="experiments=randm: .*constant"):
        demo_jobs(demo.DemoConfig(experiments=("randm",)))


def test_demo_table_has_the_reward_and_arms_are_named_by_what_differs(tmp_path):
    for name, one_shot, values in (("a", "", (1, 2, 3)), ("b", "pi_1", (7, 7, 7))):
        write_run(tmp_path / name, reward="length", one_shot=one_shot)
        rows = [{"step": i, "reward": v, "eval_accuracy": 0.5} for i, v in enumerate(values)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    lines = demo_table(load_arms([tmp_path / "a", tmp_path / "b"])).splitlines()
    assert lines[3] == "| length | 1 | 50.0 | - | - | 2 to 2 |"
    assert lines[4].startswith("| length, one_shot=pi_1 | 1 | 50.0 |")
    assert lines[4].endswith("| 7 to 7 |")


def test_demo_names_the_log_of_a_failed_run_and_ends_the_others(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(
        "import sys, time\n"
        "if '--seed=0' in sys.argv: print('step 1'); sys.exit('error: broken')\n"
        "time.sleep(60)\n"
    )
    started = demo_jobs(demo.DemoConfig(out=str(tmp_path), seeds=2))[3:5]  # seeds 0 and 1
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)
    with pytest.raises(UserError, match=r"seed0\.log: .*broken"):
        jobs.run_jobs(started, at_once=2, poll=0.1)
    assert all(job.process.poll() is not None for job in started)


def test_demo_table_has_the_base_first(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed) for seed in range(3)]
    runs.append(write_run(tmp_path / "off", clip="off"))
    lines = demo_table(load_arms(runs)).splitlines()
    assert lines[2] == "| before training | 3 | 50.0 | 65.0 | 80.0 |  |"  # the seeds agree
    assert lines[3] == "| format, clip=both | 3 | 30.0 ± 15.3 | 65.0 | 80.0 |  |"


def write_complete(job, rows=None, **changes):
    """Write a finished run: config.json as train.py writes it, and made-up metrics."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.json").write_text(json.dumps({"config": asdict(job.config) | changes}))
    rows = rows or [{"step": job.config.steps, "eval_accuracy": 0.5}]
    write_state(job.folder, job.config.steps)
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_known_again_by_what_was_asked_not_by_what_memory_allowed(tmp_path):
    args = ["config/model/tiny.py", "--micro_batch_tokens=512"]
    settled = {"rollout_weights": "merged", "micro_batch_tokens": 256, "resume": True}
    for name, changes, verdict in [
        ("settled", settled, "complete"),
        ("larger", {"micro_batch_tokens": 1024}, "micro_batch_tokens=1024.* 512"),
        ("betas", {"adam_betas": [0.9, 0.95]}, "complete"),
        ("other", {"adam_betas": [0.9, 0.99]}, r"adam_betas=\[0.9, 0.99\].*\[0.9, 0.95\]"),
    ]:
        job = jobs.Job(tmp_path / name, args)
        write_complete(job, **changes)
        if verdict == "complete":
            assert jobs.state(job) == verdict
        else:
            with pytest.raises(UserError, match=verdict):
                jobs.state(job)
    # A run that is older than a setting counts as having its default.
    for extra, verdict in (([], "complete"), (["--one_shot=pi_1"], "one_shot=.*pi_1")):
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
    assert str(tmp_path / "out") in capsys.readouterr().err


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
    assert jobs.how_many(many) == 5  # the scale file sets device=cpu
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
    assert list(grid) == [
        "clip=both,lr=1e-4",
        "clip=both,lr=3e-4",
        "clip=off,lr=1e-4",
        "clip=off,lr=3e-4",
    ]
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
    assert printed.count("warning: clip=both:") == 1  # once per arm


def test_the_tasks_of_a_job_array_make_the_sweep_between_them(tmp_path):
    argv = [*RUN, "--clip=both,off"]
    cfg = sweep.SweepConfig(seeds=3, first_seed=5, out=str(tmp_path))
    tasks = [sweep.plan(replace(cfg, task=i), argv) for i in range(3)]
    assert [job.folder.name for job in tasks[1]] == ["seed6", "seed6"]
    assert [job for jobs in tasks for job in jobs] == sweep.plan(cfg, argv)


def test_errors_of_sweep_are_one_line(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "sweep.json").write_text('{"arms": ["a"]}')
    for argv, words in [
        ([*RUN, "--clip=both,of"], "clip.*'of'"),
        ([*RUN, "--lr=1e-4,"], "--lr=1e-4,:"),
        ([*RUN, "--lr=1e-4,0.0001"], "lr=0.0001.*lr=1e-4"),
        ([*RUN, "--lr=1e-4,1e-4"], "lr=1e-4"),
        ([*RUN, "--lr=1,2", "--lr=3,4"], "--lr=3,4: lr"),
        ([*RUN, "--lrr=1,2"], "lrr.* lr"),
        ([*RUN, "-lr=1,2"], "-lr=1,2"),
        ([*RUN, "--seed=1,2"], "--seed=1,2.*--seeds"),
        ([*RUN, "--resume=True"], "--resume=True"),
        ([*RUN, "--seeds=0"], "seeds=0"),
        ([*RUN, "--seeds=2", "--task=2"], "task=2: .*0 to 1"),
        (["--only_report=True", "--task=0"], "task: "),
        ([*RUN, "--reward=random(0.5),fromat"], "'fromat'"),
        ([*RUN, "--only_report=True"], "random_reward.py: .*only_report"),
        (["--only_report=True"], "sweep.json"),
        (["--only_report=True", f"--out={tmp_path}/done"], f"{tmp_path}/done"),
    ]:
        out = [] if any("--out" in arg for arg in argv) else [f"--out={tmp_path}/none"]
        with pytest.raises(UserError, match=words) as error:
            sweep.main([*argv, *out])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()  # nothing is written before all arguments are checked


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
row["eval_accuracy"] = row["accuracy"]
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
from safetensors.numpy import save_file
save_file({}, folder / "state.safetensors", {"steps_done": "1"})
(folder / "adapter").mkdir(exist_ok=True)
(folder / "adapter" / "nanorlvr.json").write_text('{"steps_done": 1}')
"""


@pytest.mark.slow
def test_a_sweep_runs_resumes_is_kept_and_grows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)  # with a train.py that takes no time
    monkeypatch.setattr(jobs.tiny, "resolve", lambda name: name)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: threading.Event().wait(0.05))
    (tmp_path / "train.py").write_text(FAKE)
    config = asdict(jobs.Job(tmp_path, [*RUN, "--steps=1"]).config)
    (tmp_path / "base.json").write_text(json.dumps(config))

    def figures(*more):
        sweep.main([*RUN, "--steps=1", "--clip=both,off", f"--out={tmp_path}/sweep", *more])
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    result, printed = figures("--seeds=2", "--jobs=2")
    assert "kept" not in printed
    assert [arm["seeds"] for arm in result["arms"].values()] == [[0, 1], [0, 1]]
    parts = [*RUN, "--steps=1", "--clip=both,off", "--seeds=2", f"--out={tmp_path}/parts"]
    for task in (1, 0):
        sweep.main([*parts, f"--task={task}"])
    assert not (tmp_path / "parts" / "table.md").exists()
    capsys.readouterr()
    sweep.main(["--only_report=True", f"--out={tmp_path}/parts"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["arms"] == result["arms"]
    assert result["pairs"][0]["difference"] == pytest.approx(1)
    stopped = tmp_path / "sweep" / "clip=off" / "seed1"
    write_state(stopped, 0)
    again, printed = figures("--seeds=2", "--jobs=2")
    assert "3 of 4 runs" in printed and again == result
    more, printed = figures("--seeds=3", "--jobs=2")
    assert "4 of 6 runs" in printed
    assert more["arms"]["clip=off"]["accuracy"]["values"] == pytest.approx([1, 1.1, 1.2])
    with pytest.raises(UserError, match="clip=both/seed0: .*steps=1.* 2"):
        sweep.main([*RUN, "--steps=2", "--clip=both,off", f"--out={tmp_path}/sweep"])
    # Seeds of another configuration are refused before they run.
    with pytest.raises(UserError, match=r"clip=both/seed0: .*lr=.* 0.5"):
        figures("--seeds=1", "--first_seed=7", "--lr=0.5")
    assert not (tmp_path / "sweep" / "clip=both" / "seed7").exists()
