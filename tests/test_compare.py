"""tools.compare: two sets of completions on the same problems."""

import json

import pytest

from evaluation import comparison
from evaluation.statistics import mcnemar
from harness.errors import UserError
from tools import compare

CODE, WORDS = "```python\nprint(1)\n``` ", "so "


def rows(answers: str, habit: str = WORDS, first: int = 0) -> list[dict]:
    """One row a character: 1 is right, 0 is wrong."""
    return [
        {"problem": f"p{first + i}", "answer": "1", "completions": [f"{habit}\\boxed{{{a}}}"]}
        for i, a in enumerate(answers)
    ]


def write(path, content: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def compared(capsys, *args) -> tuple[str, dict]:
    compare.main(list(args))
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_figures_by_hand(tmp_path, capsys):
    """Ten problems: 2 only in A, 6 only in B, 1 in both, 1 in neither."""
    a = write(tmp_path / "a.jsonl", rows("1100000010"))
    b = write(tmp_path / "b.jsonl", rows("0011111110", CODE))
    out, found = compared(capsys, a, b)
    assert (found["n"], found["only_a"], found["only_b"]) == (10, 2, 6)
    assert found["mcnemar_p"] == pytest.approx(mcnemar(2, 6)) and "McNemar" in out
    d = found["differences"]["accuracy"]
    assert d["mean"] == pytest.approx(0.4) and d["low"] < 0.4 < d["high"]
    assert found["differences"]["code_frequency"]["mean"] == 1
    changed = found["transitions"]["language to code"]
    assert changed == {"n": 10, "gained": 6, "lost": 2, "part": 1.0}
    assert "58.3%" in out and "cannot be told from 0" in out
    assert "### language to code, now right" in out and "### language to code, now wrong" in out
    assert "###" not in compared(capsys, a, b, "--examples=0")[0]


def test_swapping_the_sides_swaps_the_signs(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", rows("110000"))
    b = write(tmp_path / "b.jsonl", rows("111110"))
    _, there = compared(capsys, a, b)
    _, back = compared(capsys, b, a)
    there, back = there["differences"]["accuracy"], back["differences"]["accuracy"]
    assert there["mean"] == -back["mean"] and there["p"] == pytest.approx(back["p"])
    _, same = compared(capsys, a, a)
    assert same["differences"]["accuracy"]["p"] == 1 and same["mcnemar_p"] == 1
    assert same["transitions"]["language to language"]["part"] is None  # undefined


def test_problems_are_paired_by_their_text_and_the_rest_is_counted(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", rows("110"))
    b = write(tmp_path / "b.jsonl", rows("111", first=1)[::-1])  # p3, p2, p1
    out, found = compared(capsys, a, b)
    assert found["n"] == 2 and found["differences"]["accuracy"]["mean"] == 0.5
    assert "1 problems only in A, 1 only in B" in out
    other = write(tmp_path / "c.jsonl", rows("1", first=9))
    with pytest.raises(UserError, match="share no problem"):
        compare.main([a, other])


def test_a_repeated_problem_is_paired_row_by_row():
    twice = [rows("1")[0] | {"correct": [True]}, rows("1")[0] | {"correct": [False]}]
    pair = comparison.pair_up(comparison.Side("a", twice), comparison.Side("b", twice))
    assert pair.a.rows == pair.b.rows == twice


def test_other_numbers_of_samples_have_no_transition_table(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", rows("10"))
    more = [row | {"completions": row["completions"] * 2} for row in rows("11")]
    b = write(tmp_path / "b.jsonl", more)
    out, found = compared(capsys, a, b)
    assert found["transitions"] is None and found["differences"]["accuracy"]["mean"] == 0.5
    assert "Sign test" in out


def test_tokens_are_not_compared_with_characters(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [row | {"tokens": [[1, 2]]} for row in rows("10")])
    b = write(tmp_path / "b.jsonl", rows("10"))
    assert "length" not in compared(capsys, a, b)[1]["differences"]
    assert "length" in compared(capsys, a, a)[1]["differences"]


def test_folders_of_evals_and_of_runs(tmp_path, capsys):
    write(tmp_path / "eval" / "completions.jsonl", rows("00"))
    run = tmp_path / "run"
    write(run / "eval" / "step_00000.jsonl", rows("00"))
    write(run / "eval" / "step_00010.jsonl", rows("01"))
    last = write(run / "eval" / "step_00020.jsonl", rows("11"))
    assert str(comparison.completions_of(str(run))) == last
    _, found = compared(capsys, str(tmp_path / "eval"), str(run))
    assert found["differences"]["accuracy"]["mean"] == 1
    _, found = compared(capsys, str(run))  # its first eval against its last
    assert found["differences"]["accuracy"]["mean"] == 1
    out = tmp_path / "report.md"
    compare.main([str(run), f"--out={out}"])
    assert "B - A" in out.read_text()


def test_mistakes(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = write(tmp_path / "a.jsonl", rows("1"))
    for args, word in (
        ([], "compare A B"),
        ([file] * 3, "compare A B"),
        ([str(empty), file], "empty: no completions"),
        ([str(tmp_path / "none"), file], "none: no completions"),
        ([str(empty)], "empty: not a run with two evals"),
        ([file, file, "--examples=-1"], "examples"),
    ):
        with pytest.raises(UserError, match=word):
            compare.main(args)


def test_real_completions(shared, tmp_path, capsys):
    """A file against itself, a part of it left out."""
    file = shared / "data" / "completions" / "qwen25_math_100x8.jsonl"
    lines = file.read_text().splitlines()[:20]
    part = tmp_path / "part.jsonl"
    part.write_text("\n".join(lines[5:]) + "\n")
    whole = tmp_path / "whole.jsonl"
    whole.write_text("\n".join(lines) + "\n")
    out, found = compared(capsys, str(whole), str(part))
    assert found["n"] == 15 and found["differences"]["accuracy"]["mean"] == 0
    assert "5 problems only in A" in out
