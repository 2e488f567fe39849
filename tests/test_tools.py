"""Bench and sample, on throwaway models."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_figures import write_run
from transformers import AutoModelForCausalLM

import sample
from harness.adapters import save_adapter
from harness.configurator import PROJECT
from harness.errors import UserError
from lora import add_lora, lora_layers
from tasks import tiny
from tools import bench
from tools.parts import machine, peers, workload

pytestmark = pytest.mark.slow

# ---- bench


SMALL = {
    "arch": "tiny-random",
    "prompts": 2,
    "group": 2,
    "prompt_tokens": 6,
    "new_tokens": 9,
    "updates": 2,
    "repeats": 1,
    "device": "cpu",
}


def options(*more):
    """A command line of SMALL and more options, which override it."""
    given = dict(option.removeprefix("--").split("=") for option in more)
    return [f"--{key}={value}" for key, value in (SMALL | given).items()]


def run_bench(capsys, *more):
    """Run bench. Returns the JSON of the last line, and everything printed."""
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


def test_bench_settings_reach_the_work(capsys):
    cfg = bench.BenchConfig(
        arch="tiny-random",
        prompts=2,
        group=2,
        lora_r=3,
        updates=2,
        micro_batch_tokens=1,
        gradient_checkpointing=True,
        prompt_tokens=6,
        new_tokens=9,
        rollout_rows=3,
        rollout_weights="adapter",
    )
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
    """The shapes have as many parameters as the released models. On meta: uses no memory."""
    millions = {
        "tiny-random": 0.1,
        "qwen2-12x768": 218,
        "qwen2.5-1.5b": 1544,
        "qwen2.5-7b": 7616,
        "llama3.2-3b": 3213,
    }
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
    result, _ = run_bench(capsys, "--peer=hf", "--repeats=2", "--rollout_rows=3")
    assert result["peer_response_tokens"] == result["response_tokens"]
    assert len(result["ratios"]) == 2
    assert result["ratio"] == pytest.approx(np.median(result["ratios"]))
    assert "update_s" not in result


def test_generate_as_a_peer_is_forced_and_leaves_the_model_alone():
    cfg = bench.BenchConfig(
        arch="tiny-random", prompts=2, group=2, new_tokens=9, gradient_checkpointing=True
    )
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
    result, _ = run_bench(capsys, "--peer=trl", "--micro_batch_tokens=15")
    assert result["peer_response_tokens"] == result["response_tokens"]
    assert result["peer_micro_batch_rows"] == 1
    parts = [result[f"peer_{part}_s"] for part in ("sample", "score", "update")]
    assert sum(parts) == pytest.approx(result["peer_s"]) and min(parts) > 0
    assert result["ratio"] == pytest.approx(result["peer_s"] / result["step_s"])
    assert result["peer_update_peak_gb"] > result["peer_update_growth_gb"]


@pytest.fixture
def many_ends(model_folders, tmp_path):
    """A model with many end tokens in its own configuration: half of the vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(model_folders["qwen2"])
    model.generation_config.eos_token_id = list(range(3, 97, 2))
    model.generation_config.repetition_penalty = 1.1
    model.save_pretrained(tmp_path / "ends")
    return str(tmp_path / "ends")


@pytest.mark.parametrize("peer", ["hf", "trl"])
def test_a_peer_does_not_stop_at_the_models_own_end_tokens(capsys, many_ends, peer):
    if peer == "trl":
        pytest.importorskip("trl")
        pytest.importorskip("peft")
    argv = ("--arch=none", f"--model={many_ends}", f"--peer={peer}", "--lengths=equal")
    result, printed = run_bench(capsys, *argv)
    assert result["peer_lengths_equal"] and result["peer_response_tokens"] == 36
    assert "warning" not in printed


def test_what_was_measured_is_printed_although_the_lengths_differ(capsys, monkeypatch):
    generate = peers.hf_generate
    monkeypatch.setattr(peers, "hf_generate", lambda *a: [n + 1 for n in generate(*a)])
    result, printed = run_bench(capsys, "--peer=hf")
    assert result["peer_lengths_equal"] is False and result["ratio"] > 0
    assert "warning" in printed


def test_bench_without_trl_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="peer=trl: trl .*requirements-test.txt"):
        bench.main(options("--peer=trl"))


def test_bench_scaling_extrapolation_and_own_problems(capsys, tiny_random):
    result, printed = run_bench(capsys, "--scaling=both")
    assert [size for size, _ in result["rows_points"]] == [2, 4]
    assert [size for size, _ in result["length_points"]] == [1, 2, 4, 9]
    assert "seconds ~ length^" in printed
    assert machine.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    result, printed = run_bench(capsys, "--extrapolate=6x4")
    assert result["extrapolated_update_s"] == pytest.approx(6 * result["update_s"])
    assert "6x4" in printed.splitlines()[-2]
    result, _ = run_bench(
        capsys,
        "--arch=none",
        f"--model={tiny_random}",
        f"--data={tiny_random}",
        "--prompt_tokens=32",
        "--new_tokens=8",
    )
    assert 0 < result["response_tokens"] <= 32 and result["reward_s"] > 0


def test_costs_by_hand():
    """Costs of the tiny shape, counted by hand."""
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
    # Two decoding steps; the tokens read 3 and 4 positions, and 3.
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


def test_memory_fraction_caps_the_gpu_that_is_used(monkeypatch):
    """The real function accepts a device only with its index."""
    capped = []

    def cap(fraction, device):
        if device.index is None:
            raise ValueError("expected a torch.device with a specified index")
        capped.append((fraction, device.index))
        raise UserError("stop here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", cap)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
    for device, index in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        with pytest.raises(UserError, match="stop here"):
            bench.main(options("--memory_fraction=0.25", f"--device={device}"))
        assert capped.pop() == (0.25, index) and not capped


def test_errors_of_bench_are_one_line():
    for argv, words in [
        (["--prompts=0"], "prompts=0"),
        (["--min_new=10"], "min_new=10.*new_tokens=9"),
        (["--updates=5"], "updates=5.* 4"),
        (["--memory_fraction=2"], "memory_fraction=2"),
        (["--memory_fraction=0.5"], "memory_fraction=0.5"),
        (["--extrapolate=64"], "extrapolate=64.*PROMPTSxGROUP"),
        (["--extrapolate=6x4", "--peer=hf"], "extrapolate.*peer"),
        (["--scaling=rows", "--peer=hf"], "scaling=rows.*peer"),
        (["--scaling=rows", "--prompts=1"], "scaling=rows.*--prompts"),
        (["--data=tiny"], "data=tiny.*arch"),
        (["--peer=trl", "--updates=3"], "peer=trl.* 3"),
        (["--peer=trl", "--group=1"], "peer=trl.*--group"),
        (["--lora_r=0", "--quant=nf4"], "lora_r=0.*--quant=none"),
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
    base, folder = (
        tmp_path / "base",
        write_run(
            tmp_path / "run",
            model=str(tmp_path / "base"),
            quant="none",
            prompt="none",
            temperature=1.0,
            max_new_tokens=12,
            dtype="float32",
            eval_data=str(tmp_path / "base"),
        ),
    )
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "test.jsonl").write_text('{"problem": "Start: 7 add 5?", "answer": "2"}\n')

    def shown(*more):
        sample.main([f"--run={folder}", "--device=cpu", *more])
        lines = [line.split(" |") for line in capsys.readouterr().out.splitlines()]
        pairs = [[part.strip() for part in line] for line in lines if len(line) == 2]
        return pairs[0], [left for left, _ in pairs[1:]], [right for _, right in pairs[1:]]

    with pytest.raises(UserError, match=str(folder)):
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
    with pytest.raises(UserError, match="row"):
        shown("--row=1")


# ---- systems without file locks


@pytest.mark.parametrize("command", ["train.py", "eval.py", "sample.py", "-m tools.sweep"])
def test_a_system_without_file_locks_is_refused_in_one_line(command, tmp_path):
    """As on Windows, whose Python has no fcntl."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fcntl'] = None")
    run = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    ours = [line for line in run.stderr.splitlines() if "nanoRLVR" in line]
    assert run.returncode == 2 and run.stdout == "" and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1:] == ours and "WSL2" in ours[0]
