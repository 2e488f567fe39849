"""The second model's scores, against transformers' own logits."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import Problem, Rollouts
from harness.errors import UserError
from harness.loading import load_tokenizer
from harness.second_model import SecondModel
from tasks import tiny

PROBLEMS = ["Start: 3 add 4?", "Start: 5 times 2 minus 1?"]
TEXTS = ["First, 3 plus 4 gives 7.", "\\boxed{7}", "In my head: 9", ""]


@pytest.fixture(scope="module")
def policy_tokenizer():
    return tiny.make_tokenizer()


def rollouts(tokenizer) -> Rollouts:
    """Two groups of two; the third response was cut off, the last is an end token alone."""
    finished = [True, True, False, True]
    prompts = [tokenizer(PROBLEMS[i // 2])["input_ids"] for i in range(4)]
    end = [tokenizer.eos_token_id]
    responses = [tokenizer(t)["input_ids"] + end * f for t, f in zip(TEXTS, finished, strict=True)]
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses, strict=True)]
    return Rollouts(
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_len=torch.tensor([*map(len, prompts)]),
        length=torch.tensor([*map(len, responses)]),
        text=TEXTS,
        problem=[Problem(PROBLEMS[i // 2], "7", str(i)) for i in range(4)],
        finished=torch.tensor(finished),
        group_size=2,
        seed=0,
        step=1,
    )


def by_hand(folder, prompts, responses) -> list[float]:
    """mean_t log q(y_t), one row at a time, in float64 from transformers' logits."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    means = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double()
        d = torch.distributions.Categorical(logits=logits[len(prompt) - 1 : -1])
        means.append(d.log_prob(torch.tensor(response)).mean().item())
    return means


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 1000])
def test_same_vocabulary_reads_the_sampled_tokens(
    tiny_random, policy_tokenizer, micro_batch_tokens
):
    r = rollouts(policy_tokenizer)
    second = SecondModel(tiny_random, policy_tokenizer, "none")
    assert second.same
    rows = [
        (t.tolist(), p, n)
        for t, p, n in zip(r.tokens, r.prompt_len.tolist(), r.length.tolist(), strict=True)
    ]
    want = by_hand(tiny_random, [t[:p] for t, p, _ in rows], [t[p : p + n] for t, p, n in rows])
    assert second.mean_logp(r, micro_batch_tokens).tolist() == pytest.approx(want, abs=1e-5)


def test_another_vocabulary_reads_the_text(shared, policy_tokenizer):
    """stories260K on the tiny world's responses: its own tokens, prompt and end token."""
    folder = str(shared / "models" / "stories260K")
    r = rollouts(policy_tokenizer)
    second = SecondModel(folder, policy_tokenizer, "none")
    assert not second.same
    own = AutoTokenizer.from_pretrained(folder)
    responses = [
        own(text, add_special_tokens=False)["input_ids"] + [own.eos_token_id] * finished
        for text, finished in zip(TEXTS, r.finished.tolist(), strict=True)
    ]
    assert responses[3] == [own.eos_token_id]
    want = by_hand(folder, [own(p.problem)["input_ids"] for p in r.problem], responses)
    assert second.mean_logp(r, 100).tolist() == pytest.approx(want, abs=1e-5)


def test_a_small_second_model_leaves_the_threads_alone(tiny_random, policy_tokenizer):
    try:
        torch.set_num_threads(2)
        SecondModel(tiny_random, policy_tokenizer, "none")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_texts_longer_than_its_positions_are_refused(
    tiny_random, policy_tokenizer, tmp_path, capsys
):
    shutil.copytree(tiny_random, tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    values = json.loads(config.read_text()) | {"max_position_embeddings": 24}
    config.write_text(json.dumps(values))
    second = SecondModel(str(tmp_path / "short"), policy_tokenizer, "none")
    r = rollouts(policy_tokenizer)
    second.check_budget(10, 14)
    with pytest.raises(UserError, match="25 exceeds .* 24 positions of .*short"):
        second.check_budget(10, 15)
    longest = int((r.prompt_len + r.length).max())
    second.positions = longest
    second.mean_logp(r, 100)
    second.positions = longest - 1
    with pytest.raises(UserError, match="short"):
        second.mean_logp(r, 100)
    second.same = False  # another vocabulary: the budget is in other tokens
    second.check_budget(10, longest)
    assert "warning: cross_model" in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_without_the_prompts_chat_template_is_refused(tiny_random, shared):
    with pytest.raises(UserError, match="no chat template"):
        SecondModel(
            tiny_random, load_tokenizer(str(shared / "tokenizers" / "qwen2.5")), "qwen_math"
        )
