"""What other programs read of ours and we of theirs: sample logs, merged models, trackers."""

import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import batch, comparable, run_config
from test_figures import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evals
from evaluation.interop import read_lm_eval, write_lm_eval
from harness import trackers
from harness.adapters import load_adapter, save_adapter
from harness.errors import UserError
from harness.loading import load_model
from harness.runfiles import read_jsonl
from harness.token_log import token_texts
from lora import add_lora, lora_layers
from settings import Config, check
from tasks.datasets import load_completions
from tools import export, merge
from train import train

# ---- sample logs of lm-evaluation-harness


def line(doc_id, texts, answer="4", name="none", **more):
    """A line as lm-evaluation-harness 0.4 writes it for a task that generates text."""
    doc = {"question": f"question {doc_id}", "answer": f"Two and two.\n#### {answer}"}
    return {
        "doc_id": doc_id,
        "doc": doc,
        "target": doc["answer"],
        "arguments": {"gen_args_0": {"arg_0": "Question: ...", "arg_1": {"until": ["\n\n"]}}},
        "resps": [texts],
        "filtered_resps": texts[:1],
        "filter": name,
        "metrics": ["exact_match"],
        "doc_hash": "0",
        "prompt_hash": "0",
        "target_hash": "0",
        **more,
    }


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_sample_log_is_read_wherever_completions_are(tmp_path, capsys):
    """One row a problem, in order, though each filter has a line of its own."""
    filters = ("strict-match", "flexible-extract")
    log = [
        line(i, [text], name=name, exact_match=score)
        for name in filters
        for i, text, score in ((1, "\\boxed{5}", 0.0), (0, "\\boxed{4}", 1.0))
    ]
    file = save(tmp_path / "samples_gsm8k.jsonl", log)
    rows = load_completions(file)
    assert [(r["problem"], r["answer"], r["completions"], r["correct"]) for r in rows] == [
        ("question 0", "4", ["\\boxed{4}"], [True]),
        ("question 1", "4", ["\\boxed{5}"], [False]),
    ]
    evals.main([f"--completions={file}"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["n"], summary["accuracy"], summary["agreement"]) == (2, 0.5, 1.0)


def test_completions_written_as_a_sample_log_come_back(tmp_path):
    rows = [
        {"problem": "a", "answer": "1/2", "completions": ["x", "y"], "correct": [True, False]},
        {"problem": "b", "answer": "2", "completions": ["z", "\u2028"], "correct": [True, True]},
    ]
    rows = [{**row, "level": "3", "finish_reason": ["stop", "length"]} for row in rows]
    export.main([save(tmp_path / "rows.jsonl", rows), str(tmp_path / "samples_x.jsonl")])
    assert load_completions(str(tmp_path / "samples_x.jsonl")) == rows
    log = [json.loads(text) for text in open(tmp_path / "samples_x.jsonl")]
    assert log[0].keys() >= line(0, ["x"]).keys()
    assert [row["exact_match"] for row in log] == [0.5, 1.0]


def test_hashes_of_a_sample_log_are_those_of_the_harness(tmp_path):
    """The figures of a log that lm-evaluation-harness 0.4.13 wrote of the tiny world."""
    problem = {"id": "0", "problem": "Start: 5 minus 9 minus 5?", "answer": "1", "level": "2"}
    write_lm_eval(tmp_path / "log.jsonl", [{**problem, "completions": ["x"]}])
    (row,) = map(json.loads, open(tmp_path / "log.jsonl"))
    assert row["doc"] == problem
    found = [row[f"{name}_hash"][:12] for name in ("doc", "prompt", "target")]
    assert found == ["c22108f9aa08", "758becfb730b", "6b86b273ff34"]


@pytest.mark.parametrize(
    "bad",
    [
        line(1, []),
        line(1, [["-3.2", "False"]]),
        {**line(1, ["x"]), "resps": [["x"], ["y"]]},
        {"doc_id": 1},
        ["no object"],
    ],
)
def test_a_bad_line_of_a_sample_log_is_named(tmp_path, bad):
    file = save(tmp_path / "samples_x.jsonl", [line(0, ["x"]), bad])
    with pytest.raises(UserError, match="samples_x.jsonl:2"):
        read_lm_eval(file)
    with pytest.raises(UserError, match="out_file"):
        write_lm_eval(f"{file}/out_file", [])


# ---- merged models


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "olmo2"])
def test_transformers_loads_the_merged_model_with_equal_logits(
    model_folders, tiny_random, family, quant, tmp_path
):
    """To fp32 rounding, against the layers that the run trained, over a 4-bit base too."""
    base = str(shutil.copytree(model_folders[family], tmp_path / "base"))
    AutoTokenizer.from_pretrained(tiny_random).save_pretrained(base)
    model = load_model(base, quant)
    add_lora(model, 4, 8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    run = write_run(tmp_path / "run", model=base, quant=quant)
    save_adapter(model, run / "adapter", base)
    record = {"steps_done": 4, "base_model": base, "quant": quant}
    (run / "adapter" / "nanorlvr.json").write_text(json.dumps(record))
    out = tmp_path / "merged"
    merge.main([str(run), str(out), "--dtype=float32", "--device=cpu"])

    again = load_model(base, quant)
    load_adapter(again, run / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = batch(7)[0]
    with torch.no_grad():
        ours, merged = again(tokens).logits, theirs(tokens).logits
        plain = load_model(base)(tokens).logits
    assert (merged - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (merged - plain).abs().max() > 0.01 * ours.abs().max()
    assert AutoTokenizer.from_pretrained(out).vocab_size
    with pytest.raises(UserError, match="merged"):
        merge.main([str(run), str(out)])


def test_what_cannot_be_merged_is_refused(tmp_path):
    whole = write_run(tmp_path / "whole")
    (whole / "model").mkdir()
    with pytest.raises(UserError, match="whole model"):
        merge.main([str(whole), str(tmp_path / "out")])
    with pytest.raises(UserError, match="no adapter"):
        merge.main([str(write_run(tmp_path / "empty")), str(tmp_path / "out")])
    with pytest.raises(UserError, match="order"):
        merge.main([str(whole)])


# ---- trackers


def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for log in ("wandb", "tensorboard"):
        with pytest.raises(UserError, match=f"pip install {log}"):
            check(replace(Config(), log=log))
    check(Config())


def test_wandb_gets_each_step_once_with_its_eval(tiny_random, tmp_path, monkeypatch):
    """A stand-in for the library; a resumed run sends the steps that are new."""
    sent, opened = [], []

    def init(**options):
        opened.append(options)
        return SimpleNamespace(log=lambda metrics, step: sent.append((step, metrics)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    cfg = run_config(tiny_random, str(tmp_path / "run"))
    cfg = replace(cfg, log="wandb", steps=2, eval_every=2)
    train(cfg)
    assert [step for step, _ in sent] == [0, 1, 2]
    assert [step for step, metrics in sent if "eval_accuracy" in metrics] == [0, 2]
    assert all(math.isfinite(value) for _, metrics in sent for value in metrics.values())
    assert opened[0]["name"] == "run" and opened[0]["config"]["steps"] == 2
    train(replace(cfg, steps=3, resume=True))
    assert [step for step, _ in sent] == [0, 1, 2, 3]


def test_a_tracker_that_fails_to_open_is_one_line(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("no login\nlong advice")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match="no login$"):
        trackers.open_tracker("wandb", {}, str(tmp_path), [])


def test_tensorboard_reads_what_was_sent(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send = trackers.open_tracker("tensorboard", {"lr": 1.0}, str(tmp_path), [])
    history = [{"step": 1, "reward": 0.5, "prob_bins": [1.0], "kl": None}]
    send(history)
    history.append({"step": 2, "reward": 0.25, "kl": math.nan})
    send(history)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 0.25)]


# ---- values of tokens in samples.jsonl


def test_logged_tokens_change_nothing_else_and_add_up_to_the_response(tiny_random, tmp_path):
    cfg = replace(run_config(tiny_random, str(tmp_path / "a")), steps=2, eval_every=0, lr=1e-2)
    plain = train(cfg)
    logged = train(replace(cfg, out_dir=str(tmp_path / "b"), log_tokens=True))
    assert comparable(plain) == comparable(logged)
    before, after = (read_jsonl(tmp_path / name / "samples.jsonl") for name in "ab")
    new = {"tokens", "entropy", "log_ratio"}
    assert [{k: v for k, v in row.items() if k not in new} for row in after] == before
    for row in after:
        values = [row[key] for key in new]
        assert len(set(map(len, values))) == 1
        assert "".join(row["tokens"]).startswith(row["response"])
    ratios = [value for row in after for value in row["log_ratio"] if value is not None]
    assert any(ratios) and min(value for row in after for value in row["entropy"]) >= 0


def test_with_lr_0_every_logged_ratio_is_0(tiny_random, tmp_path):
    cfg = replace(run_config(tiny_random, str(tmp_path / "a")), steps=1, eval_every=0, lr=0.0)
    train(replace(cfg, log_tokens=True))
    ratios = [r["log_ratio"] for r in read_jsonl(tmp_path / "a" / "samples.jsonl")]
    assert {value for row in ratios for value in row if value is not None} == {0.0}


def test_texts_of_tokens_keep_the_spaces_that_a_token_alone_would_lose(shared):
    for folder in sorted((shared / "tokenizers").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "So x = 12, and\n  the answer is 7."
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(token_texts(tokenizer, ids)).strip() == text, folder.name
