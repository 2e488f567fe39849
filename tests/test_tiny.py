"""The tiny world: its arithmetic, its text, its tokenizer, its folder."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import grading
from grading import last_boxed
from tasks import labels, tiny
from tasks.datasets import load_problems


def cases(n=200, hard=None):
    rng = np.random.default_rng(0)
    return [(*tiny.make_problem(rng, hard), rng) for _ in range(n)]


def test_answers_are_right():
    for text, chain, _ in cases():
        expression = str(chain[0])
        for word, sign in (("add", "+"), ("minus", "-"), ("times", "*")):
            text = text.replace(word, sign)
        expression, *_ = text.removeprefix("Start: ").rstrip("?").split(" ", 1)
        for op, operand in zip(*[iter(text.rstrip("?").split()[2:])] * 2, strict=True):
            expression = f"(({expression}) {op} {operand})"
        assert tiny.running_values(chain)[-1] == eval(expression) % 10


def test_every_text_is_tokenised_and_comes_back():
    tokenizer = tiny.make_tokenizer()
    for text, chain, rng in cases(60):
        for code in (True, False):
            for working in (True, False):
                whole = text + tiny.make_response(chain, code, working, rng)
                ids = tokenizer(whole)["input_ids"]
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == whole


def test_habits_are_what_the_docstring_says():
    """Boxed share, the answer of both habits, and hard problems whose majority is wrong."""
    for hard, right in ((False, 1.0), (True, None)):
        boxed, good = [], []
        for _, chain, rng in cases(2000, hard):
            text = tiny.make_response(chain, True, True, rng)
            assert "python" in text
            boxed.append(last_boxed(text) is not None)
            answer = text.rstrip("}.")[-1]
            good.append(answer == str(tiny.running_values(chain)[-1]))
        assert np.mean(boxed) == pytest.approx(tiny.BOXED_SHARE, abs=0.03)
        if hard:
            slip_right = 1 - tiny.SLIP_SHARE * 0.93  # a dropped operation rarely changes nothing
            assert np.mean(good) == pytest.approx(slip_right, abs=0.06)
        else:
            assert np.mean(good) == right
    text, chain, rng = cases(1)[0]
    assert "python" not in tiny.make_response(chain, False, True, rng)
    bad_code = tiny.make_response(chain, True, False, rng)
    assert "python" in bad_code and "%" not in bad_code  # no working in it


def test_folder_is_an_ordinary_one(tiny_random):
    tokenizer = AutoTokenizer.from_pretrained(tiny_random)
    text = cases(1)[0][0]
    assert tokenizer(text)["input_ids"] == tiny.make_tokenizer()(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_random)
    assert 0.05e6 < model.num_parameters() < 0.3e6
    sets = {
        sub: {p.problem for p in load_problems(tiny_random + sub, split)}
        for sub, split in (("", "train"), ("/hard", "test"))
    }
    test = load_problems(tiny_random, "test")
    assert len(test) == tiny.N_TEST and not sets[""] & {p.problem for p in test}
    assert not sets[""] & sets["/hard"]
    assert (
        min(int(p.level) for p in load_problems(tiny_random + "/hard", "test")) >= tiny.HARD_OPS[0]
    )


def test_names(tmp_path):
    assert tiny.resolve("some/model") == "some/model"
    assert tiny.is_tiny("tiny_bad_hard") and not tiny.is_tiny("tinyllama")
    folder = tiny.resolve("tiny_bad", tmp_path, steps=1)
    assert tiny.resolve("tiny_bad_hard", tmp_path, steps=1) == folder + "/hard"
    assert tiny.resolve("tiny", tmp_path, steps=1) != folder


def test_labelled_names(tmp_path, monkeypatch):
    """Majority labels on demand, whole or not at all, kept, with the test problems beside them."""
    for name, size in (("N_TRAIN", 32), ("N_TEST", 8), ("N_LABELS", 6), ("LABEL_SAMPLES", 3)):
        monkeypatch.setattr(tiny, name, size)
    # an untrained model boxes next to nothing
    monkeypatch.setattr(grading, "last_boxed", lambda text: str(len(text) % 2) if text else None)
    assert all(tiny.is_tiny(f"{name}_labels") for name in ("tiny", "tiny_bad", "tiny_bad_hard"))
    assert not tiny.is_tiny("tiny_labels_hard") and not tiny.is_tiny("_labels")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(labels, "render", interrupt)
        tiny.resolve("tiny_labels", tmp_path, steps=1)
    world = tiny.resolve("tiny", tmp_path, steps=1)
    assert not list(tmp_path.glob("*/*labels*"))
    for name, data in (("tiny_labels", world), ("tiny_hard_labels", world + "/hard")):
        folder = tiny.resolve(name, tmp_path, steps=1)
        assert folder == data + "/labels"
        made = load_problems(folder, "train")
        whole = {p.problem: p for p in load_problems(data, "train")[:6]}
        assert 3 <= len(made) <= 6 and all(p.label in "01" for p in made)
        assert all(p.answer == whole[p.problem].answer for p in made)
        assert load_problems(folder, "test") == load_problems(data, "test")
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "build_labels", None)  # made once
        assert tiny.resolve("tiny_hard_labels", tmp_path, steps=1) == folder
    other = tiny.resolve("tiny_labels", tmp_path, seed=1, steps=1)
    assert other != world + "/labels" and load_problems(other, "train") != made


def interrupt(*args):
    raise KeyboardInterrupt
