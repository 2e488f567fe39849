"""Rewards and their expressions, each against values worked out by hand."""

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

import rewards
from configurator import UserError

TEXTS = [r"Python: \boxed{2}", r"\boxed{3}", "import python", r"so \boxed{4/2} or \boxed{"]


def make(texts=TEXTS, answer="2", group_size=2, **fields) -> SimpleNamespace:
    rows = torch.arange(len(texts))
    given = dict(seed=1, step=1, self_certainty=None, mask=None) | fields
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


def test_self_certainty_is_the_mean_over_response_tokens():
    rollouts = make(
        self_certainty=torch.tensor([[1.0, 2, 6], [4, 2, 0], [5, 0, 0], [0, 0, 0]]),
        mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool(),
    )
    assert score("self_certainty", rollouts) == [3, 3, 5, 0]
    with pytest.raises(UserError, match="needs self_certainty"):
        score("0.1 * self_certainty")


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
        ("random(p=nan)", "p wants float"),
        ("random(-0.1)", "within"),
        ("random(q=1)", "no argument 'q'"),
        ("random(0.5, p=0.5)", "twice"),
        ("random(0.5, 1)", "2 arguments"),
        ("random('x')", "p wants float"),
        ("random(True)", "p wants float"),
        ("random(**p)", "no argument"),
        ("random(*p)", "p wants float"),
        ("format(1)", "takes none"),
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
    with pytest.raises(UserError, match="0 or 1, and met 2"):
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
    with pytest.raises(UserError, match="n wants int"):
        rewards.parse("holds(so, 1.5)")
    with pytest.raises(ValueError, match="two rewards"):
        rewards.reward(formula="", source="")(holds)


def test_a_reward_owes_one_finite_number_a_row(registry):
    @rewards.reward(formula="", source="")
    def short(rollouts):
        return torch.zeros(1)

    @rewards.reward(formula="", source="")
    def bad(rollouts):
        return torch.full((len(rollouts.text),), math.nan)

    for name in ("short", "bad"):
        with pytest.raises(ValueError, match="one finite number a row"):
            score(name)


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
    rewards.main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in rewards.REGISTRY) and "p: float = 0.5" in listed

    file = tmp_path / "some.jsonl"
    row = {"problem": "1 + 1?", "answer": "2", "completions": TEXTS, "correct": [True, False] * 2}
    file.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    rewards.main(["--reward=format & ~python", f"--completions={file}"])
    out = capsys.readouterr().out
    # rewards 0 1 0 0 against marks 1 0 1 0: one of four agrees; 4 pairs, 2 ties
    assert "8 completions" in out and "mean        0.2500" in out
    assert "agreement   0.2500" in out and "AUROC       0.2500" in out

    del row["correct"]
    file.write_text(json.dumps(row))
    rewards.main(["--reward=ground_truth - format", f"--completions={file}"])
    out = capsys.readouterr().out
    assert "correct     0.2500 (graded here)" in out and "agreement" not in out


@pytest.mark.parametrize(
    ("argv", "content", "says"),
    [
        (["--reward=format"], "", "add --completions"),
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
        rewards.main([arg.replace("FILE", str(file)) for arg in argv])
