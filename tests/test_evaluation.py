"""Figures of graded completions, prompt tables and the batch check."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from conftest import made_up
from scipy import stats

import eval as command
from data import PROMPTS, Problem
from eval import Sampling
from evaluation import prompts
from evaluation.invariance import batch_effect
from evaluation.scores import details, disagreements, grade, per_problem, summarize
from harness.errors import UserError
from harness.loading import load_model, load_tokenizer
from tasks.datasets import load_completions, load_problems


def made_rows(n: int = 40, k: int = 5, seed: int = 0) -> list[dict]:
    """n problems with k samples each: right, wrong and missing boxes, and answers in prose."""
    rng = np.random.default_rng(seed)
    texts = [
        r"\boxed{0.5}",
        r"\boxed{\frac12}",
        r"Python: \boxed{2}",
        r"\boxed{3}",
        "the answer is 0.5",
    ]
    rows = []
    for i in range(n):
        drawn = rng.integers(len(texts), size=k)
        rows.append(
            {
                "problem": f"p{i}",
                "answer": r"\frac{1}{2}",
                "level": str(1 + i % 3),
                "completions": [texts[j] for j in drawn],
                "finish_reason": [["stop", "length"][j % 2] for j in drawn],
                "tokens": [[7] * (int(j) + 1) for j in drawn],
                "drawn": drawn.tolist(),
            }
        )
    return rows


def test_figures_by_brute_force():
    rows = grade(made_rows())
    s, d = summarize(rows), details(rows)
    right = np.array([[j < 2 for j in row["drawn"]] for row in rows])
    drawn = np.array([row["drawn"] for row in rows])
    assert np.array_equal([row["correct"] for row in rows], right)
    assert s["accuracy"] == pytest.approx(right.mean())
    assert s["stderr"] == pytest.approx(stats.sem(right.mean(1)))
    assert s["low"] < s["accuracy"] < s["high"]
    assert s["code_frequency"] == pytest.approx((drawn == 2).mean())
    assert s["accuracy_code"] == 0 and s["accuracy_language"] == right[drawn != 2].mean()
    assert s["boxed"] == pytest.approx((drawn != 4).mean())
    assert s["truncated"] == pytest.approx((drawn % 2).mean())
    lengths = drawn + 1
    assert (s["length"], s["length_unit"]) == (pytest.approx(lengths.mean()), "tokens")
    assert s["length_right"] == pytest.approx(lengths[right].mean())
    assert s["length_wrong"] == pytest.approx(lengths[~right].mean())
    lenient = right | (drawn == 4)  # prose counts there
    assert d["lenient_accuracy"] == pytest.approx(lenient.mean())
    assert d["lenient_stderr"] == pytest.approx(stats.sem(lenient.mean(1)))
    # pass@k: the mean over all subsets of k samples
    for k, (value, _) in enumerate(d["pass_curve"], start=1):
        subsets = list(combinations(range(5), k))
        assert value == pytest.approx(np.mean([right[:, s].any(1) for s in subsets]))
    assert s["pass_at_k"] == pytest.approx(d["pass_curve"][-1][0])
    # maj@k: 0.5 and 1/2 are one answer; a tie counts by the share of tied answers that are right
    majority = []
    for row in drawn:
        votes = Counter("right" if j < 2 else int(j) for j in row if j < 4)
        top = [answer for answer, n in votes.items() if n == max(votes.values())]
        majority.append(("right" in top) / len(top))
    assert d["maj_at_k"] == pytest.approx(np.mean(majority))
    levels = {level: right[int(level) - 1 :: 3].mean() for level in "123"}
    assert {k: v["accuracy"] for k, v in d["by_level"].items()} == pytest.approx(levels)
    assert sum(v["n"] for v in d["by_level"].values()) == 40 and "by_subject" not in d


def test_repetition_and_what_is_unknown():
    rows = [{"problem": "p", "answer": "1", "completions": ["so it is now, " * 30, "x"]}]
    s = summarize(grade(rows))
    assert s["repetition"] == 0.5 and s["truncated"] is None and s["stderr"] is None
    assert s["length_unit"] == "characters" and s["length_right"] is None
    assert per_problem(grade(rows), "truncated") is None


def test_a_row_is_graded_by_the_rule_of_its_own_kind():
    row = {"problem": "p", "answer": "{'a': 1}", "kind": "python"}
    graded = grade([row | {"completions": [r"\boxed{{'a':1}}", r"\boxed{'a': 1}"]}])
    assert graded[0]["correct"] == [True, False]
    assert disagreements([row | {"completions": ["x"]}], graded) is None
    with pytest.raises(UserError, match="kind=odd"):
        grade([row | {"completions": ["x"], "kind": "odd"}])


# ---- what is saved


def test_every_completion_is_saved_with_what_made_it(tiny_random, tmp_path, capsys):
    """Prompt, tokens, reason and log-probability; and the saved file gives the same figures."""
    out = tmp_path / "o"
    args = [f"--model={tiny_random}", f"--data={tiny_random}", "--prompt=none", "--n=5", "--k=2"]
    more = ["--temperature=1", "--max_prompt_tokens=32", "--max_new_tokens=8", f"--out={out}"]
    command.main([*args, *more])
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = load_tokenizer(tiny_random)
    rows = load_completions(str(out / "completions.jsonl"))
    for row in rows:
        assert row["prompt"] == row["problem"]
        for text, tokens, reason, logprob in zip(
            row["completions"], row["tokens"], row["finish_reason"], row["logprob"], strict=True
        ):
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text
            assert len(tokens) == 8 if reason == "length" else len(tokens) <= 8
            assert logprob < 0
    command.main([f"--completions={out / 'completions.jsonl'}"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again.pop("agreement") == 1
    assert again == {key: first[key] for key in again}
    assert first["batch"]["rows"] == 8  # 4 problems by default


def test_log_probabilities_are_those_of_the_model(tiny_random, tmp_path):
    """Against transformers' own forward pass over prompt and response."""
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model(tiny_random), load_tokenizer(tiny_random)
    items, _ = command.prepare(load_problems(tiny_random, "test")[:3], "none", tokenizer, 32)
    _, rows = command.evaluate(model, tokenizer, items, Sampling(2, 0.7, 10))
    theirs = AutoModelForCausalLM.from_pretrained(tiny_random)
    for (_, ids), row in zip(items, rows, strict=True):
        for tokens, logprob in zip(row["tokens"], row["logprob"], strict=True):
            with torch.no_grad():
                z = theirs(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1] / 0.7
            expected = z.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()
            assert logprob == pytest.approx(expected.item(), abs=1e-3)


def test_the_batch_check_sees_a_model_that_depends_on_the_batch(tiny_random, monkeypatch):
    model, tokenizer = load_model(tiny_random), load_tokenizer(tiny_random)
    items, _ = command.prepare(load_problems(tiny_random, "test")[:4], "none", tokenizer, 32)
    args = (model, tokenizer, items, 2, 12, [1], (2, 0), (1.0, 1.0, 0), 64)
    clean = batch_effect(*args)
    assert clean["rows"] == clean["same"] == 8 and clean["verdicts_differ"] == 0
    assert clean["logprob_gap"] < 1e-4 and clean["dtype"] == "float32"
    import evaluation.invariance as invariance

    generate = invariance.generate

    def leaking(model, prompts, copies, budget, ends, noise, t, p, k, rows, **more):
        return generate(model, prompts, copies, budget, ends, (*noise, rows), t, p, k, rows, **more)

    monkeypatch.setattr(invariance, "generate", leaking)
    assert batch_effect(*args)["same"] < 8


# ---- prompts and temperatures


def fake_setting(name: str, temperature: float, right: list[int]) -> prompts.Setting:
    rows = [
        {"problem": f"p{i}", "answer": "1", "completions": [rf"\boxed{{{2 - r}}}"], "correct": [r]}
        for i, r in enumerate(right)
    ]
    return prompts.Setting(name, temperature, summarize(rows) | details(rows), rows)


def test_the_untuned_baseline_is_the_best_setting():
    weak = fake_setting("qwen_math", 0, [1, 0, 0, 0, 0, 0])
    strong = fake_setting("none", 0.6, [1, 1, 1, 1, 0, 0])
    table = prompts.prompt_table([weak, strong], "HuggingFaceH4/MATH-500")
    assert prompts.best_of([weak, strong]) is strong
    assert prompts.gain([weak, strong]).mean == pytest.approx(0.5)
    assert "Untuned baseline: none at temperature 0.6, 66.7%, +50.0 points" in table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert "49.4 (78.9)" in rows[1]  # published for greedy samples alone
    assert "69 to 72" not in rows[2]
    assert "ublished" not in prompts.prompt_table([weak, strong], "gsm8k")  # of MATH-500 alone


def test_the_same_problems_under_every_format(capsys):
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    problems = [Problem("short", "1", "0"), Problem("long " * 20, "1", "1")]
    found = prompts.items_by_prompt(["none", "simplerl"], problems, made_up(template), 130)
    assert {name: [p.id for p, _ in items] for name, items in found.items()} == {
        "none": ["0"],
        "simplerl": ["0"],
    }
    assert "1 problems dropped" in capsys.readouterr().out
    # formats that the tokenizer cannot write are left out by name
    found = prompts.items_by_prompt(["none", "simplerl"], problems, made_up(None), 130)
    assert list(found) == ["none"] and "simplerl" in capsys.readouterr().out
    for names, size in ((["simplerl", "sober"], 130), (["none"], 2)):
        with pytest.raises(UserError):
            prompts.items_by_prompt(names, problems, made_up(None), size)


def test_every_format_of_the_papers_is_known():
    names = "none,qwen_math,simplerl,math_problem,sober,spurious,code_forced"
    assert prompts.names_of(names, "") == names.split(",")
    for name in ("sober", "spurious"):
        assert PROMPTS[name].user.endswith("{problem}")
    assert set(prompts.PUBLISHED) <= set(PROMPTS)


def test_prompts_and_temperatures_from_the_command_line(tiny_random, tmp_path, capsys):
    args = [f"--model={tiny_random}", f"--data={tiny_random}", "--n=4", "--k=2"]
    args += ["--max_prompt_tokens=32", "--max_new_tokens=6", f"--out={tmp_path}"]
    command.main([*args, "--prompts=none,qwen_math", "--temperatures=0,1"])
    out = capsys.readouterr().out
    assert "qwen_math" in out and "| none | 1 | 2 |" in out and "| none | 0 | 1 |" in out
    assert json.loads(out.splitlines()[-1])["prompt"] == "none"
    assert (tmp_path / "prompts.md").exists()
    saved = load_completions(str(tmp_path / "none-t1" / "completions.jsonl"))
    assert len(saved) == 4 and len(saved[0]["completions"]) == 2


@pytest.mark.parametrize(
    "args,word",
    [
        (["--prompts=none,odd"], "odd"),
        (["--prompts=none", "--prompt=none"], "prompt has no effect"),
        (["--temperatures=0,x"], "temperatures=0,x"),
        (["--temperatures=-1"], "temperatures=-1"),
        (["--temperature=-1"], "temperature=-1"),
        (["--temperatures=0", "--temperature=1"], "temperature has no effect"),
        (["--labels=x", "--prompts=none"], "prompts has no effect"),
        (["--check_batch=-1"], "check_batch"),
    ],
)
def test_mistakes_in_these_options(tiny_random, args, word):
    with pytest.raises(UserError, match=word):
        command.main([f"--model={tiny_random}", f"--data={tiny_random}", *args])


@pytest.mark.slow
def test_a_real_model_on_problems_of_math500(shared, tmp_path, capsys):
    """stories260K knows no mathematics, but every part of an eval must run on it."""
    model, data = shared / "models" / "stories260K", shared / "data" / "math500"
    args = [f"--model={model}", f"--data={data}", "--prompt=none", "--n=50", "--k=2"]
    more = ["--temperature=1", "--max_new_tokens=16", "--max_prompt_tokens=300"]
    command.main([*args, *more, f"--out={tmp_path}"])
    s = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert s["n"] > 40 and s["k"] == 2 and len(s["pass_curve"]) == 2
    assert s["batch"]["same"] == s["batch"]["rows"] == 8 and s["batch"]["logprob_gap"] < 1e-3
    assert len(s["by_level"]) == 5 and sum(part["n"] for part in s["by_subject"].values()) == s["n"]
