"""The membership audit: distances by brute force, scores by hand, a null and a known memoriser."""

import json
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation import membership
from harness.errors import UserError
from harness.loading import load_model, load_tokenizer
from tasks.datasets import load_problems
from tools import membership as tool
from train import main as train


def levenshtein(a: tuple, b: tuple) -> int:
    @cache
    def d(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


def test_edit_distances_against_brute_force():
    draw = np.random.default_rng(0)
    pairs = [
        tuple(tuple(draw.integers(4, size=draw.integers(0, 9)).tolist()) for _ in range(2))
        for _ in range(200)
    ]
    wanted = [levenshtein(a, b) for a, b in pairs]
    assert membership.edit_distances(pairs).tolist() == wanted
    alone = [int(membership.edit_distances([pair])[0]) for pair in pairs[:20]]
    assert alone == wanted[:20]  # other pairs, with other lengths, change nothing


def test_min_knn_distance_by_hand():
    same = [[1, 2, 3, 4]] * 3
    assert membership.min_knn_distance(same) == 0
    one_off = [[1, 2, 3, 4], [1, 2, 3, 5], [7, 7, 7, 7]]  # nearest: 1/4, 1/4, 4/4
    assert membership.min_knn_distance(one_off) == pytest.approx(0.5)
    assert membership.min_knn_distance(one_off, k=2) == pytest.approx(0.25)
    assert (
        membership.min_knn_distance([[1], []]) == 1 and membership.min_knn_distance([[], []]) == 0
    )
    with pytest.raises(ValueError):
        membership.min_knn_distance([[1]])


def test_gain_and_drift_by_hand():
    gain = membership.gains(np.array([[0, 1], [0, 0]]), np.array([[1, 1], [0, 0]]))
    assert gain.tolist() == [0.5, 0]
    length = torch.tensor([2, 1])  # two samples of one prompt; a column of padding
    trained = torch.tensor([[0.8, 0.6, 0.9], [0.5, 0.9, 0.9]]).log()
    base = torch.tensor([[0.4, 0.6, 0.1], [0.7, 0.1, 0.1]]).log()
    drift = membership.drifts(trained, base, length, copies=2)
    assert drift == pytest.approx([((0.4 + 0) / 2 + (0.5 - 0.7)) / 2], abs=1e-6)
    assert membership.both(np.array([0, 1, 1]), np.array([5, 5, 9])).tolist() == [2.5, 4, 5.5]


def test_separation():
    member = np.arange(40) < 20
    flat = membership.separation(np.full(40, 0.3), member)
    assert (flat["auroc"], flat["low"], flat["high"], flat["p"]) == (0.5, 0.5, 0.5, 1.0)
    noise = np.random.default_rng(0).normal(size=40)
    clear, none = (membership.separation(noise + d * member, member) for d in (3.0, 0.0))
    assert clear["auroc"] > 0.95 and clear["low"] > 0.85 and clear["p"] < 1e-4
    assert none["low"] < 0.5 < none["high"]
    assert membership.memorised({"gain": none, "drift": clear, "both": none}) == ["drift"]
    assert membership.memorised({"gain": none, "drift": none, "both": flat}) == []


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_with_lr_0_is_exactly_at_chance(tiny_random, tmp_path, capsys):
    folder = tmp_path / "run"
    train(
        ["config/ground_truth.py", "config/model/tiny.py", "--lr=0", "--steps=2", "--eval_n=4"]
        + ["--prompts_per_step=4", "--group_size=2", "--updates_per_step=2", "--eval_every=0"]
        + ["--max_new_tokens=12", f"--out_dir={folder}"]
        + [f"--{key}={tiny_random}" for key in ("model", "train_data", "eval_data")]
    )
    seen, unseen, held_out = tool.run_problems(str(folder))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["problem"] for row in rows} <= {p.problem for p in seen}
    assert (len(seen), len(unseen), len(held_out)) == (8, 3992, 500)

    tool.main([f"--run={folder}", "--n=10", "--samples=3", "--held_out=unseen"])
    result = last_json(capsys)
    assert (result["members"], result["held_out"], result["memorised"]) == (8, 10, False)
    for key in ("gain", "drift", "both", "nearness_gain"):
        row = result["scores"][key]
        assert (row["auroc"], row["low"], row["high"]) == (0.5, 0.5, 0.5), key
    assert (folder / "audits" / "membership.png").stat().st_size


def test_a_model_that_knows_its_members_by_heart_is_found_out(tiny_random, tmp_path, capsys):
    """Supervised training on the members' answers stands for RL that memorises, in seconds."""
    model, tokenizer = load_model(tiny_random), load_tokenizer(tiny_random)
    members = load_problems(tiny_random, "train")[:6]
    file = tmp_path / "members.jsonl"
    rows = [{"problem": p.problem, "answer": p.answer} for p in members]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{p.problem}\\boxed{{{p.answer}}}.<|end|>" for p in members]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        z = model(encoded["input_ids"], use_cache=False).logits[:, :-1]
        F.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    tool.main(
        [f"--model={tiny_random}", f"--trained={tmp_path / 'trained'}", f"--members={file}"]
        + [f"--held_out={tiny_random}", "--prompt=none", "--n=20", "--samples=4"]
        + ["--max_prompt_tokens=32", "--max_new_tokens=12", f"--out={tmp_path}"]
    )
    result = last_json(capsys)
    assert result["memorised"] and result["scores"]["gain"]["auroc"] > 0.9
    assert result["scores"]["gain"]["members"] > 0.9 and result["scores"]["both"]["low"] > 0.7


def test_mistakes(tmp_path):
    for args, word in (
        ([], "nothing to audit"),
        (["--model=tiny"], "adapter or --trained"),
        (["--run=a", "--trained=b"], "keep one"),
        ([f"--run={tmp_path}"], "no readable config.json"),
        (["--model=tiny", "--trained=tiny_bad", "--samples=1"], "samples"),
        (["--model=tiny", "--trained=tiny_bad", "--nearest=99"], "nearest"),
        (["--model=tiny", "--trained=tiny_bad"], "--members"),
    ):
        with pytest.raises(UserError, match=word):
            tool.main(args)
