"""Rewards and their expressions, each against values worked out by hand."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, pearsonr

import grading
import rewards
from harness.configurator import PROJECT
from harness.errors import UserError
from tools import rewards as scoring

TEXTS = [r"Python: \boxed{2}", r"\boxed{3}", "import python", r"so \boxed{4/2} or \boxed{"]


def make(texts=TEXTS, answer="2", group_size=2, **fields) -> SimpleNamespace:
    rows = torch.arange(len(texts))
    given = dict(seed=1, step=1, self_certainty=None, mask=None, cluster=None) | fields
    return SimpleNamespace(
        text=list(texts),
        problem=[SimpleNamespace(problem="1 + 1?", answer=answer)] * len(texts),
        group_size=group_size,
        prompt_index=rows // group_size,
        sample_index=rows % group_size,
        **given,
    )


def score(expression: str, rollouts=None) -> list[float]:
    out = rewards.parse(expression)(rollouts or make())
    assert out.dtype == torch.float32 and out.device.type == "cpu"
    return out.tolist()


# ---- the rewards


def test_rewards_of_the_text():
    assert score("ground_truth") == [1, 0, 0, 0]
    assert score("format") == [1, 1, 0, 0]
    assert score("python") == [1, 0, 1, 0]
    assert score('contains(word="PYTHON")') == [1, 0, 1, 0] and score("contains(zebra)") == [0] * 4


@pytest.mark.parametrize(
    ("name", "n", "python", "code", "without_the_word"),
    [
        ("qwen3_4b_base_math500", 500, 14, 16, [264, 399]),  # a drawing, an empty fence
        ("qwen25_math_100x8", 800, 5, 5, []),
        ("tora_code_34b_gsm8k", 1319, 1319, 1319, []),
    ],
)
def test_python_reward_against_code_in_real_completions(
    shared, name, n, python, code, without_the_word
):
    """The word "python" against fences and lines that begin with def or print: docs/GRADING.md."""
    rollouts, _ = scoring.read_completions(str(shared / "data" / "completions" / f"{name}.jsonl"))
    word = np.array(score("python", rollouts)) == 1
    lines = re.compile(r"^\s*(```|def \w+\(|print\()", re.MULTILINE)
    has_code = np.array([bool(lines.search(text)) for text in rollouts.text])
    assert (len(word), word.sum(), has_code.sum()) == (n, python, code)
    assert not (word & ~has_code).any()
    assert np.flatnonzero(has_code & ~word).tolist() == without_the_word


def test_no_repetition():
    ten, long = "abcdefghij", "".join(map(chr, range(200, 456)))  # 10 and 256 characters
    cases = [
        ("say " + ten * 10 + ".", 0),
        (ten * 9 + ten[:9], 1),  # one character short of the tenth time
        (ten * 9 + "abcdefghi!", 1),
        ("abcdefghi" * 20, 0),  # period 9 is also period 18
        (("abcdefghi" * 20)[:-1], 1),
        ("abcdefghi" * 11, 1),  # nine characters: too short a pattern, 18 only five times
        (long * 10, 0),
        (("y" + long) * 10, 1),  # 257 characters
        ("a" * 100, 0),
        ("a" * 99, 1),
        ("", 1),
    ]
    rollouts = make([text for text, _ in cases], group_size=1)
    assert score("no_repetition", rollouts) == [want for _, want in cases]


def test_no_repetition_is_quick_on_hostile_text():
    noise = np.random.default_rng(0).choice(list("ab"), 300_000)
    texts = ["".join(noise), ("ab" * 44 + "c") * 5000, "ab" * 49 + "c"]
    started = time.process_time()
    assert score("no_repetition", make(texts, group_size=1)) == [1, 0, 1]
    assert time.process_time() - started < 5


# ---- rewards of a group's answers: two groups of four

ANSWERS = [
    r"\boxed{1/2}",
    r"\boxed{0.5}",
    r"\boxed{3}",
    "none",
    *[r"\boxed{3}"] * 2,
    r"\boxed{2}",
    "",
]


def grouped(**fields):
    return make(ANSWERS, answer="3", group_size=4, **fields)


def test_rewards_that_count_answers():
    """Each group for itself: 3 is a minority in the first and the majority in the second."""
    assert score("semantic_entropy", grouped()) == [0.5, 0.5, 0.25, 0, 0.5, 0.5, 0.25, 0]
    assert score("soft_majority", grouped()) == [0.25, 0.25, 0.25, 0, 0.5, 0.5, 0.25, 0]
    assert score("majority(online)", grouped()) == [1, 1, 0, 0, 1, 1, 0, 0]


def test_online_majority_takes_the_first_of_equal_clusters_and_no_answer_never_wins():
    texts = ["", "", r"\boxed{7}", r"\boxed{8}", "", "", "", ""]
    assert score("majority(online)", make(texts, group_size=4)) == [0, 0, 1, 0, 0, 0, 0, 0]


def test_answers_are_clustered_once_a_batch(monkeypatch):
    calls = []
    clusters = grading.clusters
    monkeypatch.setattr(grading, "clusters", lambda *a: calls.append(a) or clusters(*a))
    rollouts = grouped()
    score("semantic_entropy + majority(online)", rollouts)
    score("semantic_entropy", rollouts)
    assert len(calls) == 1


def test_offline_majority_and_incorrect():
    rollouts = grouped(label=["0.5"] * 4 + ["3"] * 4)
    assert score("majority", rollouts) == [1, 1, 0, 0, 1, 1, 0, 0]
    assert score("majority(offline)", rollouts) == score("majority(label=offline)", rollouts)
    # the gold answer is 3: the second group's label is right, and teaches nothing here
    assert score("incorrect", rollouts) == [1, 1, 0, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="eval.py --labels"):
        score("incorrect")


# ---- rewards of what a model thinks

SCORED = dict(
    mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool(),
    length=torch.tensor([3, 2, 1, 0]),
    self_certainty=torch.tensor([[1.0, 2, 6], [4, 2, 9], [5, 9, 9], [9, 9, 9]]),
    base_self_certainty=torch.tensor([[2.0, 2, 2], [1, 2, 9], [3, 9, 9], [9, 9, 9]]),
    entropy=torch.tensor([[3.0, 0, 0], [1, 0, 9], [2, 9, 9], [9, 9, 9]]),
    logp=torch.tensor([[-1.0, -2, 0], [-4, -1, -9], [-3, -9, -9], [-9, -9, -9]]),
    cross_logp={"default": torch.tensor([-1.0, -2, -3, -4]), "a/b": torch.ones(4)},
)


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("self_certainty", [3, 3, 5, 0]),
        ("self_certainty(policy)", [3, 3, 5, 0]),
        ("self_certainty(base)", [2, 1.5, 3, 0]),
        ("neg_entropy", [-1, -0.5, -2, 0]),
        ("neg_entropy(sum)", [-3, -1, -2, 0]),
        ("neg_entropy(no_answer=-7)", [-1, -0.5, -7, -7]),  # TEXTS: two boxes, two without
        ("neg_entropy(sum, -7)", [-3, -1, -7, -7]),
        ("neg_entropy(no_answer=None)", [-1, -0.5, -2, 0]),
        ("logp", [-3, -5, -3, 0]),
        ("logp(mean)", [-1, -2.5, -3, 0]),
        ("cross_model", [-1, -2, -3, -4]),
        ("cross_model('a/b')", [1, 1, 1, 1]),
        ("length", [3, 2, 1, 0]),
        ("constant", [1, 1, 1, 1]),
        ("constant(-0.5)", [-0.5] * 4),
    ],
)
def test_rewards_over_response_tokens(expression, want):
    """Whatever stands beyond a response's length (9 here) does not count."""
    assert score(expression, make(**SCORED)) == want


@pytest.mark.parametrize(
    ("expression", "need"),
    [
        ("0.1 * self_certainty", "self_certainty"),
        ("self_certainty(base)", "base_self_certainty"),
        ("neg_entropy", "entropy"),
        ("logp(mean)", "logp"),
        ("length", "length"),
        ("cross_model(other)", "second model"),
    ],
)
def test_a_missing_input_is_named(expression, need):
    with pytest.raises(UserError, match=f"needs .*{need}"):
        score(expression)


def test_needs_follow_the_arguments():
    needs = {
        e: rewards.parse(e).needs
        for e in (
            "majority",
            "majority(online)",
            "self_certainty(base)",
            "cross_model(x)",
            "format",
        )
    }
    assert list(needs.values()) == [("label",), (), ("base_self_certainty",), ("cross_logp:x",), ()]


def test_watched_are_all_that_need_no_argument_and_run_where_their_inputs_are():
    watched = {str(one): one for one in rewards.watched()}
    assert set(rewards.VARIANTS) < set(watched)
    text_only = {name for name, one in watched.items() if not one.missing(make())}
    assert text_only >= {
        "ground_truth",
        "majority(online)",
        "soft_majority",
        "semantic_entropy",
        "format",
        "random",
        "python",
        "no_repetition",
        "constant",
    }
    full = make(**SCORED, label=["2"] * 4, to_permute=["ab"] * 4)
    assert not any(one.missing(full) for one in watched.values())
    assert all(len(one(full)) == 4 for one in watched.values())


def test_random_is_a_function_of_seed_step_prompt_and_sample():
    rollouts = make(["x"] * 64, group_size=8)
    first = score("random(0.5)", rollouts)
    order = np.random.default_rng(0).permutation(64)
    shuffled = make(["another text"] * 64, group_size=8)
    shuffled.prompt_index = rollouts.prompt_index[torch.from_numpy(order)]
    shuffled.sample_index = rollouts.sample_index[torch.from_numpy(order)]
    assert score("random", shuffled) == [first[i] for i in order]
    part = make(["x"] * 16, group_size=8)
    assert score("random", part) == first[:16]
    for other in (dict(seed=2), dict(step=2)):
        assert score("random", make(["x"] * 64, group_size=8, **other)) != first


@pytest.mark.parametrize("p", [0, 0.3, 0.5, 1])
def test_random_has_its_mean_and_no_correlation_between_neighbours(p):
    n = 20_000  # four such runs
    draws = np.array(score(f"random({p})", make(["x"] * n, group_size=16)))
    standard_error = math.sqrt(p * (1 - p) / n)
    assert abs(draws.mean() - p) <= 4 * standard_error
    together = (draws[1:] * draws[:-1]).mean()  # p^2 where independent
    assert abs(together - p * p) <= 6 * standard_error


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.001, 0.5])
def test_random_over_100_000_draws(p):
    """Mean within 4 standard errors; independent of length and of what the text says."""
    rng = np.random.default_rng(0)
    words = rng.integers(1, 50, size=100_000)
    code = rng.random(100_000) < 0.65
    texts = [
        ("python " if c else "so ") * n for c, n in zip(code.tolist(), words.tolist(), strict=True)
    ]
    draws = np.array(score(f"random({p})", make(texts, group_size=16, seed=7)))
    assert abs(draws.mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(draws))
    for covariate in (words, code):
        assert pearsonr(draws, covariate).pvalue > 1e-3


# ---- expressions


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("format & python", [1, 0, 0, 0]),
        ("format & ~python", [0, 1, 0, 0]),
        ("~(format & python)", [0, 1, 1, 1]),
        ("ground_truth + 0.5*format", [1.5, 0.5, 0, 0]),
        ("format*2 - python", [1, 2, -1, 0]),
        ("-python", [-1, 0, -1, 0]),
        ("-0.5*python", [-0.5, 0, -0.5, 0]),
        ("  ((format))  ", [1, 1, 0, 0]),
        ("random(1)", [1, 1, 1, 1]),
        ("random(p=0)", [0, 0, 0, 0]),
    ],
)
def test_expressions(expression, want):
    assert score(expression) == want


def test_parsed_reward_knows_its_names_and_needs():
    parsed = rewards.parse("0.1*self_certainty + (format & ~random(p=.3)) + format")
    assert parsed.names == ("self_certainty", "format", "random")
    assert parsed.needs == ("self_certainty",)
    assert str(parsed) == "0.1*self_certainty + (format & ~random(p=.3)) + format"


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("fromat & python", "no reward 'fromat': did you mean format"),
        ("random(1.5)", "within"),
        ("random(p=nan)", "p wants"),
        ("random(-0.1)", "within"),
        ("random(q=1)", "random: .*'q'"),
        ("random(0.5, p=0.5)", "random: .*'p'"),
        ("random(0.5, 1)", "random: .*random\\(p=0.5\\)"),
        ("random('x')", "p wants"),
        ("random(True)", "p wants"),
        ("random(**p)", "random: "),
        ("random(*p)", "\\*p"),
        ("format(1)", "format: "),
        ("majority(on)", "label must be one of offline, online"),
        ("neg_entropy(mean, no_answer=x)", "no_answer wants"),
        ("neg_entropy(median)", "over must be one of mean, sum"),
        ("cross_model(3)", "path wants"),
        ("constant(1e999)", "c wants"),
        ("format and python", "no meaning"),
        ("format * python", "`\\*` wants a number"),
        ("1 - format", "number alone"),
        ("format / 2", "no meaning"),
        ("format.real", "no meaning"),
        ("(lambda: 1)()", "no meaning"),
        ("__import__('os')", "no reward '__import__'"),
        ("1e999 * format", "too large"),
        ("format &", "cannot be read"),
        ("format; python", "cannot be read"),
        ("", "cannot be read"),
        ("\0", "cannot be read|null"),
        ("(" * 240 + "format" + ")" * 240, "cannot be read"),
        ("(" * 5000 + "format" + ")" * 5000, "longer"),
        ("~" * 400 + "fromat", "did you mean|too deep"),
    ],
)
def test_bad_expressions_say_what_is_wrong(expression, says):
    with pytest.raises(UserError, match=says) as caught:
        rewards.parse(expression)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("expression", ["~(format + python)", "format & 2*python"])
def test_only_binary_rewards_are_joined(expression):
    with pytest.raises(UserError, match="0 or 1, got 2"):
        score(expression)


def test_long_chains_that_parse_also_run():
    assert score("~" * 400 + "format") == [1, 1, 0, 0]


# ---- the registry


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(rewards, "REGISTRY", dict(rewards.REGISTRY))


def test_a_new_reward_is_one_function(registry):
    @rewards.reward(
        formula="n if the text holds the word", source="here", needs=("self_certainty",)
    )
    def holds(rollouts, word: str, n: int = 1, twice: bool = False):
        factor = n * (1 + twice)
        return torch.tensor([factor * (word in text) for text in rollouts.text])

    scored = make(self_certainty=torch.zeros(4, 1))
    assert score("holds(python)", scored) == [0, 0, 1, 0]  # a bare name stands for text
    assert score("holds('so', n=3, twice=True)", scored) == [0, 0, 0, 6]
    assert rewards.parse("format & holds(so)").needs == ("self_certainty",)
    with pytest.raises(UserError, match="n wants"):
        rewards.parse("holds(so, 1.5)")
    with pytest.raises(UserError, match="holds: .*'word'"):
        rewards.parse("holds()")
    assert "holds" not in [str(one) for one in rewards.watched()]  # it cannot do without a word
    with pytest.raises(ValueError, match="two rewards"):
        rewards.reward(formula="", source="")(holds)


@pytest.mark.slow
def test_the_readmes_reward_in_a_copy_of_the_project(tmp_path, tiny_random):
    """As a reader would: its lines behind rewards.py, its name in a config file, one run."""
    readme = (PROJECT / "README.md").read_text()
    block = readme.partition("# rewards.py\n")[2].partition("```")[0]
    assert block.startswith("@reward(")
    for package in (".", "grading", "decoding", "harness", "tasks", "evaluation"):
        (tmp_path / package).mkdir(exist_ok=True)
        for path in (PROJECT / package).glob("*.py"):
            shutil.copy(path, tmp_path / package)
    if "\ndef asks(" not in (tmp_path / "rewards.py").read_text():  # a reader may have it there
        with open(tmp_path / "rewards.py", "a") as file:
            file.write("\n" + block)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "asks.py").write_text('reward = "asks & ~python"\n')
    (tmp_path / "config" / "model").mkdir()
    shutil.copy(PROJECT / "config" / "model" / "tiny.py", tmp_path / "config" / "model")
    command = [sys.executable, "train.py", "config/asks.py", "config/model/tiny.py", "--steps=1"]
    command += [f"--{key}={tiny_random}" for key in ("model", "train_data", "eval_data")]
    command += ["--eval_every=0", "--out_dir=run", "--max_new_tokens=12"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(row) for row in rows]
    want = ["?" in s["response"] and "python" not in s["response"].lower() for s in samples]
    assert [s["reward"] for s in samples] == want and len(want) == 4
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < metrics["reward"] <= metrics["asks/mean"] < 1


def test_a_reward_owes_one_finite_number_a_row(registry):
    @rewards.reward(formula="", source="")
    def short(rollouts):
        return torch.zeros(1)

    @rewards.reward(formula="", source="")
    def bad(rollouts):
        return torch.full((len(rollouts.text),), math.nan)

    for name in ("short", "bad"):
        with pytest.raises(UserError, match=f"reward '{name}'"):
            score(name)


def test_an_error_inside_a_reward_names_it(registry):
    @rewards.reward(formula="", source="")
    def broken(rollouts):
        return 1 / 0

    with pytest.raises(UserError, match="'broken' failed at test_rewards.py"):
        score("format + broken")


# ---- scoring files


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_against_scipy(ties):
    rng = np.random.default_rng(0)
    label = rng.random(200) < 0.3
    value = rng.normal(size=200) + label
    value = value.round() if ties else value
    u = mannwhitneyu(value[label], value[~label]).statistic
    assert rewards.auroc(value, label) == pytest.approx(
        u / (label.sum() * (~label).sum()), abs=1e-12
    )


def test_auroc_by_hand():
    assert rewards.auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert rewards.auroc([4, 2, 3, 1], [0, 0, 1, 1]) == 0.25
    assert rewards.auroc([1, 1], [0, 1]) == 0.5
    assert math.isnan(rewards.auroc([1, 2], [1, 1]))


def test_command_line(tmp_path, capsys):
    scoring.main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in rewards.REGISTRY) and "random(p=0.5)" in listed
    assert all(
        entry.formula in listed and entry.source in listed for entry in rewards.REGISTRY.values()
    )

    def table(*argv):
        scoring.main([*argv, f"--completions={file}"])
        head, _, *lines = capsys.readouterr().out.splitlines()
        return head, {line[:22].strip(): line[22:].split() for line in lines}

    file = tmp_path / "some.jsonl"
    row = {"problem": "1 + 1?", "answer": "2", "completions": TEXTS, "correct": [True, False] * 2}
    file.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    head, rows = table("--reward=format & ~python")
    assert head == "8 completions, 0.5000 correct (their column)"
    # rewards 0 1 0 0 against marks 1 0 1 0: one of four agrees; 4 pairs, 2 ties
    assert rows == {"format & ~python": ["0.2500", "0.2500", "0.2500", "0.2500"]}

    del row["correct"]
    file.write_text(json.dumps(row))
    head, rows = table("--reward=ground_truth - format")
    assert head == "4 completions, 0.2500 correct (graded here)"
    assert rows == {"ground_truth - format": ["-0.2500", "0.0000", "-", "0.6667"]}
    head, rows = table()  # all that text alone decides; labels are not there
    assert rows["ground_truth"] == ["0.2500", "0.2500", "1.0000", "1.0000"]
    assert "majority(online)" in rows and "majority" not in rows and "logp" not in rows
    file.write_text(json.dumps(row | {"label": "3"}))
    assert table()[1]["incorrect"][0] == "0.2500"


@pytest.mark.parametrize(
    ("argv", "content", "says"),
    [
        (["--reward=format"], "", "add --completions"),
        (["--reward=majority", "--completions=FILE"], None, "needs majority labels"),
        (["--reward=self_certainty", "--completions=FILE"], None, "needs self_certainty"),
        (["--reward=format", "--completions=FILE"], "\n[1]\n", ":2: wants completions"),
        (["--reward=format", "--completions=FILE"], '{"problem": "x"}', ":1: wants completions"),
        (["--reward=format", "--completions=FILE"], "", "holds no completions"),
        (["--reward=format", "--completions=/nowhere"], "", "cannot be read"),
    ],
)
def test_command_line_errors(tmp_path, argv, content, says):
    file = tmp_path / "some.jsonl"
    good = json.dumps({"problem": "", "answer": "2", "completions": ["x"]})
    file.write_text(good if content is None else content)
    with pytest.raises(UserError, match=says):
        scoring.main([arg.replace("FILE", str(file)) for arg in argv])
