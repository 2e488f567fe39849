"""Plots, demo, bench and sample: grouping and errors by hand, the rest on throwaway models."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import configurator
import sample
import tiny
from configurator import UserError, configure
from lora import add_lora, lora_layers, save_adapter
from settings import Config
from tools import bench, demo, machine, peers, plot, workload

ACCURACY = {0: (0.5, 0.9, 0.1), 1: (0.5, 0.7, 0.2), 2: (0.5, 0.8, 0.6)}  # at steps 0, 2, 4


def write_run(folder, seed=0, last=4, **config):
    """A run folder with made-up metrics: evals at steps 0, 2, 4, training rows from step 1."""
    folder.mkdir(parents=True)
    config = {"reward": "format", "clip": "both", "seed": seed, "out_dir": str(folder), **config}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    rows = [{"step": step} for step in range(last + 1)]
    for row in rows[1:]:
        row |= {"accuracy": 0.1 * row["step"], "kl": None, "clip_frac_low": 0.0,
                "clip_frac_high": 0.0 if row["step"] == 1 else 0.002}  # fmt: skip
    for row, value in zip(rows[::2], ACCURACY[seed], strict=False):
        row |= {"eval_accuracy": value, "eval_stderr": 0.02, "eval_code_frequency": 0.65,
                "eval_boxed": 0.8}  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed) for seed in range(3)]
    return [*runs, write_run(tmp_path / "off", clip="off")]


# ---- plot


def test_runs_that_differ_only_in_seed_are_one_arm(folders):
    arms = plot.load_arms(folders)
    assert [arm.label for arm in arms] == ["format, clip=both", "format, clip=off"]
    assert [len(arm.runs) for arm in arms] == [3, 1]
    assert plot.load_arms(folders[:3])[0].label == "format"  # nothing differs


def test_mean_and_standard_error_by_hand(folders):
    three, one = plot.load_arms(folders)
    steps, mean, error = three.curve("eval_accuracy")
    assert steps.tolist() == [0, 2, 4]
    assert mean == pytest.approx([0.5, 0.8, 0.3])
    # of .9 .7 .8: variance (.01 + .01) / 2; of .1 .2 .6: (.04 + .01 + .09) / 2. Before training all
    # seeds measure the same model on the same samples, which is no estimate of an error.
    assert error[1:] == pytest.approx([(0.01 / 3) ** 0.5, (0.07 / 3) ** 0.5])
    assert np.isnan(error[0])
    assert one.curve("eval_accuracy")[2] == pytest.approx(0.02)  # one seed: over problems
    assert np.isnan(one.curve("accuracy")[2]).all()
    assert three.curve("clip_frac")[1] == pytest.approx([0, 0.002, 0.002, 0.002])
    assert three.curve("accuracy", 3)[1] == pytest.approx([0.1, 0.15, 0.2, 0.3])
    assert len(three.curve("kl")[0]) == 0  # null throughout


def test_mean_ends_where_the_shortest_run_ends(tmp_path):
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, last=2)]
    steps, mean, _ = plot.load_arms(runs)[0].curve("eval_accuracy")
    assert steps.tolist() == [0, 2]
    assert mean == pytest.approx([0.5, 0.8])


def test_figure_and_table(folders, tmp_path, capsys):
    from matplotlib.image import imread

    out = tmp_path / "new" / "figure.png"
    plot.main([*map(str, folders), f"--out={out}"])
    pixels = imread(out)
    assert pixels.shape[1] == 1600
    assert pixels.std() > 0.05  # something is drawn
    printed = capsys.readouterr().out
    assert "| format, clip=both | 3 | 50.0 | 30.0 ± 15.3 | 65.0 | 65.0 |" in printed
    assert "| format, clip=off | 1 | 50.0 ± 2.0 | 10.0 ± 2.0 | 65.0 | 65.0 |" in printed


def test_errors_of_plot_are_one_line(folders, tmp_path):
    empty, no_metrics, copy = (tmp_path / name for name in ("empty", "none", "copy"))
    (write_run(empty) / "metrics.jsonl").write_text("")
    (write_run(no_metrics) / "metrics.jsonl").unlink()
    write_run(copy)
    a = str(folders[0])
    for argv, words in [
        ([], "no runs named"),
        ([str(tmp_path / "absent")], "absent"),
        ([str(empty)], "holds no metrics"),
        ([str(no_metrics)], "cannot be read"),
        ([a, str(copy)], "the same configuration and seed"),
        ([a, "--metrics=acuracy"], "did you mean accuracy"),
        ([a, "--metrics=kl"], "no values"),
        ([a, f"--out={tmp_path}/figure.xyz"], "cannot be written"),
        ([a, "out=figure.png"], "write --out=figure.png"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            plot.main(argv)
        assert "\n" not in str(error.value)


# ---- demo


def test_demo_keeps_resumes_and_restarts(tmp_path):
    cfg = demo.DemoConfig(out=str(tmp_path), seeds=2, steps=4)
    jobs = demo.plan(cfg)
    assert len({job.folder for job in jobs}) == 2 * len(demo.EXPERIMENTS)
    job = jobs[0]
    assert demo.state(job) == "new"
    config = asdict(configure(Config, job.args)[0])
    assert config["steps"] == 4 and config["model"] == "tiny"
    write_run(job.folder, last=2, **{k: v for k, v in config.items() if k != "seed"})
    assert demo.state(job) == "restart"  # there is no checkpoint
    (job.folder / "state.safetensors").touch()
    assert demo.state(job) == "resume"
    with (job.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # cut off in the middle
    assert demo.state(job) == "resume"
    job.folder.joinpath("metrics.jsonl").write_text('{"step": 4}\n')
    assert demo.state(job) == "complete"
    longer = demo.plan(demo.DemoConfig(out=str(tmp_path), steps=5))[0]
    with pytest.raises(UserError, match="steps=4, not 5"):
        demo.state(longer)


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
    jobs = demo.plan(demo.DemoConfig(out=str(tmp_path), seeds=2))[3:5]  # a seed 0 and a seed 1
    monkeypatch.setattr(demo, "PROJECT", tmp_path)
    with pytest.raises(UserError, match=r"seed0\.log: error: broken \(exit status 1\)"):
        demo.run_jobs(jobs, at_once=2, poll=0.1)
    assert all(job.process.poll() is not None for job in jobs)


def test_demo_table_has_the_base_first(folders):
    lines = demo.table(plot.load_arms(folders)).splitlines()
    assert lines[2] == "| before training | 3 | 50.0 | 65.0 | 80.0 |  |"  # the seeds agree there
    assert lines[3] == "| format, clip=both | 3 | 30.0 ± 15.3 | 65.0 | 80.0 |  |"


# ---- bench


SMALL = {"arch": "tiny-random", "prompts": 2, "group": 2, "prompt_tokens": 6, "new_tokens": 9,
         "updates": 2, "repeats": 1, "device": "cpu"}  # fmt: skip


def options(*more):
    """SMALL and more options, which win, as a command line."""
    given = dict(option.removeprefix("--").split("=") for option in more)
    return [f"--{key}={value}" for key, value in (SMALL | given).items()]


def run_bench(capsys, *more):
    """The JSON of the last line, and all that was printed."""
    bench.main(options(*more))
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


@pytest.mark.parametrize("lora_r", [4, 0])
def test_bench_ends_in_json(capsys, lora_r):
    result, printed = run_bench(capsys, "--lengths=equal", f"--lora_r={lora_r}", "--threads=1")
    assert result["threads"] == 1 == torch.get_num_threads()
    for phase in bench.PHASES:
        assert result[f"{phase}_s"] > 0
        assert result[f"{phase}_tokens_per_s"] == pytest.approx(36 / result[f"{phase}_s"])
        assert result[f"{phase}_peak_gb"] >= result[f"{phase}_growth_gb"] >= 0
        assert f"\n{phase}" in printed
    for phase in ("sample", "score", "update"):
        assert 0 < result[f"{phase}_flop_share"] < 1 and 0 < result[f"{phase}_bandwidth_share"] < 1
    assert result["step_s"] > result["update_s"]
    assert result["peak_memory_gb"] > 0.05  # a process with torch in it
    assert result["model"] == "tiny-random" and result["device"]


def test_bench_lengths_are_forced_and_ragged(capsys):
    ragged = [run_bench(capsys, f"--seed={seed}")[0] for seed in (0, 0, 1)]
    tokens = [r["response_tokens"] for r in ragged]
    assert tokens[0] == tokens[1] != tokens[2]
    assert tokens[0] < 36
    assert run_bench(capsys, "--min_new=8")[0]["response_tokens"] >= 32
    lengths = workload.draw_lengths(4000, 16, 300, "ragged", seed=0)
    assert np.median(lengths) == pytest.approx(100, rel=0.05)
    assert min(lengths) == 16 and max(lengths) == 300
    assert np.mean(np.array(lengths) == 300) == pytest.approx(0.034, abs=0.01)
    assert set(workload.draw_lengths(5, 1, 7, "equal", seed=0)) == {7}


def test_bench_knobs_reach_the_work(capsys):
    cfg = bench.BenchConfig(arch="tiny-random", prompts=2, group=2, lora_r=3, updates=2,
                            micro_batch_tokens=1, gradient_checkpointing=True, prompt_tokens=6,
                            new_tokens=9, rollout_rows=3, rollout_weights="adapter")  # fmt: skip
    device, dtype = torch.device("cpu"), torch.bfloat16
    with workload.weights(cfg, device, dtype) as name:
        step = workload.Step(cfg, device, dtype, name)
    assert step.model.dtype == dtype and step.model.num_parameters() > 0
    layers = lora_layers(step.model).values()
    assert {layer.r for layer in layers} == {3}
    assert any(getattr(m, "gradient_checkpointing", False) for m in step.model.modules())
    step.sample()
    assert all(layer.merged_weight is None for layer in layers)
    cfg.rollout_weights = "kept"
    step.sample()
    assert all(layer.merged_weight is not None for layer in layers)
    step.score()
    assert [list(map(len, mini)) for mini in step.parts] == [[1, 1], [1, 1]]
    step.reward()
    assert step.advantage.shape == (4,)
    assert [workload.even(text) for text in ("3 8", "8 3", "")] == [1.0, 0.0, 0.0]
    tokenizer = workload.word_tokenizer(128)
    assert tokenizer("100 10 1 127")["input_ids"] == [100, 10, 1, 127]


@pytest.mark.parametrize("arch", workload.SHAPES)
def test_bench_shapes_are_models(arch):
    """Their parameters, in millions, as the released models have them; no memory is taken."""
    millions = {"tiny-random": 0.1, "qwen2-12x768": 218, "qwen2.5-1.5b": 1544,
                "qwen2.5-7b": 7616, "llama3.2-3b": 3213}  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(workload.model_config(arch))
    model.tie_weights()
    assert model.num_parameters() / 1e6 == pytest.approx(millions[arch], rel=0.01, abs=0.1)


def test_bench_random_logits_are_neither_flat_nor_one_token():
    cfg = bench.BenchConfig(arch="tiny-random", prompts=2, group=2, new_tokens=9)
    device = torch.device("cpu")
    with workload.weights(cfg, device, torch.float32) as name:
        step = workload.Step(cfg, device, torch.float32, name)
    z = step.model(torch.tensor(step.prompts)).logits
    assert 0.3 < z.std() < 3
    assert z.softmax(-1).amax() < 0.9


def test_bench_beside_generate_has_the_same_lengths(capsys):
    result, printed = run_bench(capsys, "--peer=hf", "--repeats=2", "--rollout_rows=3")
    assert result["peer_response_tokens"] == result["response_tokens"]
    assert len(result["ratios"]) == 2
    assert result["ratio"] == pytest.approx(np.median(result["ratios"]))
    assert "transformers generate" in printed
    assert "update_s" not in result


def test_generate_as_a_peer_is_forced_and_leaves_the_model_alone():
    cfg = bench.BenchConfig(arch="tiny-random", prompts=2, group=2, new_tokens=9,
                            gradient_checkpointing=True)  # fmt: skip
    device = torch.device("cpu")
    with workload.weights(cfg, device, torch.float32) as name:
        step = workload.Step(cfg, device, torch.float32, name)
    before = dict(step.model.named_modules())
    budgets = [1, 9, 4, 2]
    with peers.without_adapter(step.model) as plain:
        assert not lora_layers(plain)
        assert peers.hf_generate(plain, step.prompts, 2, budgets, max_rows=3) == budgets
    assert dict(step.model.named_modules()).keys() == before.keys()
    assert len(lora_layers(step.model)) == 14
    assert any(getattr(m, "gradient_checkpointing", False) for m in step.model.modules())
    step.budgets = budgets
    assert step.rollout() == budgets


def test_bench_beside_trl(capsys):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    result, printed = run_bench(capsys, "--peer=trl", "--micro_batch_tokens=15")
    assert result["peer_response_tokens"] == result["response_tokens"]
    assert result["peer_micro_batch_rows"] == 1
    parts = [result[f"peer_{part}_s"] for part in ("sample", "score", "update")]
    assert sum(parts) == pytest.approx(result["peer_s"]) and min(parts) > 0
    assert result["ratio"] == pytest.approx(result["peer_s"] / result["step_s"])
    assert result["peer_update_peak_gb"] > result["peer_update_growth_gb"]
    assert "TRL" in printed


def test_bench_without_trl_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="trl is not installed: pip install -r requirements-test"):
        bench.main(options("--peer=trl"))


def test_bench_scaling_extrapolation_and_own_problems(capsys, tiny_random):
    result, printed = run_bench(capsys, "--scaling=both")
    assert [size for size, _ in result["rows_points"]] == [2, 4]
    assert [size for size, _ in result["length_points"]] == [1, 2, 4, 9]
    assert "seconds ~ length^" in printed
    assert machine.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    result, printed = run_bench(capsys, "--extrapolate=6x4")
    assert result["extrapolated_update_s"] == pytest.approx(6 * result["update_s"])
    assert "extrapolated from this one (not run)" in printed
    result, _ = run_bench(
        capsys, "--arch=none", f"--model={tiny_random}", f"--data={tiny_random}",
        "--prompt_tokens=32", "--new_tokens=8",
    )  # fmt: skip
    assert 0 < result["response_tokens"] <= 32 and result["reward_s"] > 0


def test_costs_by_hand():
    """One layer's products counted one by one."""
    cfg = bench.BenchConfig(arch="tiny-random")
    device = torch.device("cpu")
    with workload.weights(cfg, device, torch.float32) as name:
        step = workload.Step(cfg, device, torch.float32, name)
    cost = machine.Cost(step.model, torch.float32)
    decoder = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert (cost.decoder, cost.head) == (decoder, 64 * 128)
    P, R = torch.tensor([3, 3]), torch.tensor([2, 1])
    pairs = 15 + 10  # 1 + 2 + ... + 5, 1 + ... + 4
    flop = 2 * decoder * 9 + 2 * 64 * 128 * 3 + 4 * 2 * 64 * pairs
    assert cost.forward_flop(P, R) == flop
    sampling, read = cost.sampling(P, R, group=2, rows=8)
    assert sampling == flop - 2 * decoder * 3 - 4 * 2 * 64 * 6  # the prompt is read once
    # two steps; the tokens read 3 and 4, and 3 positions
    assert read == 2 * 4 * (decoder + 64 * 128) + (3 + 4 + 3) * 2 * 2 * 2 * 16 * 4


def test_peak_memory_sees_what_is_gone_again():
    meter = machine.PeakMemory(torch.device("cpu"))
    meter.start()
    if np.isnan(meter.before):
        pytest.skip("no /proc/self/clear_refs here")
    torch.ones(25_000_000).sum()
    growth, peak = meter.stop()
    assert growth == pytest.approx(0.1, abs=0.02) and peak > growth
    meter.start()
    assert meter.stop()[0] < 0.02


def test_errors_of_bench_are_one_line():
    for argv, words in [
        (["--prompts=0"], "prompts=0: must be at least 1"),
        (["--min_new=10"], "min_new=10: must not be above new_tokens=9"),
        (["--updates=5"], "updates=5: a step has 4 responses"),
        (["--memory_fraction=2"], "at most 1"),
        (["--memory_fraction=0.5"], "only CUDA can be capped"),
        (["--extrapolate=64"], "write PROMPTSxGROUP"),
        (["--extrapolate=6x4", "--peer=hf"], "of our phases alone"),
        (["--scaling=rows", "--peer=hf"], "not with a peer"),
        (["--scaling=rows", "--prompts=1"], "at least 2"),
        (["--data=tiny"], "data=tiny: not with peer, scaling or arch"),
        (["--peer=trl", "--updates=3"], "4 responses do not make 3 equal"),
        (["--peer=trl", "--group=1"], "--group of at least 2"),
        (["--lora_r=0", "--quant=nf4"], "add --quant=none"),
        (["--arch=qwen3"], "arch"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            bench.main(options(*argv))
        assert "\n" not in str(error.value)


# ---- sample


def test_columns_are_wrapped_and_keep_newlines():
    left = "def f():\n    return 1\n\nend"
    text = sample.side_by_side([left, "one two three four five six \x1b[31m"], width=43)
    assert text.split("\n") == [
        "def f():             | one two three four",
        "    return 1         | five six �[31m",
        "                     |",
        "end                  |",
    ]
    assert max(map(len, sample.side_by_side(["x" * 99, "y " * 99], 50).split("\n"))) <= 50


def test_sample_shows_base_and_trained_on_the_same_noise(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer, seed=0)
    base, folder = tmp_path / "base", write_run(
        tmp_path / "run", model=str(tmp_path / "base"), quant="none", prompt="none",
        temperature=1.0, max_new_tokens=12, dtype="float32", eval_data=str(tmp_path / "base"),
    )  # fmt: skip
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "test.jsonl").write_text('{"problem": "Start: 7 add 5?", "answer": "2"}\n')

    def shown(*more):
        sample.main([f"--run={folder}", "--device=cpu", *more])
        lines = [line.split(" |") for line in capsys.readouterr().out.splitlines()]
        pairs = [[part.strip() for part in line] for line in lines if len(line) == 2]
        return pairs[0], [left for left, _ in pairs[1:]], [right for _, right in pairs[1:]]

    with pytest.raises(UserError, match="no checkpoint"):
        sample.main([f"--run={folder}"])
    model.save_pretrained(folder / "model")  # full training that changed nothing
    titles, left, right = shown("--row=0")
    assert titles == ["base:", "trained:"]
    assert left == right and left[-1].startswith("[no answer")

    add_lora(model, 4, 8)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, folder / "adapter", str(base))
    _, same_left, other = shown("--row=0")
    assert "".join(same_left) == "".join(left) != "".join(other)
    with pytest.raises(UserError, match="rows 0 to 0"):
        shown("--row=1")
