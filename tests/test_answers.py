"""The data set decides what a correct answer is."""

import json
from types import SimpleNamespace

import pytest

import rewards
from data import Problem
from harness.errors import UserError
from tasks import answers, literals
from tasks.datasets import load_problems


def test_a_data_set_may_have_answers_of_its_own(monkeypatch):
    """After adding a kind of answer, every reward that compares answers uses it."""
    kind = answers.Kind(
        find=lambda text: text.split()[-1] if text else None,
        right=lambda texts, golds: [t.endswith(g) for t, g in zip(texts, golds, strict=True)],
    )
    monkeypatch.setitem(answers.KINDS, "last_word", kind)
    problems = [Problem("p", "cat", "0", kind="last_word"), Problem("q", "2", "1")]
    texts = ["it is a cat", r"\boxed{4/2}"]
    assert answers.correct(texts, problems) == [True, True]
    assert answers.correct(texts[::-1], problems) == [False, False]
    assert answers.correct(texts, problems, ["dog", "2"]) == [False, True]
    assert answers.found(["a b", "a b"], problems) == ["b", None]
    rollouts = SimpleNamespace(text=texts, problem=problems)
    assert rewards.parse("ground_truth + format")(rollouts).tolist() == [2, 2]


def right(kind: str, gold: str, *texts: str, grade=answers.correct) -> list[bool]:
    return grade(texts, [Problem("p", gold, "0", kind=kind)] * len(texts))


def test_a_list_may_stand_in_one_box_or_each_element_in_its_own():
    gold = "$69$,$84$"
    assert right("list", gold, r"\boxed{84, 69}", r"\boxed{69} or \boxed{84}") == [True, True]
    wrong = (r"\boxed{84}", r"\boxed{69}, \boxed{84}, \boxed{1}", r"\boxed{69} \boxed{", "69, 84")
    assert right("list", gold, *wrong) == [False] * 4
    again = r"\boxed{69}, \boxed{84}. So both \boxed{69} and \boxed{84}"  # said twice
    assert right("list", gold, again) == [True]
    assert right("list", "$(1,1), (3,2)$", r"\boxed{(3,2)} and \boxed{(1,1)}") == [True]
    assert right("math", gold, r"\boxed{69} or \boxed{84}") == [False]  # belongs to the set


@pytest.mark.parametrize(
    "gold,answer,verdict",
    [
        ("20.39", "20.391", True),  # rounds to the gold number
        ("20.39", "20.4", False),  # too few digits
        ("20.39", r"20.388\text{ cm}", True),
        ("4.5e33", r"4.54 \times 10^{33}", True),
        ("4.5e33", r"4.56 \times 10^{33}", False),
        ("4.5e33", "4.5", False),
        ("1538", "1538.4", True),
        ("1538", "1539", False),
        ("-0.2", "-0.21", True),
        ("-0.2", "0.2", False),
        (r"\frac{1}{3}", "0.333", False),  # only where the gold answer is a decimal number
    ],
)
def test_measured_quantities_may_have_more_digits(gold, answer, verdict):
    assert right("rounded", gold, rf"\boxed{{{answer}}}") == [verdict]
    assert right("rounded", gold, f"The answer is {gold}") == [False]
    assert right("rounded", gold, rf"\boxed{{{gold}}}") == [True]


@pytest.mark.parametrize(
    "gold,text,verdict",
    [
        ("[1, 2]", r"\boxed{[1,2]}", True),
        ("[1, 2]", r"\boxed{(1, 2)}", False),
        ("{'a': 1, 'b': 2}", r"$\boxed{{'b': 2, 'a': 1}}$ {done}", True),
        ("{'a': 1}", r"\boxed{\{'a': 1\}}", True),  # LaTeX's braces
        ("'}'", r"\boxed{'}'}", True),  # braces that do not match
        ("'{'", r"\boxed{'{'} ", True),
        ("'a_b'", r"\boxed{\text{'a\_b'}}", True),
        ("'ab'", r"\boxed{ab}", False),  # no literal: a name
        ("True", r"\boxed{1}", True),  # as Python compares
        ("'1'", r"\boxed{1}", False),
        ("3", r"\boxed{1 + 2}", False),  # nothing is executed
        ("3", r"\boxed{__import__('os').getpid()}", False),
        ("3", "assert f(1) == 3", False),  # only the lenient rule reads it
    ],
)
def test_python_values_are_compared_as_literals(gold, text, verdict):
    assert right("python", gold, text) == [verdict]


def test_the_lenient_rule_for_python_values():
    texts = ("assert f(1) == 'ab'", "It returns `'ab'`", "x\n'ab'", r"\boxed{ab}", "ab", "")
    verdicts = right("python", "'ab'", *texts, grade=answers.lenient)
    assert verdicts == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    "text", ["[" * 9000, "-" * 4000 + "1", "9" * 4900, "{[]: 1}", "'\\ud800'", "\0", "(" * 150]
)
def test_hostile_literals_are_refused(text):
    assert right("python", "1", f"\\boxed{{{text}}}", grade=answers.lenient) == [False]


def test_clusters_by_kind():
    texts = [r"\boxed{[1,2]}", r"\boxed{[1, 2]}", r"\boxed{(1, 2)}", "none", r"\boxed{0.5}"]
    texts.append(r"\boxed{\frac12}")
    problems = [Problem("p", "[1]", "0", kind="python")] * 4 + [Problem("q", "1", "1")] * 2
    assert answers.clusters(texts, problems, [0, 0, 0, 0, 1, 1]) == [0, 0, 2, -1, 4, 4]
    assert literals.clusters(["x", "x", "'x'"], [0, 1, 0]) == [0, 1, 2]


# ---- the sets that bring these kinds


def test_rows_of_the_sets_become_problems_of_their_kind(tmp_path):
    def load(name: str, *rows: dict) -> list[Problem]:
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return load_problems(str(path), "test")

    olympiad = {"question": "q", "is_multiple_answer": False, "subfield": "Algebra", "id": 7}
    one, unit, several, degrees = load(
        "olympiadbench",
        olympiad | {"final_answer": ["$2$"], "unit": None},
        olympiad | {"question": "r", "final_answer": ["45"], "unit": "minutes"},
        olympiad | {"question": "s", "final_answer": ["1,3"], "is_multiple_answer": True},
        olympiad | {"question": "t", "final_answer": ["90"], "unit": r"^{\circ}"},
    )
    assert (one.kind, one.subject, one.id, several.kind) == ("math", "Algebra", "7", "list")
    texts = [r"\boxed{2}", r"\boxed{45}", r"\boxed{3} \boxed{1}", r"\boxed{90^\circ}"]
    assert answers.correct(texts, [one, unit, several, degrees]) == [True] * 4
    assert answers.correct([r"\boxed{45\text{ hours}}"], [unit]) == [False]

    (crux,) = load("crux", {"code": "def f(x):\n    return x", "input": "{'code'}", "output": "2"})
    assert crux.kind == "python" and "f({'code'})" in crux.problem and crux.answer == "2"
    assert "def f(x):\n    return x" in crux.problem
    row = {"problem": "p", "solution": r"so \boxed{1.6} cm", "type": "Astronomy"}
    assert [p.kind for p in load("minerva_math", row)] == ["rounded"]
    assert [p.kind for p in load("minerva_math/other", row)] == ["math"]
    assert [p.kind for p in load("own", row | {"kind": "python"})] == ["python"]
    svamp = {"Body": "A has 2 pens.", "Question": "How many?", "Answer": 2.0, "ID": "chal-1"}
    (pens,) = load("svamp", svamp | {"Type": "Sum"})
    assert (pens.problem, pens.answer, pens.id) == ("A has 2 pens. How many?", "2", "chal-1")
    with pytest.raises(UserError, match="test.jsonl:1: kind 'odd'"):
        load("own", row | {"kind": "odd"})


SETS = {"svamp": 1000, "minerva_math": 272, "olympiadbench": 675, "amc23": 40, "aime24": 30}


@pytest.mark.parametrize("name", [*SETS, "gsm8k", "math500", "cruxeval/cruxeval.jsonl"])
def test_every_gold_answer_of_a_real_set_is_right_in_a_box(shared, name, capsys):
    problems = load_problems(str(shared / "data" / name), "test")
    n = SETS.get(name, {"gsm8k": 1319, "math500": 500}.get(name, 800))
    assert len(problems) == n
    assert "chat messages" not in capsys.readouterr().err  # SVAMP has no prompt column at all
    texts = [rf"so $\boxed{{{problem.answer}}}$." for problem in problems]
    assert all(answers.correct(texts, problems)) and all(answers.lenient(texts, problems))
    others = problems[1:] + problems[:1]
    wrong = answers.correct(texts, others)
    same = sum(a.answer == b.answer for a, b in zip(problems, others, strict=True))
    assert sum(wrong) <= same + n // 50  # a few have equivalent answers
