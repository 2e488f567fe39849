"""model.py against transformers, PEFT and float64 distributions."""

import numpy as np
import pytest
import torch
from conftest import batch, made_up
from scipy.stats import entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import grpo
import model as model_module
from decoding import slots
from decoding.kvcache import EXPANDED_ATTENTION
from engine import TRAIN_NOISE, generate
from harness import output_layer
from harness.adapters import load_adapter, save_adapter
from harness.errors import UserError
from harness.loading import load_model, load_tokenizer
from harness.output_layer import logits
from lora import adapter_off, add_lora, lora_layers, trainable
from model import checkpoint_activations, end_token_ids, token_stats, turn_end_ids

FAMILIES = ("qwen2", "llama", "olmo2")
QUANTS = [
    ("none", torch.float32),
    ("none", torch.bfloat16),
    ("nf4", torch.float32),
    ("nf4", torch.bfloat16),
]


def with_adapter(folder, quant="none", dtype=torch.float32, r=4):
    """A model whose adapter does something (B is not zero)."""
    model = load_model(folder, quant, dtype)
    add_lora(model, r, 8, seed=1)
    g = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.3, generator=g)
    return model


# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stats_equal_float64_distributions_of_transformers_logits(
    model_folders, family, temperature
):
    """Every token, first and last included; read one position earlier than it stands."""
    model = load_model(model_folders[family])
    tokens, prompt_len, length = batch(0)
    stats = token_stats(model, tokens, prompt_len, length, temperature)
    plain = AutoModelForCausalLM.from_pretrained(model_folders[family])
    for i in range(len(tokens)):
        p, n = int(prompt_len[i]), int(length[i])
        with torch.no_grad():
            logits = plain(tokens[i : i + 1, : p + n]).logits[0].double() / temperature
        d = torch.distributions.Categorical(logits=logits[p - 1 : p + n - 1])
        uniform = torch.full((97,), 1 / 97, dtype=torch.float64)
        kl = (uniform * (uniform.log() - d.logits)).sum(-1)
        for ours, exact in (
            (stats.logp, d.log_prob(tokens[i, p : p + n])),
            (stats.entropy, d.entropy()),
            (stats.self_certainty, kl),
        ):
            assert torch.allclose(ours[i, :n].double(), exact, rtol=1e-5, atol=1e-5)
            assert (ours[i, n:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_alignment_is_the_inner_product_of_two_gradients(model_folders, temperature):
    """Of log p(y) and log p(likeliest) on the logits over the temperature, by autograd."""
    model = load_model(model_folders["llama"])
    tokens, prompt_len, length = batch(0)
    got = token_stats(model, tokens, prompt_len, length, temperature, ("alignment",))
    assert got.entropy is None and got.self_certainty is None
    for i in range(len(tokens)):
        p, n = int(prompt_len[i]), int(length[i])
        with torch.no_grad():
            logits = model(tokens[i : i + 1, : p + n]).logits[0, p - 1 : p + n - 1].double()
        z = (logits / temperature).requires_grad_()
        log_p = z.log_softmax(-1)
        y = tokens[i, p : p + n]
        (to_y,) = torch.autograd.grad(log_p[range(n), y].sum(), z, retain_graph=True)
        (to_top,) = torch.autograd.grad(log_p.amax(-1).sum(), z)
        exact = (to_y * to_top).sum(-1)
        assert torch.allclose(got.alignment[i, :n].double(), exact, rtol=1e-5, atol=1e-5)
        assert (got.alignment[i, n:] == 0).all()
    assert got.alignment.abs().max() > 0.01


@pytest.fixture(scope="module")
def stories(shared):
    """stories260K with an adapter that does something, and two of its texts from first to last
    token, end token included, padded with that very token: (model, tokens, prompt_len, length)."""
    folder = str(shared / "models" / "stories260K")
    tokenizer = load_tokenizer(folder)
    texts = ("Once upon a time, there was a little dog named Tim.", "So 3 + 4 is \\boxed{7}.")
    rows = [torch.tensor(tokenizer(text)["input_ids"] + [2]) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
    model = load_model(folder)
    add_lora(model, 4, 8)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01, generator=generator)
    return model, tokens, torch.ones(2, dtype=torch.int64), torch.tensor([len(r) - 1 for r in rows])


def in_float64(model, tokens, length, temperature):
    """(logp, distributions) of each row's response tokens, from transformers' logits."""
    with torch.no_grad():
        logits = model(tokens).logits.double() / temperature
    for row, n in enumerate(length.tolist()):
        d = torch.distributions.Categorical(logits=logits[row, :n])
        yield d.log_prob(tokens[row, 1 : n + 1]), d


def close(a, b) -> bool:
    """Within 1e-5 (1 + |x|)."""
    return bool(((a.double() - b).abs() <= 1e-5 * (1 + b.abs())).all())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_real_model_at_every_token(stories, temperature):
    model, tokens, prompt_len, length = stories
    stats = token_stats(model, tokens, prompt_len, length, temperature)
    vocab = model.config.vocab_size
    uniform = torch.distributions.Categorical(logits=torch.zeros(vocab).double())
    for row, (logp, d) in enumerate(in_float64(model, tokens, length, temperature)):
        n = len(logp)
        assert tokens[row, n] == 2 and n == length[row]  # the end token is the last one scored
        assert close(stats.logp[row, :n], logp) and close(stats.entropy[row, :n], d.entropy())
        certainty = torch.distributions.kl_divergence(uniform, d)
        assert close(stats.self_certainty[row, :n], certainty)
        by_scipy = entropy(np.full(vocab, 1 / vocab), d.probs[0].numpy())
        assert stats.self_certainty[row, 0].item() == pytest.approx(by_scipy, rel=1e-5)
        assert stats.logp[row, n:].abs().sum() == 0


def test_real_text_is_likely_which_a_shift_by_one_would_spoil(stories):
    model, tokens, prompt_len, length = stories
    with adapter_off(model):
        assert token_stats(model, tokens, prompt_len, length).logp[0, : length[0]].mean() > -3


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_to_the_base_at_every_token(stories, kind):
    model, tokens, prompt_len, length = stories
    policy = token_stats(model, tokens, prompt_len, length).logp
    with adapter_off(model):
        base = token_stats(model, tokens, prompt_len, length).logp
        exact_base = [logp for logp, _ in in_float64(model, tokens, length, 1.0)]
    exact = [logp for logp, _ in in_float64(model, tokens, length, 1.0)]
    got = grpo.kl(policy, base, kind)
    for row, (p, q) in enumerate(zip(exact, exact_base, strict=True)):
        d = q - p
        want = {"k1": -d, "k2": d**2 / 2, "k3": torch.expm1(d) - d}[kind]
        assert d.abs().max() > 0.1 and close(got[row, : len(d)], want)


def test_chunk_size_changes_nothing_on_a_real_model(stories):
    results = [token_stats(*stories, chunk=chunk) for chunk in (1, 7, 10_000)]
    for name in ("logp", "entropy", "self_certainty"):
        first, *others = (getattr(stats, name).double() for stats in results)
        # One row alone takes another kernel than several do, and an fp32 logit between 16 and 32
        # stands on a grid of 1.9e-6.
        for other in others:
            assert ((first - other).abs() <= 2e-6 * (1 + first.abs())).all()


def test_chunk_changes_nothing_forward_or_backward(model_folders):
    model = with_adapter(model_folders["qwen2"])
    args = batch(1)
    results = []
    for chunk in (1, 5, 10_000):
        model.zero_grad()
        stats = token_stats(model, *args, chunk=chunk)
        (stats.logp * torch.arange(1, stats.logp.shape[1] + 1)).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in trainable(model).values()])
        results.append((stats.logp.detach(), stats.entropy, stats.self_certainty, grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("frozen", [True, False])
def test_no_more_than_a_chunk_of_logits_is_held(model_folders, frozen):
    """The largest tensor the head makes. A trained head makes each chunk again in backward."""
    model = with_adapter(model_folders["llama"])
    model.lm_head.weight.requires_grad_(not frozen)
    sizes = []
    model.lm_head.register_forward_hook(lambda m, i, out: sizes.append(out.shape[0]))
    tokens, prompt_len, length = batch(2, n=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logp = token_stats(model, tokens, prompt_len, length, chunk=7, also=()).logp
    forward = len(sizes)
    logp.sum().backward()
    assert max(sizes) == 7 and sum(sizes[:forward]) == length.sum()
    assert len(sizes) == (forward if frozen else 2 * forward)  # no padding was multiplied
    assert not [t for t in kept if t.shape[-1] == 97 and t is not model.lm_head.weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [(), ("weight",), ("weight", "bias")])
def test_gradient_of_logp_is_that_of_float64(dtype, temperature, trained):
    """On the hidden states, also of a token with probability near 1; on a trained head, too."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 97, bias="bias" in trained, dtype=dtype).requires_grad_(False)
    h = (2 * torch.randn(11, 64, generator=generator)).to(dtype)
    y = torch.randint(97, (11,), generator=generator)
    layer.weight.data = torch.randn(97, 64, generator=generator).to(dtype)
    others = (h[0] @ layer.weight.t()).float().amax()
    layer.weight.data[y[0]] = (h[0] * (others + 9) / h[0].float().square().sum()).to(dtype)
    for name in trained:
        getattr(layer, name).requires_grad_()
    ours = {"h": h.clone().requires_grad_()}
    ours |= {name: getattr(layer, name) for name in trained}
    exact = {k: v.detach().double().requires_grad_() for k, v in ours.items()}
    weight = exact.get("weight", layer.weight.double())
    z = exact["h"] @ weight.t() + exact.get("bias", 0)
    want = (z / temperature).log_softmax(-1)[range(11), y]
    assert 0.99 < want[0].exp() < 1 - 1e-6
    stats = model_module._Chunk.apply(
        ours["h"], y, layer, temperature, ("entropy", "alignment"), *layer.parameters()
    )
    assert torch.allclose(stats[0].double(), want, atol=2e-5)
    assert not stats[1].requires_grad and stats[2] is None
    upstream = torch.randn(11, generator=generator)
    stats[0].backward(upstream)
    want.backward(upstream.double())
    for name, tensor in ours.items():
        got, exactly = tensor.grad.double(), exact[name].grad
        # Rounding is relative to the terms of a sum; 1 - p_y is known to 1e-7.
        largest = exactly.abs().amax(-1, keepdim=True) if name == "h" else exactly.abs().amax()
        bound = (2**-7 if dtype == torch.bfloat16 else 1e-5) * largest + 1e-6
        assert ((got - exactly).abs() <= bound).all()


@pytest.mark.parametrize("quant,dtype", QUANTS)
def test_scoring_and_update_give_the_same_bits(model_folders, quant, dtype):
    """With and without gradients, checkpointing, full statistics: else a first ratio is not 1."""
    model = with_adapter(model_folders["qwen2"], quant, dtype)
    args = batch(3, n=6)
    with torch.no_grad():
        scored = token_stats(model, *args).logp
    plain = token_stats(model, *args, also=()).logp
    aligned = token_stats(model, *args, also=("alignment",))
    assert torch.equal(aligned.logp, plain) and not aligned.alignment.requires_grad
    checkpoint_activations(model)
    checkpointed = token_stats(model, *args, also=()).logp
    assert torch.equal(scored, plain) and torch.equal(scored, checkpointed)
    checkpointed.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(model).values())


def test_gradient_checkpointing_changes_no_gradient(model_folders):
    grads = []
    for on in (False, True):
        model = with_adapter(model_folders["olmo2"])
        if on:
            checkpoint_activations(model)
        token_stats(model, *batch(4), also=()).logp.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in trainable(model).values()]))
    assert torch.equal(*grads)


# ------------------------------------------------------------------------------ logits in float32


@pytest.mark.parametrize("kind", ["plain", "bias", "tied"])
def test_bf16_logits_and_their_gradients_are_those_of_float64(kind, monkeypatch):
    """Of the very bf16 numbers: rounded once where a gradient is bf16 itself, not before."""
    monkeypatch.setattr(output_layer, "HEAD_ROWS", 30)  # several blocks, the last one smaller
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(97, 64, generator=generator).bfloat16()
    h = (4 * torch.randn(11, 64, generator=generator)).bfloat16()
    layer = torch.nn.Linear(64, 97, bias=kind == "bias", dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(weight)
    if kind == "tied":
        embedding = torch.nn.Embedding(97, 64, dtype=torch.bfloat16)
        embedding.weight = layer.weight
        h = embedding(torch.arange(11))
    else:
        h.requires_grad_()
    z = logits(layer, h)
    exact_w = weight.double().requires_grad_()
    exact_h = exact_w[:11] if kind == "tied" else h.detach().double().requires_grad_()
    exact = exact_h @ exact_w.t()
    if kind == "bias":
        exact_b = layer.bias.detach().double().requires_grad_()
        exact = exact + exact_b
    assert z.dtype == torch.float32 and z.abs().max() > 16
    assert ((z - exact).abs() <= 1e-6 * exact.abs().max()).all()
    rounded = (h @ layer.weight.t()).float()
    assert (rounded - exact).abs().max() > 0.03  # the fault is real
    upstream = torch.randn(11, 97, generator=generator)
    z.backward(upstream)
    exact.backward(upstream.double())
    pairs = [(layer.weight.grad, exact_w.grad)]
    pairs += [(h.grad, exact_h.grad)] if kind != "tied" else []
    pairs += [(layer.bias.grad, exact_b.grad)] if kind == "bias" else []
    for ours, want in pairs:
        # one rounding; where the embedding's gradient is added to the head's, three
        bound = 2**-8 * (want.abs() if kind != "tied" else 3 * want.abs().max())
        assert ((ours - want).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_scores_sampler_and_update_share_float32_logits(model_folders, family):
    """logp of each token against float64 from the same bf16 hidden states; the sampler's too."""
    model = load_model(model_folders[family], dtype=torch.bfloat16)
    add_lora(model, 4, 8)
    prompts = [[5, 6, 7], [8, 9]]
    g = generate(model, prompts, 4, 12, [3], (TRAIN_NOISE, 0, 0))
    scored = token_stats(model, g.tokens, g.prompt_len, g.length, also=()).logp
    assert scored.requires_grad  # as in the update
    T = int((g.prompt_len + g.length).max())
    hidden = model.model(g.tokens[:, :T], use_cache=False).last_hidden_state
    exact = (hidden.double() @ model.lm_head.weight.double().t()).log_softmax(-1)
    for i, (p, n) in enumerate(zip(g.prompt_len.tolist(), g.length.tolist(), strict=True)):
        want = exact[i, range(p - 1, p + n - 1), g.tokens[i, p : p + n]]
        assert torch.allclose(scored[i, :n].double(), want, atol=2e-5)
    # Prefill and decoding steps: every log-probability is a difference of fp32 numbers, and those
    # that came from bf16 logits would all stand on a grid.
    first = [
        logits(model.lm_head, hidden[i, p - 1][None])[0].log_softmax(-1)
        for i, p in enumerate(g.prompt_len.tolist())
    ]
    chosen = [z[g.tokens[i, p]] for i, (z, p) in enumerate(zip(first, g.prompt_len, strict=True))]
    assert torch.allclose(torch.stack(chosen), g.sampler_logp[:, 0], atol=0.02)
    for part in ("prefill", "step"):
        seen = logits_of_sampler(model, prompts, part)
        assert seen.dtype == torch.float32 and (seen != seen.bfloat16()).float().mean() > 0.9


def logits_of_sampler(model, prompts, part):
    """The logits from which generate samples first tokens (prefill) or later ones (step)."""
    seen, step = {"prefill": [], "step": []}, slots.Rows.step

    def spy(rows, row, z):
        seen["prefill" if int(rows.length[row].max()) == 0 else "step"].append(z.clone())
        return step(rows, row, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots.Rows, "step", spy)
        generate(model, prompts, 1, 4, [3], (TRAIN_NOISE, 0, 0))
    return torch.cat(seen[part])


# ------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_on_every_linear_layer_but_the_head_and_alone_has_gradients(model_folders, family):
    model = load_model(model_folders[family])
    before = token_stats(model, *batch(5)).logp
    add_lora(model, 4, 8)
    assert {n.rpartition(".")[2] for n in lora_layers(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert len(lora_layers(model)) == 2 * 7
    assert all(n.endswith(("lora_A", "lora_B")) for n in trainable(model))
    assert torch.equal(before, token_stats(model, *batch(5)).logp)  # B = 0: the identity


def test_adapter_off_is_the_base_model(model_folders):
    base = token_stats(load_model(model_folders["llama"]), *batch(6)).logp
    model = with_adapter(model_folders["llama"])
    with adapter_off(model):
        assert torch.equal(token_stats(model, *batch(6)).logp, base)
    assert (token_stats(model, *batch(6)).logp - base).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_adapter_and_we_load_its(model_folders, family, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_adapter(model_folders[family])
    save_adapter(model, tmp_path / "ours", model_folders[family])
    theirs = AutoModelForCausalLM.from_pretrained(model_folders[family])
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    tokens = batch(7)[0]
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.allclose(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(model_folders[family])
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_lora_gradients_are_pefts(model_folders, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_adapter(model_folders["qwen2"])
    save_adapter(model, tmp_path, "base")
    plain = AutoModelForCausalLM.from_pretrained(model_folders["qwen2"])
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    tokens = batch(8)[0]
    for m in (model, theirs):
        m(tokens).logits.log_softmax(-1)[..., 5].sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, p in trainable(model).items():
        layer, _, part = name.rpartition(".")
        grad = expected[f"base_model.model.{layer}.{part}.default.weight"]
        assert torch.allclose(p.grad, grad, rtol=1e-3, atol=1e-4)


def test_nf4_is_close_to_the_plain_model_and_quantises_all_but_the_head(model_folders):
    plain = token_stats(load_model(model_folders["qwen2"]), *batch(9)).logp
    model = load_model(model_folders["qwen2"], "nf4")
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {"Linear4bit"} and type(model.lm_head).__name__ == "Linear"
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested  # double quantisation
    gap = (token_stats(model, *batch(9)).logp - plain).abs().mean()
    assert 0 < gap < 0.5 * plain.std()


# ------------------------------------------------------------------------------------ end tokens


def turns(turn: str) -> str:
    """A chat template that writes every message like this."""
    return "{% for m in messages %}" + turn + "{% endfor %}"


CHATML = turns("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        (turns("<|head|>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"), ["<end_of_turn>"]),
        (turns("<|head|>{{ m.role }}\n\n{{ m.content }}<|eot_id|>"), ["<|eot_id|>"]),
        (turns("{{ m.content }}<|eot_id|> <|stop|>\n"), ["<|eot_id|>", "<|stop|>"]),
        # closed only before another turn: not by the token that opens that one
        (turns("{{ m.content }}{% if not loop.last %}<|stop|><|head|>{% endif %}"), ["<|stop|>"]),
        (turns("{{ m.role }}: {{ m.content }}\n"), []),
        ("{{ raise_exception('only one turn') }}", []),
        (None, []),
    ],
)
def test_a_response_ends_at_what_the_template_puts_behind_a_turn(model_folders, template, ends):
    names = ("<|im_start|>", "<|im_end|>", "<|head|>", "<end_of_turn>", "<|eot_id|>", "<|stop|>")
    tokenizer = made_up(template, *names)
    tokenizer.eos_token = "</s>"
    assert turn_end_ids(tokenizer) == tokenizer.convert_tokens_to_ids(ends)
    model = load_model(model_folders["llama"])  # whose own end token is 3
    model.generation_config.eos_token_id = [3, 90]
    expected = {3, 90, *tokenizer.convert_tokens_to_ids([*ends, "</s>"])}
    assert set(end_token_ids(model, tokenizer)) == expected


@pytest.mark.slow
def test_turn_ends_of_real_tokenizers(shared, model_folders):
    qwen = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5")
    assert qwen.convert_ids_to_tokens(turn_end_ids(qwen)) == ["<|im_end|>"]
    olmo = PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "tokenizers" / "olmo2" / "tokenizer.json")
    )
    assert turn_end_ids(olmo) == []  # no chat template
    assert end_token_ids(load_model(model_folders["olmo2"]), olmo) == [3]  # the model's own
    olmo.chat_template = CHATML
    assert olmo.convert_ids_to_tokens(turn_end_ids(olmo)) == ["<|im_end|>"]


def test_no_end_token_at_all_is_refused(model_folders):
    model = load_model(model_folders["llama"])
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(UserError, match="end token"):
        end_token_ids(model, made_up(None))


@pytest.mark.slow
def test_qwen_ends_at_both_tokens(shared, model_folders):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5")
    model = load_model(model_folders["llama"])
    model.generation_config.eos_token_id = [3, 151643]
    ids = end_token_ids(model, tokenizer)
    names = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert set(names) <= set(ids) and 3 in ids


# --------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(model_folders, tmp_path):
    def message(f, *args):
        with pytest.raises(UserError) as error:
            f(*args)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder" in message(load_model, "no/such-model")
    assert "no such folder" in message(load_tokenizer, "no/such-model")
    (tmp_path / "empty").mkdir()
    assert "config.json" in message(load_model, str(tmp_path / "empty"))
    model = load_model(model_folders["llama"])
    assert "no adapter here" in message(load_adapter, model, tmp_path)
    save_adapter(with_adapter(model_folders["llama"], r=4), tmp_path / "a", "base")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"cut off")
    assert "cannot be read" in message(load_adapter, model, tmp_path / "a")


def test_architectures_we_would_get_wrong_are_refused(tmp_path):
    from transformers import GraniteConfig, MistralConfig

    small = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    scaled = GraniteConfig(**small, logits_scaling=8.0)
    AutoModelForCausalLM.from_config(scaled).save_pretrained(tmp_path / "scaled")
    with pytest.raises(UserError, match="not a linear map"):
        load_model(str(tmp_path / "scaled"))
    sliding = MistralConfig(**small, sliding_window=8)
    AutoModelForCausalLM.from_config(sliding).save_pretrained(tmp_path / "sliding")
    with pytest.raises(UserError, match="not all full attention"):
        load_model(str(tmp_path / "sliding"))


@pytest.mark.parametrize("family", ["qwen2", "llama", "olmo2"])
def test_expanded_attention_is_the_attention(model_folders, family):
    """In fp32 on CUDA keys and values are repeated, since no fused kernel takes grouped heads."""
    model = load_model(model_folders[family])
    tokens, prompt_len, length = batch(5)
    want = token_stats(model, tokens, prompt_len, length, also=()).logp
    model.config._attn_implementation = EXPANDED_ATTENTION
    got = token_stats(model, tokens, prompt_len, length, also=()).logp
    assert torch.allclose(got, want, atol=1e-5) and not torch.equal(got, torch.zeros_like(got))
