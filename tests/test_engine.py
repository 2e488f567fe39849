"""engine.py against transformers' generate, and the sampler against the policy's distribution."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

import engine
from decoding.sampling import sample, uniforms
from decoding.slots import DecodeSetup, capture
from engine import TRAIN_NOISE, generate
from harness.errors import UserError
from harness.loading import choose_device, load_model, load_tokenizer
from lora import adapter_off, add_lora, lora_layers, merged, trainable
from model import checkpoint_activations, token_stats

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20], [30, 31, 32, 33]]
NOISE = (TRAIN_NOISE, 0, 1)


class Traced:
    """What a CUDA graph is, on the CPU: the operators of a step and the tensors that they work on,
    nothing of Python between them; only what they write in place has an effect."""

    captured = replayed = 0

    def __init__(self, step, pool):
        it = step.__self__
        written = [it.row, it.token, it.over, it.done, *it.cache.keys, *it.cache.values]
        written += [x for x in vars(it.rows).values() if torch.is_tensor(x)]
        before = [x.clone() for x in written]
        self.operators = make_fx(lambda _: step())(torch.zeros(1))
        for tensor, value in zip(written, before, strict=True):  # nothing runs in a capture
            tensor.copy_(value)
        Traced.captured += 1

    def replay(self):
        self.operators(torch.zeros(1))
        Traced.replayed += 1


SETUPS = {
    "growing": DecodeSetup(static=False),  # as on the CPU
    "static": DecodeSetup(static=True, bucket=16),  # as on a GPU
    "graph": DecodeSetup(static=True, bucket=64, capture=Traced),  # and with captured steps
}


@pytest.fixture(params=SETUPS)
def mode(request):
    """The name of a way to decode; `set_up(model, mode)` makes a model decode that way."""
    Traced.captured = Traced.replayed = 0
    return request.param


def set_up(model, mode):
    model.decode_setup = replace(SETUPS[mode])
    return model


def reference_greedy(model, prompt, n, end):
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def responses(g):
    rows = zip(g.tokens.tolist(), g.prompt_len.tolist(), g.length.tolist(), strict=True)
    return [row[p : p + n] for row, p, n in rows]


@pytest.mark.parametrize("family", ["qwen2", "llama", "olmo2"])
def test_greedy_equals_generate(model_folders, family, mode):
    """Token for token in fp32, prompts of different lengths, end tokens that really end some."""
    model = set_up(load_model(model_folders[family]), mode)
    plain = AutoModelForCausalLM.from_pretrained(model_folders[family])
    free = [reference_greedy(plain, p, 150, None) for p in PROMPTS]
    end = [free[0][3], free[1][40]]  # so rows end early, at different steps, and at two tokens
    expected = [reference_greedy(plain, p, 150, end) for p in PROMPTS]
    assert len({len(e) for e in expected}) > 1
    g = generate(model, PROMPTS, 1, 150, end, NOISE, temperature=0)  # past one growth of the cache
    assert responses(g) == expected
    assert g.finished.tolist() == [e[-1] in end for e in expected]


@pytest.mark.parametrize("n", [1, 3, 4])
def test_greedy_equals_generate_through_few_slots(model_folders, n, mode):
    """Rows move in as others end, the longest prompt among the last; the cache drops old columns
    and grows on the way, or is read by buckets."""
    if mode == "graph" and n != 3:
        pytest.skip("a capture costs a second here: one number of slots will do")
    prompts = [*PROMPTS[1:], [40, 41], PROMPTS[0], [50] * 30, [60, 61, 62]]
    model = set_up(load_model(model_folders["llama"]), mode)
    plain = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    budgets = [150, 3, 40, 90, 1, 150, 20]
    expected = [reference_greedy(plain, p, n, None) for p, n in zip(prompts, budgets, strict=True)]
    g = generate(model, prompts, 1, 150, [-1], NOISE, temperature=0, max_rows=n, budgets=budgets)
    assert responses(g) == expected and g.length.tolist() == budgets
    assert not g.finished.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_in_bf16_or_merged_is_right_up_to_rounding(model_folders, dtype, mode):
    """Wherever the two best logits of transformers' own forward, by base and adapter, are further
    apart than the error measured on the tokens that were taken, the better one is taken."""
    model = set_up(load_model(model_folders["llama"], dtype=dtype), mode)
    add_lora(model, 4, 8)
    for i, layer in enumerate(lora_layers(model).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(i))
    with merged(model):
        g = generate(model, PROMPTS, 1, 100, [-1], NOISE, temperature=0, max_rows=3)
    clear = 0
    for i, prompt in enumerate(PROMPTS):
        p = len(prompt)
        tokens = g.tokens[i : i + 1, : p + 100]
        with torch.no_grad():
            logp = model(tokens).logits[0, p - 1 : -1].float().log_softmax(-1)  # [100, V]
        taken = tokens[0, p:]
        error = (logp.gather(1, taken[:, None])[:, 0] - g.sampler_logp[i]).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.3)
        best = logp.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > 2 * error  # either logit may be off by it
        assert (taken == best.indices[:, 0])[sure].all()
        clear += int(sure.sum())
    assert clear > (390 if dtype == torch.float32 else 200)  # of 400


def test_greedy_equals_generate_on_a_real_model(shared):
    folder = str(shared / "models" / "stories260K")
    tokenizer = load_tokenizer(folder)
    texts = ["Once upon a time", "Lily", "The big dog ran to the park and saw a", "Tom said"]
    prompts = [tokenizer(t)["input_ids"] for t in texts]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    g = generate(load_model(folder), prompts, 2, 200, [2], NOISE, temperature=0)
    expected = [reference_greedy(plain, p, 200, 2) for p in prompts for _ in range(2)]
    assert responses(g) == expected


def test_a_group_is_prefilled_once(model_folders):
    model = load_model(model_folders["qwen2"])
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape)))
    generate(model, PROMPTS, 6, 3, [-1], NOISE)
    assert seen == [(4, 7), (24, 1), (24, 1)]


def test_ended_rows_cost_nothing(model_folders):
    """Tokens decoded are about those kept, not rows x longest."""
    model = load_model(model_folders["qwen2"])
    rows = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: rows.append(i[0].shape[0]))
    g = generate(model, PROMPTS, 64, 60, [3, 7, 11, 19, 23, 41], NOISE)
    kept, box = int(g.length.sum()), len(g.length) * int(g.length.max())
    decoded = sum(rows[1:])
    assert kept < 0.6 * box and decoded < 1.15 * kept


def test_memory_that_was_never_written_is_never_read(model_folders):
    """With new buffers full of nan, also what is masked must have been written."""
    model = load_model(model_folders["olmo2"])
    want = responses(generate(model, PROMPTS, 8, 150, [3], NOISE, max_rows=5))
    torch.use_deterministic_algorithms(True)  # it fills them so
    try:
        assert torch.empty(3).isnan().all()
        assert responses(generate(model, PROMPTS, 8, 150, [3], NOISE, max_rows=5)) == want
    finally:
        torch.use_deterministic_algorithms(False)


def test_waiting_rows_take_the_slots_of_ended_ones(model_folders):
    """Ragged lengths cost little: a wave of its own for every 32 rows would decode many more."""
    model = load_model(model_folders["qwen2"])
    rows = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: rows.append(tuple(i[0].shape)))
    g = generate(model, PROMPTS, 64, 60, [3, 7, 11], NOISE, max_rows=32)
    decoded = sum(n for n, t in rows if t == 1)
    waves = sum(int(part.max()) * 32 for part in g.length.split(32))
    assert max(n for n, t in rows if t == 1) == 32
    assert decoded < 1.25 * int(g.length.sum()) and decoded < 0.7 * waves


def test_progress_counts_every_token_and_row(model_folders, mode):
    seen = []
    g = generate(
        set_up(load_model(model_folders["qwen2"]), mode),
        PROMPTS,
        8,
        20,
        [3, 7],
        NOISE,
        max_rows=6,
        progress=lambda *counts: seen.append(counts),
    )
    assert [sum(column) for column in zip(*seen, strict=True)] == [int(g.length.sum()), 32]


def test_samples_do_not_depend_on_batch_group_slots_or_budget(model_folders):
    model = load_model(model_folders["llama"])
    end = [3, 7, 11]
    whole = responses(generate(model, PROMPTS, 8, 40, end, NOISE))
    for n in (1, 5, 31):
        assert responses(generate(model, PROMPTS, 8, 40, end, NOISE, max_rows=n)) == whole
    budgets = [1 + i for i in range(32)]
    cut = responses(generate(model, PROMPTS, 8, 40, end, NOISE, max_rows=7, budgets=budgets))
    assert cut == [row[: 1 + i] for i, row in enumerate(whole)]
    shorter = responses(generate(model, PROMPTS, 3, 25, end, NOISE))
    assert shorter == [whole[p * 8 + s][:25] for p in range(4) for s in range(3)]
    assert responses(generate(model, PROMPTS, 8, 40, end, (TRAIN_NOISE, 0, 2))) != whole
    assert len({tuple(r) for r in whole[:8]}) == 8


def test_samples_do_not_depend_on_the_cache_or_its_buckets(model_folders):
    """Static slots and captured steps give the samples of the growing cache."""
    model = load_model(model_folders["qwen2"])
    call = (PROMPTS, 8, 60, [3, 7, 11], NOISE, 0.9, 0.99, 50)
    want = responses(generate(model, *call, max_rows=6))
    for bucket, n in ((1, 6), (16, 5), (16, 32), (64, 1)):
        model.decode_setup = DecodeSetup(static=True, bucket=bucket)
        assert responses(generate(model, *call, max_rows=n)) == want


def test_a_captured_step_stays_valid_as_weights_change(model_folders):
    """An update later, the graphs of the first rollout give what eager decoding gives: nothing that
    they hold was replaced. Where it was (the copy freed, the adapter off), they are not used."""
    model = load_model(model_folders["llama"])
    add_lora(model, 4, 8)
    call = (PROMPTS, 4, 30, [-1], NOISE)  # of one length, so that all steps are of one shape

    def rollout(free=False):
        with merged(model, free):
            return responses(generate(model, *call))

    def update(seed):
        for i, parameter in enumerate(trainable(model).values()):
            with torch.no_grad():
                generator = torch.Generator().manual_seed(100 * seed + i)
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)

    def eager():
        captured, model.decode_setup = model.decode_setup, DecodeSetup(static=False)
        out = rollout()
        model.decode_setup = captured
        return out

    model.decode_setup = DecodeSetup(static=True, capture=Traced)
    Traced.captured = Traced.replayed = 0
    seen = []
    for seed in range(3):
        seen.append(rollout())
        assert (Traced.captured, Traced.replayed) == (1, 28 + 29 * seed)
        update(seed)
    update_free = rollout(free=True)
    assert Traced.captured == 1
    assert rollout() == update_free and Traced.captured == 2  # in copies that are new
    assert rollout() == eager() == update_free and len({str(x) for x in (*seen, update_free)}) == 4
    with adapter_off(model):
        base = responses(generate(model, *call))
    assert base == responses(generate(load_model(model_folders["llama"]), *call))


def test_decoding_goes_on_where_a_capture_fails(model_folders):
    """With the same samples, one warning, and no second try."""
    tried = []

    def fail(step, pool):
        tried.append(1)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model = load_model(model_folders["qwen2"])
    want = responses(generate(model, PROMPTS, 4, 30, [3, 7], NOISE))
    model.decode_setup = DecodeSetup(static=True, capture=fail)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs: operation not permitted$"):
        assert responses(generate(model, PROMPTS, 4, 30, [3, 7], NOISE)) == want
    assert responses(generate(model, PROMPTS, 2, 30, [3, 7], NOISE)) == [
        row for i, row in enumerate(want) if i % 4 < 2
    ]
    assert tried == [1]


def test_slots_are_kept_until_a_longer_prompt_comes(model_folders):
    model = set_up(load_model(model_folders["llama"]), "static")
    for prompts, same in (([[5] * 7], None), ([[6] * 3], True), ([[7] * 8], False)):
        before = model.decode_setup.kept
        g = generate(model, prompts, 2, 20, [-1], NOISE, temperature=0)
        assert responses(g)[0] == reference_greedy(model, prompts[0], 20, None)
        if before:
            assert (model.decode_setup.kept[1] is before[1]) == same
    engine.drop_slots(model)
    assert model.decode_setup.kept is None


def test_sampler_logp_is_the_scored_one(model_folders):
    """In fp32 they differ by rounding alone: the sampled distribution is the scored one."""
    for temperature in (1.0, 0.6):
        model = load_model(model_folders["olmo2"])
        g = generate(model, PROMPTS, 8, 40, [3, 7], NOISE, temperature)
        scored = token_stats(model, g.tokens, g.prompt_len, g.length, temperature).logp
        assert scored.shape == g.sampler_logp.shape
        assert torch.allclose(scored, g.sampler_logp, atol=2e-5)
        wrong = token_stats(model, g.tokens, g.prompt_len, g.length, temperature + 0.1).logp
        assert (wrong - g.sampler_logp).abs().max() > 0.01


def test_sample_follows_the_distribution():
    """Chi-square over 50k draws, a token of probability 0 and the unseen tail included."""
    chisquare = pytest.importorskip("scipy.stats").chisquare
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -float("inf"), 0.5, -3.0])
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (1.0, 0.5):
        token, logp = sample(logits.expand(50_000, -1), u, temperature)
        p = (logits.double() / temperature).softmax(0)
        counts = torch.bincount(token, minlength=7)
        assert counts[4] == 0
        seen = p > 0
        assert chisquare(counts[seen].numpy(), (p[seen] * 50_000).numpy()).pvalue > 1e-3
        assert torch.allclose(logp.double(), p.log()[token], atol=1e-6)


@pytest.mark.parametrize("V", [7, 128, 129, 1000, 5000])
def test_sample_inverts_the_cumulative_distribution(V):
    """Over many blocks of the vocabulary, against a plain search in float64."""
    g = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(200, V, generator=g)
    logits[:, ::3] = -torch.inf
    u = torch.rand(200, generator=g, dtype=torch.float64)
    token, logp = sample(logits, u)
    exact = logits.double().log_softmax(-1)
    cdf = exact.exp().cumsum(-1)
    before, at = (cdf.gather(1, (token[:, None] - i).clamp_min(0))[:, 0] for i in (1, 0))
    before = before.where(token > 0, 0.0)
    assert (before <= u + 1e-6).all() and (u <= at + 1e-6).all() and (token % 3 > 0).all()
    assert torch.allclose(logp.double(), exact.gather(1, token[:, None])[:, 0], atol=1e-6)


def test_extreme_uniforms_never_pick_an_impossible_token():
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf"), 0.0, -float("inf")]])
    for u, expected in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert sample(logits, torch.tensor([u], dtype=torch.float64))[0].item() == expected


def test_top_p_and_top_k_keep_the_likeliest():
    p = torch.tensor([[0.4, 0.05, 0.3, 0.25]])
    u = torch.linspace(0, 0.9999, 400, dtype=torch.float64)
    draw = lambda **k: set(sample(p.log().expand(400, -1), u, **k)[0].tolist())  # noqa: E731
    assert draw() == {0, 1, 2, 3}
    assert draw(top_k=2) == {0, 2}
    assert draw(top_p=0.39) == {0} and draw(top_p=0.69) == {0, 2} and draw(top_p=0.9) == {0, 2, 3}


def test_uniforms_are_a_function_of_their_key():
    a = uniforms((1, 2), 3, 4, 10)
    assert (uniforms((1, 2), 3, 4, 20)[:10] == a).all()
    others = [uniforms(k, p, s, 10) for k, p, s in [((1, 3), 3, 4), ((1, 2), 4, 4), ((1, 2), 3, 5)]]
    assert all((a != b).all() for b in others)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_gradients_survive_a_rollout_and_checkpointing_survives_it_too(model_folders, quant):
    """bitsandbytes may repack weights in eval mode; checkpointing would turn the cache off."""
    model = load_model(model_folders["qwen2"], quant)
    add_lora(model, 4, 8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    plain = responses(generate(model, PROMPTS, 4, 30, [3], NOISE))
    before = gradient(model)
    checkpoint_activations(model)
    assert responses(generate(model, PROMPTS, 4, 30, [3], NOISE)) == plain
    assert model.model.layers[0].gradient_checkpointing and model.training
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(gradient(model), before)


def gradient(model):
    from conftest import batch

    model.zero_grad()
    token_stats(model, *batch(3), also=()).logp.sum().backward()
    return torch.cat([p.grad.flatten() for p in trainable(model).values()])


# ------------------------------------------------------------------------------- what CUDA would do


class Empty(Traced):
    """A graph captured on the wrong device: it replays nothing and raises nothing."""

    def replay(self):
        pass


def test_a_replay_that_does_nothing_is_an_error(model_folders):
    model = load_model(model_folders["qwen2"])
    model.decode_setup = DecodeSetup(static=True, capture=Empty)
    with pytest.raises(RuntimeError, match="1 were done"):
        generate(model, PROMPTS, 1, 30, [-1], NOISE)


def test_a_capture_without_memory_costs_its_own_shape_only(model_folders):
    """The others are still captured, and the samples stay."""
    tried = []

    def capture(step, pool):
        tried.append((step.__self__.n, step.__self__.cache.shape))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no memory")
        return Traced(step, pool)

    model = load_model(model_folders["qwen2"])
    want = responses(generate(model, PROMPTS, 1, 30, [-1], NOISE))
    model.decode_setup = DecodeSetup(static=True, capture=capture, bucket=32)
    with pytest.warns(UserWarning, match="no memory to capture"):
        assert responses(generate(model, PROMPTS, 1, 30, [-1], NOISE)) == want
    assert len(set(tried)) == len(tried) == 2
    assert responses(generate(model, PROMPTS, 1, 30, [-1], NOISE)) == want and len(tried) == 2


def test_columns_do_not_depend_on_the_prompts_so_far(model_folders):
    """The same buffers for every prompt up to the longest that may come, of an aligned width."""
    model = load_model(model_folders["llama"])
    model.decode_setup = DecodeSetup(static=True, longest_prompt=40)
    seen = set()
    for length in (3, 40, 17):
        generate(model, [[5] * length], 2, 21, [-1], NOISE)
        cache = model.decode_setup.kept[1].cache
        seen.add((id(cache), cache.keys[0].shape[2]))
    assert len(seen) == 1 and seen.pop()[1] == 64


class FakeGPU:
    """The calls that choose_device makes of torch.cuda, noted."""

    def __init__(self, monkeypatch, capability):
        self.current, self.cudnn, zeros = None, None, torch.zeros
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "set_device", lambda d: setattr(self, "current", d))
        monkeypatch.setattr(cuda, "get_device_capability", lambda d: capability)
        cudnn = lambda on: setattr(self, "cudnn", on)  # noqa: E731
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn)
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")


@pytest.mark.parametrize("name,index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_gpu_that_was_asked_for_is_the_current_one(monkeypatch, name, index):
    gpu = FakeGPU(monkeypatch, (8, 9))
    device, dtype = choose_device(name, "auto")
    assert device == gpu.current == torch.device("cuda", index)
    assert dtype == torch.bfloat16 and gpu.cudnn is False


def test_old_cards_and_other_devices_are_refused(monkeypatch):
    FakeGPU(monkeypatch, (7, 5))
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(UserError, match="--dtype=float32"):
            choose_device("cuda", dtype)
    assert choose_device("cuda", "float32")[1] == torch.float32
    for device in ("mps", "meta", "xpu"):
        with pytest.raises(UserError, match="--device=cpu"):
            choose_device(device, "auto")


@pytest.mark.parametrize("native", [True, False])
def test_dtype_auto_on_the_cpu_is_bf16_for_large_models_where_it_is_native(
    monkeypatch, tmp_path, capsys, tiny_random, native
):
    from transformers import Qwen2Config

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    Qwen2Config(hidden_size=512, num_hidden_layers=1, vocab_size=151936).save_pretrained(tmp_path)
    large = str(tmp_path)
    wanted = "bfloat16" if native else "float32"
    assert choose_device("cpu", "auto", large)[1] == getattr(torch, wanted)
    said = capsys.readouterr().out
    assert wanted in said and said.count("\n") == 1
    assert choose_device("cpu", "auto", tiny_random)[1] == torch.float32
    assert choose_device("cpu", "auto", large, full=True)[1] == torch.float32
    assert choose_device("cpu", "bfloat16", tiny_random)[1] == torch.bfloat16
    assert capsys.readouterr().out == ""


def test_a_failed_capture_leaves_stream_and_allocator_as_before(monkeypatch):
    """torch.cuda.graph ends a capture that fails late neither on its stream nor in its pool."""
    done, stream, memory = [], SimpleNamespace(device_index=1), torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: done.append(s))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(memory, name, lambda *args, name=name: done.append((name, *args)))

    def fails():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        capture(fails, (0, 7))
    pool = [(name, 1, (0, 7)) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool")]
    assert done == [stream, *pool]
