"""tools.noise: its table, and its parts checked by hand."""

import json

import pytest
import torch
from conftest import batch

from harness.errors import UserError
from harness.loading import load_model
from lora import add_lora, trainable
from model import logits, token_stats
from tools import noise


@pytest.fixture(scope="module")
def world(tiny_random):
    """Runs of the tool on an untrained tiny world: dtype -> (rows by name and logits, printed)."""
    done = {}

    def run(dtype, capsys):
        if dtype not in done:
            options = ["--max_new_tokens=12", "--device=cpu", "--lora_r=4"]
            noise.main([f"--model={tiny_random}", f"--dtype={dtype}", *options])
            printed = capsys.readouterr().out
            rows = json.loads(printed.splitlines()[-1])["rows"]
            done[dtype] = ({(r["what"], r.get("lr"), r["logits"]): r for r in rows}, printed)
        return done[dtype]

    return run


def test_the_table_has_each_comparison_with_both_kinds_of_logits(world, capsys):
    rows, printed = world("bfloat16", capsys)
    compared = [("shape", None), ("update", 1e-7), ("update", 1e-6)]
    assert set(rows) == {(*one, kind) for kind in ("fp32", "bf16") for one in compared}
    assert all(0 <= row["outside"] <= 1 and row["sd"] <= row["largest"] for row in rows.values())
    assert "outside [0.8, 1.2]" in printed and "update 1e-07" in printed


def test_inside_bf16_logits_scores_are_made_of_rounded_logits(model_folders):
    model = load_model(model_folders["llama"], dtype=torch.bfloat16)
    args = batch(0)
    with torch.no_grad(), noise.bf16_logits():
        rounded = token_stats(model, *args).logp
    with torch.no_grad():
        plain = token_stats(model, *args).logp
        tokens, prompt_len, length = args
        hidden = model.model(tokens, use_cache=False).last_hidden_state
    for i, (p, n) in enumerate(zip(prompt_len.tolist(), length.tolist(), strict=True)):
        z = logits(model.lm_head, hidden[i, p - 1 : p + n - 1])
        for got, of in ((rounded, z.bfloat16().float()), (plain, z)):
            want = of.log_softmax(-1)[range(n), tokens[i, p : p + n]]
            assert torch.allclose(got[i, :n], want, atol=1e-5)
    assert (rounded - plain).abs().max() > 1e-3


def test_fp32_shows_that_the_update_itself_is_far_smaller(world, capsys):
    rows, _ = world("float32", capsys)
    for what, lr in (("shape", None), ("update", 1e-7), ("update", 1e-6)):
        row = rows[what, lr, "fp32"]
        assert row["sd"] < 1e-4 and row["outside"] == 0


def test_weights_are_moved_by_lr_and_put_back_to_the_bit(tiny_random):
    model = load_model(tiny_random)
    add_lora(model, 4, 8)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    direction = {name: torch.ones_like(p) for name, p in before.items()}
    with noise.moved(model, direction, 1e-3):
        assert all(torch.equal(p, before[k] - 1e-3) for k, p in trainable(model).items())
    assert all(torch.equal(p, before[k]) for k, p in trainable(model).items())


@pytest.mark.parametrize(
    "argv", [["--group=0"], ["--temperature=0"], ["--prompt=chat"], ["--lora_r=0"], ["--seed=-1"]]
)
def test_mistakes_are_one_line(argv):
    with pytest.raises(UserError, match=argv[0].strip("-").partition("=")[0]) as error:
        noise.main(argv)
    assert "\n" not in str(error.value)
