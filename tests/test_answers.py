"""The data set decides what a correct answer is."""

from types import SimpleNamespace

import rewards
from data import Problem
from tasks import answers


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
