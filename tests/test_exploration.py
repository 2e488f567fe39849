"""The exploration audit: rules of a trace against brute force and by hand, its reward, its tool."""

import json
from itertools import permutations as orderings

import numpy as np
import pytest
import torch

import rewards
from data import Problem, Rollouts
from evaluation.exploration import audit, permutation_count, reference, solved, summarize
from harness.errors import UserError
from tasks import answers, permutations
from tasks.datasets import load_problems
from tools import exploration as tool

LISTS = ("ab", "aab", "bca", "abab", "aabc", "edcba", "aaabb")


@pytest.mark.parametrize("items", LISTS)
def test_the_reference_search_is_perfect(items):
    every = {"".join(one) for one in orderings(items)}
    assert permutation_count(items) == len(every)
    one = audit(reference(items), items)
    assert one.found == one.goals == len(every) and one.coverage == 1
    assert one.valid and one.effective and one.necessary and one.ended and not one.early_end
    assert one.repeated == 0 and solved(reference(items), items)


def test_every_fault_by_hand():
    trace = """I will search.
CHECK(a)==continue
CHECK(aa)==continue
CHECK(a, a, b)==done
BACKTRACK(b)
BACKTRACK(b)
CHECK(ba)==done
CHECK(baab)==done
BACKTRACK()
CHECK(a)==continue
CHECK(b a b)==done
CHECK(aba)==done
CHECK(ab
END()
CHECK(baa)==done"""
    one = audit(trace, "aab")
    assert one.invalid == {
        "not_back": 2,  # b is no prefix of aab, then it is the present state itself
        "verdict": 1,  # ba is not complete
        "impossible": 2,  # baab and bab have too many
        "jump": 1,  # from a to aba
        "unreadable": 1,
        "after_end": 1,
    }
    assert (one.goals, one.found, one.moves, one.checks) == (3, 2, 14, 9)
    assert one.repeated == 1 and one.needed == 4  # a twice; a, aa, aab and aba lead to a goal
    assert one.coverage == pytest.approx(2 / 3) and one.early_end and one.effective
    assert not one.valid and not one.necessary


def test_necessary_means_that_no_state_can_be_left_out():
    good = "CHECK(a)==continue\nCHECK(ab)==done"
    assert audit(good, "ab").necessary and not audit(good, "ab").ended
    assert not audit(good + "\nBACKTRACK()\nCHECK(b)==continue", "ab").necessary  # a dead end
    assert not audit(good + "\nBACKTRACK(a)\nCHECK(ab)==done", "ab").necessary  # a repeat
    empty = audit("There are two.", "ab")
    assert not (empty.valid or empty.effective or empty.necessary or empty.ended)


def allowed(here: str, items: str) -> set[str]:
    """Every allowed move from a state, written out by brute force."""
    states = {"".join(p[:n]) for p in orderings(items) for n in range(len(items) + 1)}
    moves = {f"BACKTRACK({s})" for s in states if here.startswith(s) and s != here} | {"END()"}
    for s in states:
        if s and s[:-1] == here:
            moves.add(f"CHECK({s})=={'done' if len(s) == len(items) else 'continue'}")
    return moves


def test_validity_and_coverage_against_brute_force():
    draw = np.random.default_rng(0)
    verdicts = []
    for i in range(300):
        items = LISTS[i % 5]
        lines = permutations.wandering(items, draw).split("\n")
        for _ in range(draw.integers(0, 3)):  # damage it
            j = int(draw.integers(len(lines)))
            lines[j : j + 1] = [] if draw.random() < 0.5 else [lines[j]] * 2
        here, valid, ended = "", bool(lines), False
        for line in lines:
            valid = valid and not ended and line in allowed(here, items)
            ended = ended or line == "END()"
            here = line[line.index("(") + 1 : line.index(")")]
        one = audit("\n".join(lines), items)
        assert one.valid == valid, lines
        every = {"".join(p) for p in orderings(items)}
        upto = lines[: lines.index("END()")] if "END()" in lines else lines
        assert one.found == len({p for p in every if f"CHECK({p})==done" in upto})
        verdicts.append(valid)
    assert 50 < sum(verdicts) < 250  # both kinds were tried


def test_sizes_from_20_to_2000():
    problems = permutations.make_problems(permutations.SIZES, 2)
    levels = [int(p.level) for p in problems]
    assert levels[::2] == levels[1::2] and min(levels) == 20
    assert all(
        abs(n / size - 1) <= 0.051 for n, size in zip(levels[::2], permutations.SIZES, strict=True)
    )
    assert problems == permutations.make_problems(permutations.SIZES, 2)
    assert len({p.problem for p in problems}) == len(problems)
    last = problems[-1]
    assert ", ".join(last.answer) in last.problem and solved(reference(last.answer), last.answer)


def rollouts(texts: list[str], kind: str) -> Rollouts:
    n = len(texts)
    one = torch.ones(n, dtype=torch.int64)
    problems = [Problem("p", "aab", "0", kind=kind)] * n
    tokens = torch.zeros(n, 2, dtype=torch.int64)
    return Rollouts(tokens, one, one, texts, problems, one > 0, n, seed=0, step=1)


def test_the_coverage_reward_and_the_kind():
    full, half = reference("aab"), "CHECK(a)==continue\nCHECK(aa)==continue\nCHECK(aab)==done"
    texts = [full, half + "\nEND()", half, "nothing"]
    r = rollouts(texts, "permutations")
    assert rewards.parse("coverage")(r).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0])
    assert rewards.parse("ground_truth")(r).tolist() == [1, 0, 0, 0]
    assert rewards.parse("format")(r).tolist() == [1, 1, 0, 0]  # END() was written
    assert answers.found(texts[:3], r.problem[:3]) == ["3", "1", None]
    with pytest.raises(UserError, match="permutations"):
        rewards.parse("coverage")(rollouts(texts, "math"))
    watched = {str(one) for one in rewards.watched() if not one.missing(rollouts(texts, "math"))}
    assert "coverage" not in watched  # a run on other problems does not log it


def test_a_kind_that_does_not_exist(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": "p", "answer": "1", "kind": "riddle"}\n')
    with pytest.raises(UserError, match=":1: .*riddle"):
        load_problems(str(path), "test")


def test_the_prior_of_the_tiny_world_wanders():
    """Its traces are valid, and none of the paper's faults is missing: there is work for RL."""
    draw = np.random.default_rng(0)
    s = summarize([audit(permutations.wandering(x, draw), x) for x in permutations.tiny_lists()])
    assert s["valid"] == 1 and s["n"] == 260
    assert 0.5 < s["coverage"] < 0.8 and s["repeated_states"] > 0.03 and s["early_end"] > 0.5


def test_the_tool_on_a_model_and_on_completions(tmp_path, capsys):
    world = tmp_path / "world"
    permutations.build(world, steps=1)
    train, test = (load_problems(str(world), split) for split in ("train", "test"))
    assert not {p.answer for p in train} & {p.answer for p in test}
    with pytest.raises(UserError, match="world"):
        tool.main([f"--build={world}"])
    args = [f"--data={world}", "--n=3", "--samples=2", f"--out={tmp_path}"]
    args += ["--max_prompt_tokens=32", "--max_new_tokens=20"]
    tool.main([f"--model={world}", *args])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["models"]["base"]["all"]["n"] == 6 and last["full_trace_tokens"]

    file = tmp_path / "c.jsonl"
    rows = [{"problem": "", "answer": x, "completions": [reference(x), "END()"]} for x in LISTS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool.main([f"--completions={file}", f"--out={tmp_path / 'o'}"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["models"]["file"]["all"]["coverage"] == 0.5
    saved = json.loads((tmp_path / "o" / "exploration.json").read_text())
    assert len(saved["traces"]) == 14 and (tmp_path / "o" / "exploration.png").stat().st_size
    file.write_text('{"answer": "12/5", "completions": ["x"]}\n')
    for args, word in (
        ([f"--completions={file}"], "12/5"),
        ([], "nothing to audit"),
        (["--model=x", "--sizes=1"], "sizes"),
        (["--model=x", "--data=y", "--lists=3"], "lists"),
        ([f"--completions={file}", "--samples=3"], "samples"),
        (["--model=x", "--samples=3", "--temperature=0"], "samples"),
    ):
        with pytest.raises(UserError, match=word):
            tool.main(args)
