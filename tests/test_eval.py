"""eval.py: figures by hand, saved completions graded, samples independent of the batch."""

import json
import math
from dataclasses import asdict

import pytest

import eval as evaluation
from data import prepare
from eval import Sampling
from evaluation.scores import disagreements, grade, summarize
from harness.errors import UserError
from harness.loading import load_model, load_tokenizer
from settings import Config
from tasks.datasets import load_completions, load_problems


def row(correct, texts, **more):
    return {"problem": "p", "answer": "1", "correct": correct, "completions": texts, **more}


def test_figures_by_hand():
    rows = [
        row(
            [True, True],
            ["```python\n```\\boxed{1}", "\\boxed{1}"],
            finish_reason=["stop", "length"],
        ),
        row([False, True], ["no box", "Python \\boxed{1}"], finish_reason=["stop", "stop"]),
        row([False, False], ["\\boxed{}", "\\boxed{2}"], finish_reason=["stop", "stop"]),
    ]
    s = summarize(rows)
    assert (s["n"], s["k"]) == (3, 2)
    assert s["accuracy"] == pytest.approx(0.5)  # per problem 1, 1/2, 0
    assert s["stderr"] == pytest.approx(0.5 / math.sqrt(3))  # std of (1, .5, 0) is .5
    assert s["boxed"] == pytest.approx(4 / 6) and s["code_frequency"] == pytest.approx(2 / 6)
    assert s["accuracy_code"] == 1.0 and s["accuracy_language"] == pytest.approx(1 / 4)
    assert s["truncated"] == pytest.approx(1 / 6)
    alone = summarize([row([True], ["x"])])
    assert alone["stderr"] is None and alone["accuracy_code"] is None and alone["truncated"] is None


def test_completions_are_graded_and_disagreements_named(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    rows = [
        {
            "problem": "a",
            "answer": "0.5",
            "completions": ["so \\boxed{\\frac12}."],
            "correct": [True],
        },
        {
            "problem": "b",
            "answer": 7,
            "completions": ["\\boxed{8}", "it is 7"],
            "correct": [True, False],
        },
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    evaluation.main([f"--completions={path}"])
    out = capsys.readouterr().out.splitlines()
    assert "differs from `correct`: row 1 sample 0" in out
    last = json.loads(out[-1])
    assert {"accuracy", "stderr", "boxed", "code_frequency", "n", "k"} <= set(last)
    assert last["accuracy"] == 0.5 and last["agreement"] == pytest.approx(2 / 3)
    assert last["lenient_accuracy"] == 0.75  # mean of 1 and 1/2; prose counts there alone


@pytest.mark.slow
def test_real_completions_agree_with_their_graders(shared, capsys):
    """The strict rule on real text: at least 98 % (docs/GRADING.md lists and judges the rest)."""
    file = shared / "data" / "completions" / "qwen3_4b_base_math500.jsonl"
    evaluation.main([f"--completions={file}"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["n"] == 500 and last["agreement"] >= 0.98


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch(tiny_random):
    """The fault: evals that change with the batch size."""
    model, tokenizer = load_model(tiny_random), load_tokenizer(tiny_random)
    items, _ = prepare(load_problems(tiny_random, "test")[:12], "none", tokenizer, 32)
    whole = evaluation.evaluate(model, tokenizer, items, Sampling(3, 1.0, 20, seed=1))
    small = evaluation.evaluate(
        model, tokenizer, items, Sampling(3, 1.0, 20, seed=1, rollout_rows=5)
    )
    assert whole[0]["n"] == 12 and whole[0]["k"] == 3
    for a, b in zip(whole[1], small[1], strict=True):
        assert a.pop("logprob") == pytest.approx(b.pop("logprob"), abs=2e-4)
        assert a == b
    other = evaluation.evaluate(model, tokenizer, items, Sampling(3, 1.0, 20, seed=2))
    assert other[1] != whole[1]


def test_a_model_and_a_run_from_the_command_line(tiny_random, tmp_path, capsys):
    args = [
        f"--data={tiny_random}",
        "--prompt=none",
        "--max_prompt_tokens=32",
        "--max_new_tokens=8",
    ]
    evaluation.main([f"--model={tiny_random}", *args, "--n=5", f"--out={tmp_path / 'o'}"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["n"] == 5
    saved = load_completions(str(tmp_path / "o" / "completions.jsonl"))
    again = grade(saved)
    assert disagreements(saved, again) == []
    assert summarize(again) == {key: last[key] for key in summarize(again)}


@pytest.mark.parametrize("own,tokens", [(77, 77), (0, 64)])
def test_a_run_is_measured_as_it_measured_itself(tmp_path, own, tokens):
    """The fault: the seed and the eval's own length were left at other values."""
    saved = asdict(Config(eval_new_tokens=own, max_new_tokens=64, seed=5, eval_k=3))
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    (tmp_path / "model").mkdir()
    given = {"run": str(tmp_path)}
    cfg = evaluation.fill(evaluation.EvalConfig(**given), given)
    assert (cfg.max_new_tokens, cfg.seed, cfg.k) == (tokens, 5, 3)
    labels = evaluation.fill(evaluation.EvalConfig(labels="x", **given), given)
    assert (labels.max_new_tokens, labels.seed) == (64, 0)  # as in training, not as in its evals
    typed = given | {"seed": 9}
    assert evaluation.fill(evaluation.EvalConfig(**typed), typed).seed == 9


@pytest.mark.parametrize(
    "text,word",
    [
        (None, "cannot be read"),
        ("", "no completions"),
        ("{not json", ":1: not JSON"),
        ('{"answer": "1", "completions": ["x"]}\n{"answer": "1"}', ":2: wants completions"),
        ('{"completions": ["x"]}', ":1: wants an answer"),
        ('{"answer": "1", "completions": ["x"], "tokens": [3]}', ":1: wants tokens"),
        ('{"answer": "1", "completions": ["x"], "finish_reason": []}', "finish_reason"),
        ('{"answer": "1", "completions": ["x"], "kind": "odd"}', "kind=odd"),
    ],
)
def test_mistakes_in_a_completions_file(tmp_path, text, word):
    path = tmp_path / "c.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=word):
        evaluation.main([f"--completions={path}"])


def test_other_mistakes(tmp_path):
    for args, word in (
        ([], "nothing to measure"),
        ([f"--run={tmp_path}"], "no readable config.json"),
        (["--model=tiny", "--kk=3"], "kk"),
        (["--model=tiny", "--k=0"], "k=0: must be at least 1"),
        (["--model=tiny", "--rollout_rows=0"], "rollout_rows=0: must be"),
        (["--labels=x.jsonl"], "nothing to measure"),
    ):
        with pytest.raises(UserError, match=word):
            evaluation.main(args)
