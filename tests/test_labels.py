"""labels.py: majorities by hand, files that resume, figures, and the command line."""

import json
import re

import pytest

import eval as evaluation
import grading
import rewards
from data import Problem
from harness.errors import UserError
from tasks import labels
from tasks.datasets import load_problems
from tasks.problems import training_problems

P = Problem("p", "1/2", id="a", subject="s", level="3")


def rows_of(*answers: list, golds: tuple = ()) -> list[dict]:
    """Rows of problems with these answers of their samples."""
    problems = [Problem(f"p{i}", g, id=str(i)) for i, g in enumerate(golds or "1" * len(answers))]
    return labels.label_rows(problems, [list(part) for part in answers])


# --------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "pairs,counted",
    [
        ([], []),
        ([("7", 0), ("8", 1), ("8", 1)], [("8", 2), ("7", 1)]),
        ([("7", 0), ("8", 1)], [("7", 1), ("8", 1)]),  # sizes tie: the first
        ([("8", 1), ("7", 0), ("9", 2), ("7", 0), ("8", 1)], [("8", 2), ("7", 2), ("9", 1)]),
        ([("0.5", 0), ("1/2", 0)], [("0.5", 2)]),  # spellings tie: the first
        ([("0.5", 0), ("1/2", 0), ("1/2", 0)], [("1/2", 3)]),
    ],
)
def test_largest_cluster_in_its_most_frequent_spelling(pairs, counted):
    assert labels.count(pairs) == counted


def test_equivalent_answers_are_one_and_strings_are_not():
    answers = ["3", "0.5", None, "\\frac{1}{2}", "3", "3", "\\frac{1}{2}", "0.5"]
    [row] = labels.label_rows([P], [answers])
    assert row["clusters"] == [["0.5", 4], ["3", 3]]
    assert (row["samples"], row["answered"]) == (8, 7)
    assert (row["equivalence_label"], row["equivalence_size"]) == ("0.5", 4)
    assert (row["string_label"], row["string_size"]) == ("3", 3)
    assert row["equivalence_correct"] and not row["string_correct"] and row["differ"]
    assert {key: row[key] for key in ("problem", "answer", "id", "subject", "level")} == {
        "problem": "p",
        "answer": "1/2",
        "id": "a",
        "subject": "s",
        "level": "3",
    }


def test_labels_of_another_spelling_do_not_differ():
    """String counting takes another spelling of the same answer: no difference."""
    [row] = rows_of(["0.5", "1/2", "1/2", "\\frac12", "0.50"])
    assert row["string_label"] == row["equivalence_label"] == "1/2" and not row["differ"]
    [row] = rows_of(["4", "4", "4.0", "4.0", "4.0", "5"])
    assert (row["equivalence_label"], row["equivalence_size"], row["string_size"]) == ("4.0", 5, 3)
    assert not row["differ"]


def test_problems_do_not_share_clusters_and_may_have_no_answer():
    first, none, last = rows_of(["7", "8", "8"], [None, None, None], ["7", "7", "8"])
    assert (first["equivalence_label"], last["equivalence_label"]) == ("8", "7")
    assert none["answered"] == 0 and none["clusters"] == [] and none["string_label"] == ""
    assert not (none["equivalence_correct"] or none["string_correct"] or none["differ"])
    written = [
        json.loads(line)
        for line in labels.render([first, none, last], "string").split("\n")
        if line
    ]
    assert [row["id"] for row in written] == ["0", "2"]


def test_figures_by_hand():
    rows = rows_of(
        ["1", "1", "1", None],
        ["2", "2", "3", "1"],
        [None] * 4,
        ["0.5", "\\frac12", "4", "4"],
        golds=("1", "1", "1", "4"),
    )
    s = labels.summarize(rows, "equivalence", too_long=2)
    assert (s["n"], s["k"], s["labelled"], s["unanswered"], s["too_long"]) == (4, 4, 3, 1, 2)
    # the last: by equivalence 0.5 (2) comes before 4 (2) and is wrong, by string 4 (2) is right
    assert s["accuracy"] == pytest.approx(1 / 3) and s["wrong"] == 2 and s["differ"] == 1
    assert s["stderr"] == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    assert s["equivalence_accuracy"] == s["accuracy"]
    assert s["string_accuracy"] == pytest.approx(2 / 3)
    assert s["majority_share"] == pytest.approx((3 / 4 + 2 / 4 + 2 / 4) / 3)
    assert s["answered_share"] == pytest.approx((3 + 4 + 0 + 4) / 16)
    by_string = labels.summarize(rows, "string")
    assert by_string["accuracy"] == s["string_accuracy"] and by_string["wrong"] == 1
    assert labels.summarize(rows[:1], "string")["stderr"] is None


def test_a_label_is_wrong_only_if_a_lenient_rule_says_so_too():
    """What the strict rule cannot read is no wrong label."""
    right = [("1/2", "0.5"), ("7", "7")]
    doubtful = [
        ("5", "The answer is 5"),  # a gold answer in a sentence
        ("there are 5 of them", "5"),
        ("The answer is $\\frac{1}{2}$.", "\\frac12"),
        ("it is \\boxed{3}", "the box: \\boxed{3}"),
        ("5 furlongs a fortnight", "5 knots or so"),
    ]
    wrong = [("6", "5"), ("1/2", "2"), ("\\frac{3}{2}", "2"), ("\\sqrt{2}", "2")]
    wrong += [("(1,2)", "(2,1)"), ("6 apples", "5 apples"), ("x+1", "x-1")]
    pairs = [*right, *doubtful, *wrong]
    strict, lenient = labels.label_is_right(*map(list, zip(*pairs, strict=True)))
    assert strict == [True] * len(right) + [False] * (len(doubtful) + len(wrong))
    assert lenient == [True] * (len(right) + len(doubtful)) + [False] * len(wrong)


def test_incorrect_trains_on_no_doubtful_label_and_counts_them(tmp_path):
    rows = [("7", "7"), ("5", "it is 5, I believe"), ("6", "5"), ("8", "5")]
    lines = [
        {"problem": f"p{i}", "label": label, "answer": gold} for i, (label, gold) in enumerate(rows)
    ]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = rewards.parse("incorrect")
    kept, dropped = training_problems(str(path), [], reward)
    assert [p.problem for p in kept] == ["p2", "p3"]
    assert "1 with a right label" in dropped and "1 right by a lenient rule" in dropped
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    with pytest.raises(UserError, match="l.jsonl"):
        training_problems(str(path), [], reward)
    row = {"answered": 4, "samples": 4, "answer": "it is 5", "differ": False}
    for by in ("equivalence", "string"):
        row |= {f"{by}_label": "5", f"{by}_size": 3, f"{by}_correct": False}
    summary = labels.summarize([row, {**row, "answer": "6"}], "equivalence")
    assert (summary["wrong"], summary["doubtful"]) == (1, 1)


# --------------------------------------------------------------------------------------- the file


def open_file(path, total=3, **settings) -> labels.LabelFile:
    return labels.LabelFile(str(path), {"model": "m", "k": 4, **settings}, total)


def test_what_is_written_is_read_with_its_labels(tmp_path):
    rows = rows_of(["1/2", "0.5", "0.5"], [None] * 3, ["8", "7", "8"], golds=("0.5", "1", "7"))
    with open_file(tmp_path / "new" / "l.jsonl") as file:
        file.add(rows)
        file.finish("equivalence")
        assert not list(tmp_path.glob("*/*.tmp"))
    problems = load_problems(str(tmp_path / "new" / "l.jsonl"), "train")
    assert [(p.id, p.answer, p.label) for p in problems] == [("0", "0.5", "0.5"), ("2", "7", "8")]
    first = json.loads((tmp_path / "new" / "l.jsonl").read_text().split("\n")[0])
    assert (first["label"], first["label_size"], first["label_correct"]) == ("0.5", 3, True)


def test_the_other_count_without_sampling_and_no_edit_lost(tmp_path, capsys):
    path = tmp_path / "l.jsonl"
    with open_file(path, total=1) as file:
        file.add(rows_of(["3", "3", "0.5", "\\frac12", "\\frac{1}{2}"]))
        file.finish("equivalence")
        with pytest.raises(UserError, match="label_by.*without sampling"):
            file.finish("string")
    assert load_problems(str(path), "train")[0].label == "0.5"
    path.unlink()
    with open_file(path, total=1) as file:
        file.finish("string")
        file.finish("string")  # there already: left alone
    assert "complete" in capsys.readouterr().out
    assert load_problems(str(path), "train")[0].label == "3"


@pytest.mark.parametrize("tail", ["", '{"problem": "ha', "\\", '{"problem": "p2"}'])
def test_half_a_line_is_dropped(tmp_path, tail):
    rows = rows_of(["1"], ["2"], ["3"])
    with open_file(tmp_path / "l.jsonl") as file:
        file.add(rows[:2])
    with open(tmp_path / "l.jsonl.progress", "a") as cut:
        cut.write(tail)
    with open_file(tmp_path / "l.jsonl") as file:
        assert file.rows == rows[:2]
        file.add(rows[2:])
    with open_file(tmp_path / "l.jsonl") as file:
        assert file.rows == rows


def test_other_settings_are_refused_once_there_are_rows(tmp_path):
    with open_file(tmp_path / "l.jsonl", k=99):  # no row: nothing to lose
        pass
    with open_file(tmp_path / "l.jsonl") as file:
        file.add(rows_of(["1"]))
    with pytest.raises(UserError, match="k was 4 and is now 5: name another file"):
        open_file(tmp_path / "l.jsonl", k=5)
    with pytest.raises(UserError, match='new was null and is now "x"'):
        open_file(tmp_path / "l.jsonl", new="x")


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "l.jsonl"
    with open_file(path), pytest.raises(UserError, match="another process"):
        open_file(path)
    path.write_text("mine\n")
    with pytest.raises(UserError, match="exists, but l.jsonl.progress is unfinished"):
        open_file(path)
    path.rename(tmp_path / "own.jsonl")
    with pytest.raises(UserError, match="exists, and has no own.jsonl.progress"):
        open_file(tmp_path / "own.jsonl")
    assert not (tmp_path / "own.jsonl.progress").exists()
    for text in ("mine\n", "[]\n", "{}\n", "\u20ac\n"):
        (tmp_path / "l.jsonl.progress").write_text(text)
        with pytest.raises(UserError, match="not a list of labels"):
            open_file(path)
    with pytest.raises(UserError, match="a folder"):
        open_file(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        open_file(tmp_path / "own.jsonl" / "l.jsonl")


# ----------------------------------------------------------------------------------- command line


@pytest.fixture()
def digits(monkeypatch):
    """An untrained model boxes next to nothing: take the last digit of a text for its answer."""

    def last_digit(text: str) -> str | None:
        found = re.findall(r"\d", text[:20])
        return found[-1] if found else None

    monkeypatch.setattr(grading, "last_boxed", last_digit)


def command(world: str, path, *more: str) -> list[str]:
    return [
        f"--labels={path}",
        f"--model={world}",
        f"--data={world}",
        "--n=11",
        "--k=5",
        "--max_prompt_tokens=32",
        "--max_new_tokens=12",
        *more,
    ]


def test_interrupted_and_resumed_is_as_uninterrupted(tiny_random, tmp_path, digits, monkeypatch):
    evaluation.main(command(tiny_random, tmp_path / "whole"))
    add, calls = labels.LabelFile.add, []

    def interrupted(self, rows):
        if len(calls) in (2, 4):
            calls.append("stop")
            raise KeyboardInterrupt
        calls.append(len(rows))
        add(self, rows)

    monkeypatch.setattr(labels.LabelFile, "add", interrupted)
    for rows_at_once in (10, 16, 3, 64):
        args = command(tiny_random, tmp_path / "parts", f"--rollout_rows={rows_at_once}")
        if len(calls) < 5:
            with pytest.raises(KeyboardInterrupt):
                evaluation.main(args)
            assert not (tmp_path / "parts").exists()
            with open(tmp_path / "parts.progress", "a") as file:
                file.write('{"problem": "cut o')
        else:
            evaluation.main(args)
    assert calls == [2, 2, "stop", 3, "stop", 1, 1, 1, 1] and len(set(calls)) > 2
    for suffix in ("", ".progress"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        assert whole and whole == (tmp_path / f"parts{suffix}").read_bytes()


def test_complete_is_said_without_a_model(tiny_random, tmp_path, digits, monkeypatch, capsys):
    args = command(tiny_random, tmp_path / "l.jsonl")
    evaluation.main(args)
    first = capsys.readouterr().out.splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "load_for_eval", None)
        evaluation.main([*args, "--rollout_rows=7"])
    again = capsys.readouterr().out.splitlines()
    assert again == [f"{tmp_path / 'l.jsonl'} is complete", *first]
    summary = json.loads(first[-1])
    assert (summary["n"], summary["k"]) == (11, 5)
    rows = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert summary["wrong"] == sum(not row["label_correct"] for row in rows)
    evaluation.main(command(tiny_random, tmp_path / "other.jsonl", "--seed=1"))
    assert (tmp_path / "other.jsonl").read_text() != (tmp_path / "l.jsonl").read_text()


@pytest.mark.parametrize(
    "change,key",
    [
        ("--k=6", "k was 5 and is now 6"),
        ("--seed=1", "seed was 0 and is now 1"),
        ("--n=10", "n was 11 and is now 10"),
        ("--temperature=0.5", "temperature was 1.0 and is now 0.5"),
        ("--dtype=bfloat16", "dtype was"),
        ("--data={other}", "data was"),
        ("--model={other}", "model was"),
    ],
)
def test_another_configuration_is_refused(tiny_random, tmp_path, digits, change, key):
    path = tmp_path / "l.jsonl"
    evaluation.main(command(tiny_random, path))
    before = path.read_bytes()
    change = change.format(other=tiny_random + "/../" + tiny_random.rsplit("/", 1)[1])
    args = [a for a in command(tiny_random, path) if a.split("=")[0] != change.split("=")[0]]
    with pytest.raises(UserError, match=key):
        evaluation.main([*args, change])
    assert path.read_bytes() == before


def test_real_boxes_from_the_command_line(tiny_random, tmp_path, capsys):
    """Untrained, the tiny model still closes a box now and then."""
    path = tmp_path / "l.jsonl"
    args = [f"--labels={path}", f"--model={tiny_random}", f"--data={tiny_random}", "--n=2"]
    evaluation.main([*args, "--max_prompt_tokens=32", "--max_new_tokens=40"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["k"] == 64 and 0 < last["labelled"] <= last["n"] == 2
    train = {p.problem: p for p in load_problems(tiny_random, "train")}  # not its test split
    for problem in load_problems(str(path), "train"):
        gold = train[problem.problem]
        assert problem.label and (problem.answer, problem.id) == (gold.answer, gold.id)
    settings = json.loads((tmp_path / "l.jsonl.progress").read_text().split("\n")[0])["settings"]
    assert (settings["temperature"], settings["prompt"]) == (1.0, "none")


def test_no_answer_at_all_is_said(tiny_random, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "last_boxed", lambda text: None)
    with pytest.raises(UserError, match="no sample has a boxed answer"):
        evaluation.main(command(tiny_random, tmp_path / "l.jsonl"))
    assert not (tmp_path / "l.jsonl").exists()


@pytest.mark.parametrize(
    "more,word",
    [
        (["--completions=x.jsonl"], "completions has no effect"),
        (["--out=x"], "out has no effect"),
        (["--temperature=0"], "labels: a majority wants"),
        (["--k=1"], "labels: a majority wants"),
        (["--label_by=strings"], "label_by"),
        (["--data=nowhere"], "nowhere: no such file"),
        (["--labels=/dev/null/l.jsonl"], "cannot be written"),
        (["--labels="], "label_by acts only with"),
    ],
)
def test_mistakes(tiny_random, tmp_path, more, word):
    keys = [m.split("=")[0] for m in more]
    args = [*command(tiny_random, tmp_path / "l.jsonl"), "--label_by=string"]
    with pytest.raises(UserError, match=word):
        evaluation.main([a for a in args if a.split("=")[0] not in keys] + more)


def test_defaults_of_a_run_and_of_models(tmp_path):
    """A run: its train data and base model. Any model: 64 raw samples at temperature 1."""

    def filled(**given):
        return evaluation.fill(evaluation.EvalConfig(labels="x", **given), given)

    saved = dict(
        model="base",
        quant="nf4",
        prompt="qwen_math",
        dtype="auto",
        max_prompt_tokens=9,
        max_new_tokens=8,
        rollout_rows=7,
        train_data="mine.jsonl",
        eval_data="e",
        eval_n=3,
        eval_k=1,
        eval_temperature=0.0,
    )
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    (tmp_path / "adapter").mkdir()
    cfg = filled(run=str(tmp_path))
    assert (cfg.model, cfg.adapter, cfg.data, cfg.n, cfg.quant) == (
        "base",
        "",
        "mine.jsonl",
        0,
        "nf4",
    )
    assert (cfg.k, cfg.temperature, cfg.prompt, cfg.max_new_tokens) == (64, 1.0, "none", 8)
    own = tmp_path / "a"
    own.mkdir()
    (own / "adapter_config.json").write_text("{}")
    assert filled(run=str(tmp_path), adapter=str(own), k=3).adapter == str(own)
    with pytest.raises(UserError, match="adapter=none"):
        filled(run=str(tmp_path), adapter="none")
    cfg = filled(model="any", prompt="qwen_math", k=8)
    assert (cfg.data, cfg.k, cfg.temperature, cfg.prompt) == ("deepscaler", 8, 1.0, "qwen_math")
    cfg = filled(model="tiny_bad")
    assert (cfg.data, cfg.k, cfg.max_new_tokens) == ("tiny_bad", 64, 56)
