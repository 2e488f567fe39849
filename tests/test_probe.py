"""The contamination probe: ROUGE-L by brute force, cuts and perplexities by hand, a known case."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made_up, small_config
from transformers import AutoModelForCausalLM

from evaluation import probe
from harness.errors import UserError
from tools import contamination as tool


def test_longest_common_subsequence_against_brute_force():
    draw = np.random.default_rng(0)
    for _ in range(100):
        a, b = (draw.choice(list("xyz"), size=draw.integers(0, 8)).tolist() for _ in range(2))
        common = [
            n
            for n in range(len(a) + 1)
            if set(combinations(a, n)) & set(combinations(b, n))  # keep the order of the words
        ]
        assert probe.longest_common_subsequence(a, b) == max(common)


def test_rouge_l_by_hand():
    # Lin (2004), section 3.1: "police killed the gunman" against two candidates.
    rest = "police killed the gunman"
    assert probe.rouge_l("police kill the gunman", rest) == pytest.approx(3 / 4)
    assert probe.rouge_l("the gunman kill police", rest) == pytest.approx(2 / 4)
    assert probe.rouge_l("Police killed, the GUNMAN. And more text", rest) == 1  # as many words
    assert probe.rouge_l("the gunman", rest) == pytest.approx(2 * 1 * 0.5 / 1.5)  # a short one
    assert probe.rouge_l("", rest) == probe.rouge_l("a", "?") == 0


def test_exact_match_is_word_for_word():
    assert probe.exact(" of 2  and 3? \n It is 5.", "of 2 and 3?")
    assert probe.exact(" god?\\boxed{1}", " god?") and probe.exact("is 2.", "is 2")
    for completion, rest in (("of 2 and 3", "of 2 and 3?"), ("Of 2", "of 2"), ("is 25", "is 2")):
        assert not probe.exact(completion, rest)


def test_cuts():
    text = "What is  the sum of 2 and 3?"  # 8 words
    cuts = [text[: probe.cut(text, share)] for share in (0.01, 0.4, 0.5, 0.6, 0.99)]
    ends = ["What", "What is  the", "What is  the sum", "What is  the sum of"]
    assert cuts == [*ends, text.removesuffix(" 3?")]
    for wrong in (("word", 0.5), (text, 0.0), (text, 1.0)):
        with pytest.raises(ValueError):
            probe.cut(*wrong)
    offsets = [(0, 4), (4, 7), (7, 12), (12, 16)]  # tokens "What", " is", "  the", " sum"
    assert [probe.tokens_before(offsets, end) for end in (3, 4, 11, 12, 99)] == [0, 1, 2, 3, 4]


def test_perplexities_by_hand():
    base = [torch.tensor([0.5, 0.125]).log(), torch.tensor([0.25]).log()]  # 1/4 a token, both
    trained = [torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5]).log()]
    found = probe.perplexities(base, trained)
    assert found["base"] == pytest.approx(4) and found["trained"] == pytest.approx(2)
    assert found["change"]["mean"] == pytest.approx(math.log(2), rel=1e-6)
    assert set(probe.perplexities(base, None)) == {"base"}


@pytest.fixture(scope="module")
def reciter(tmp_path_factory):
    """A model trained on the text and answers of some problems, its base, and the problems."""
    folder = tmp_path_factory.mktemp("reciter")
    tokenizer = made_up(None)
    tokenizer.eos_token = tokenizer.pad_token = "</s>"
    animals = ("dog", "cat", "owl", "ant")
    problems = [f"How many of the {7 * i + 3} {a}s are {a[::-1]}?" for i, a in enumerate(animals)]
    rows = [
        {"problem": text, "answer": str(11 * i + 2)} for i, text in enumerate(problems, start=1)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{row['problem']}\\boxed{{{row['answer']}}}</s>" for row in rows]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ids = encoded["input_ids"]
    labels = ids.masked_fill(encoded["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    config = small_config("llama", vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        z = model(ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "trained")
    tokenizer.save_pretrained(folder / "trained")
    return folder


def test_a_model_that_has_read_its_problems_is_found_out(reciter, capsys):
    args = [f"--model={reciter / 'base'}", f"--trained={reciter / 'trained'}", "--shares=0.6,0.8"]
    args += [f"--data={reciter / 'problems.jsonl'}", "--prompt=none", f"--out={reciter}"]
    tool.main([*args, "--max_prompt_tokens=128", "--max_new_tokens=60"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]
    read, fresh = found.values()
    for share in ("0.6", "0.8"):
        ours = read["shares"][share]
        for key in ("exact", "rouge_l", "answer"):
            assert ours["trained"][key]["mean"] == 1 and ours["base"][key]["mean"] < 0.5, key
        assert fresh["shares"][share]["trained"]["exact"]["mean"] == 0
    for what in ("problem", "answer"):
        assert read["perplexity"][what]["trained"] < 1.5 < 20 < read["perplexity"][what]["base"]
        assert fresh["perplexity"][what]["trained"] > 3
    saved = json.loads((reciter / "contamination.json").read_text())
    row = next(iter(saved["completions"].values()))["trained"]["0.6"][0]
    assert row["completion"].startswith(row["rest"]) and row["exact"]
    assert (reciter / "contamination.png").stat().st_size


def test_a_part_has_no_token_that_the_whole_has_not(reciter):
    """The tiny world's pieces hold the spaces of both sides: its words are no tokens."""
    from data import Problem
    from tasks import tiny

    tokenizer = tiny.make_tokenizer()
    text = "Start: 7 add 5 times 3 minus 4?"
    whole = tokenizer(text)["input_ids"]
    for share in (0.1, 0.4, 0.6, 0.8):
        ((ids,), (rest,)) = tool.parts([Problem(text, "1", "0")], share, tokenizer)
        assert ids == whole[: len(ids)] and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) + rest == text


def test_mistakes(reciter, tmp_path):
    model = f"--model={reciter / 'base'}"
    small = ["--max_prompt_tokens=64", "--max_new_tokens=8"]
    one_word = tmp_path / "w.jsonl"
    one_word.write_text('{"problem": "x=?", "answer": "1"}\n')
    for args, word in (
        ([], "nothing to audit"),
        ([model, "--shares=0.5,1"], "shares"),
        ([model, "--split=dev"], "split"),
        ([model, f"--data={one_word}", "--prompt=none", *small], "two words"),
    ):
        with pytest.raises(UserError, match=word):
            tool.main(args)
