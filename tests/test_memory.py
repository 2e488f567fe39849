"""The plan against what is live, the settled micro-batch, and a run that goes on after an OOM."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import eval as evaluation
import train as trainer
from data import partition
from decoding.slots import DecodeSetup
from harness import memory
from harness import scale as scales
from harness.errors import UserError
from harness.loading import load_model
from harness.memory import largest_micro_batch, plan, worst_case
from harness.runfiles import read_config
from harness.scale import choose_scale
from harness.shapes import meta_model
from lora import add_lora, lora_layers, merged, trainable
from model import _Chunk, backbone, checkpoint_activations, token_stats
from settings import Config, check
from tools import memory_table
from train import train

pytestmark = pytest.mark.slow


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most there were."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        # views of weights are no new memory
        self.weights = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.known = {storage._cdata for storage in self.weights}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def lora_model(folder, quant="none", dtype=torch.float32, r=4):
    model = load_model(folder, quant, dtype)
    add_lora(model, r, 8)
    return model


# ---------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "llama", "olmo2"])
def test_planned_activations_are_what_a_backward_holds(model_folders, family, dtype, checkpointing):
    model = lora_model(model_folders[family], dtype=dtype)
    if checkpointing:
        checkpoint_activations(model)
    planned = plan([model], 8 * 48, 64, 4, checkpointing)
    with Live(model) as live:
        hidden = backbone(model)(torch.ones(8, 48, dtype=torch.int64), use_cache=False)[0]
        hidden.sum().backward()
    assert planned.activations == pytest.approx(live.peak, rel=0.3)
    other = plan([model], 8 * 48, 64, 4, not checkpointing)
    assert other.activations == planned.activations_else


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_logits_are_what_the_head_holds(model_folders, monkeypatch, dtype, trained):
    model = lora_model(model_folders["llama"], dtype=dtype)
    output = torch.nn.Linear(64, 9700, dtype=dtype).requires_grad_(trained)
    model.set_output_embeddings(output)
    monkeypatch.setattr(memory, "LOGITS_CHUNK", 9700 * 400)
    planned = plan([model], 8 * 400, 400, 4, False)
    hidden = torch.randn(400, 64, dtype=dtype, requires_grad=True)
    y = torch.zeros(400, dtype=torch.int64)
    with Live(model) as live:
        _Chunk.apply(hidden, y, output, 0.7, (), *output.parameters())[0].sum().backward()
    assert planned.logits == pytest.approx(live.peak, rel=0.3)


@pytest.mark.parametrize(
    "quant,dtype", [("none", torch.float32), ("none", torch.bfloat16), ("nf4", torch.bfloat16)]
)
def test_the_other_parts_are_counted_exactly(model_folders, quant, dtype):
    model = lora_model(model_folders["qwen2"], quant, dtype)
    with merged(model):
        pass
    planned = plan([model], 100, 64, 6, False)
    layers = list(lora_layers(model).values())
    copies = [layer.merged_weight for layer in layers]
    assert planned.merged == sum(t.numel() * t.element_size() for t in copies)
    assert planned.trained == 16 * sum(p.numel() for p in trainable(model).values())
    with torch.no_grad():
        tokens = torch.ones(6, 64, dtype=torch.int64)
        held = backbone(model)(tokens, use_cache=True).past_key_values.layers
    held = [t for layer in held for t in (layer.keys, layer.values)]
    assert planned.cache == sum(t.numel() * t.element_size() for t in held)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    linear = sum(x.base.in_features * x.base.out_features for x in layers)
    if quant == "nf4":
        # half a byte a weight, a byte a block of 64, a float a block of 256 of those; and a layer
        # has two code books, 16 and 256 floats, and one offset
        rest = sum(p.numel() * p.element_size() for p in frozen if p.dtype != torch.uint8)
        sizes = [x.base.in_features * x.base.out_features for x in layers]
        scales = sum(4 * -(-n // 64 // 256) for n in sizes)
        books = 4 * (16 + 256 + 1) * len(layers)
        assert planned.weights == rest + linear // 2 + linear // 64 + scales + books
    else:
        assert planned.weights == sum(p.numel() * p.element_size() for p in frozen)
    two = plan([model, load_model(model_folders["llama"])], 100, 64, 6, False)
    assert two.weights > planned.weights and two.trained == planned.trained


def test_full_training_counts_its_weights_once(model_folders):
    model = load_model(model_folders["llama"])
    model.requires_grad_(True)
    planned = plan([model], 100, 64, 6, False)
    assert planned.weights == 0 and planned.trained == 16 * model.num_parameters()
    assert planned.choose("auto")[0] == "adapter" and "lora_r=0" in planned.choose("auto")[1]


def test_rollout_weights_are_chosen_by_what_fits(model_folders):
    planned = replace(
        plan([lora_model(model_folders["llama"])], 100, 64, 6, True),
        weights=50,
        trained=10,
        merged=130,
        cache=30,
        decode_step=1,
        prefill=5,
        activations=20,
        logits=10,
    )
    assert planned.need("kept") == 50 + 10 + 130 + 30 + 1 + max(5, 20 + 10)
    assert planned.need("freed") == 50 + 10 + max(130 + 30 + 1 + 5, 20 + 10)
    assert planned.need("adapter") == 50 + 10 + 30 + 1 + max(5, 20 + 10)
    assert replace(planned, prefill=70).need("adapter") == 50 + 10 + 30 + 1 + 70
    for room, how in ((252, "kept"), (250, "freed"), (227, "freed"), (225, "adapter")):
        planned = replace(planned, device=room / memory.USABLE + 1e-6)
        assert planned.choose("auto")[0] == how and "\n" not in planned.choose("auto")[1]
        assert f"{how == 'freed'}" == str(", freed before the update" in planned.table(how))
    assert planned.choose("merged")[0] == "freed" and planned.choose("adapter")[0] == "adapter"


def test_the_limit_of_the_process_counts(monkeypatch):
    all_of_it = memory.device_memory(torch.device("cpu"))
    assert all_of_it > 1e9
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (10**9, 10**9))
    assert memory.device_memory(torch.device("cpu")) == 10**9


# ---------------------------------------------------------------------------------- the worst case


def test_no_micro_batch_is_larger_than_the_one_tried():
    """Of any lengths; and one of that size does come up."""
    g = torch.Generator().manual_seed(0)
    for micro in (20, 50, 75, 100, 130, 200, 1000):
        rows, T = largest_micro_batch(micro, 6, 10, 40)
        assert T <= 50 and rows <= 6 and (rows * T <= micro or (rows, T) == (1, 50))
        for _ in range(20):
            lengths = torch.randint(2, 51, (24,), generator=g).tolist()
            for mini in partition(lengths, 4, micro, 0, 0):
                assert all(len(p) * max(lengths[i] for i in p) <= rows * T + rows for p in mini)
        (only,) = partition([T] * rows, 1, micro, 0, 0)
        assert [len(p) for p in only] == [rows]


def out_of_memory_above(monkeypatch, limit, seen):
    def stats(model, tokens, *args, **kwargs):
        seen.append(tuple(tokens.shape))
        if tokens.numel() > limit:
            raise torch.cuda.OutOfMemoryError
        return token_stats(model, tokens, *args, **kwargs)

    monkeypatch.setattr(memory, "token_stats", stats)


def test_the_micro_batch_is_halved_until_it_fits(model_folders, monkeypatch, capsys):
    model, seen = lora_model(model_folders["llama"]), []
    out_of_memory_above(monkeypatch, 100, seen)
    assert worst_case(model, 400, 16, 10, 40, 4) == 100
    assert seen == [(8, 50), (4, 50), (2, 50)]
    out = capsys.readouterr().out
    assert "micro_batch_tokens was 400, now 100" in out and "2 x 50 tokens" in out
    assert all(p.grad is None for p in model.parameters())
    assert worst_case(model, 80, 16, 10, 40, 4) == 80 and "was" not in capsys.readouterr().out
    # 1000 tokens where an update has but 4 rows: halved from what there can be
    assert worst_case(model, 1000, 4, 10, 40, 4) == 100
    out_of_memory_above(monkeypatch, 49, seen)
    with pytest.raises(UserError, match=r"one row, 50 tokens: lower --max_new_tokens"):
        worst_case(model, 400, 16, 10, 40, 4)


def test_a_prefill_and_a_decoding_step_are_tried(model_folders, monkeypatch):
    """One of each, of all rows and with room for the longest; and what they held is let go."""
    model, shapes, caches = lora_model(model_folders["llama"]), [], []
    model.decode_setup = DecodeSetup(static=True, longest_prompt=10)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 30)
    monkeypatch.setattr(memory, "PREFILL_TOKENS", 30)
    embed = model.model.embed_tokens
    hook = embed.register_forward_hook(lambda m, i, o: shapes.append(tuple(i[0].shape)))
    fits = memory._fits

    def at_update(*args):
        hook.remove()
        caches.append(tuple(model.decode_setup.kept[1].cache.keys[0].shape))
        return fits(*args)

    monkeypatch.setattr(memory, "_fits", at_update)
    worst_case(model, 100, 16, 10, 40, 6, "kept", decoded=100)
    assert shapes == [(3, 10), (6, 1)] and caches == [(6, 2, 128, 16)]  # 100 columns, aligned
    assert model.decode_setup.kept is None


def test_a_gpu_has_what_is_free_and_what_we_hold(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 10**9)
    assert memory.device_memory(torch.device("cuda", 0)) == 8 * 10**9


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_reports_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert memory.peak_memory() > 0.05


def test_rollouts_that_do_not_fit_name_their_knobs(model_folders, monkeypatch):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(memory, "merged", full)
    with pytest.raises(UserError, match="--rollout_rows .* --rollout_weights=adapter"):
        worst_case(lora_model(model_folders["llama"]), 100, 16, 10, 40, 4, "kept")


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def config(tiny_random):
    """A run of 32 rollouts a step on the untrained tiny world, with an eval every second step."""
    return Config(
        model=tiny_random,
        quant="none",
        lora_r=4,
        lora_alpha=8,
        gradient_checkpointing=False,
        train_data=tiny_random,
        eval_data=tiny_random,
        prompt="none",
        max_prompt_tokens=32,
        max_new_tokens=12,
        reward="random(0.5)",
        steps=3,
        prompts_per_step=4,
        group_size=8,
        micro_batch_tokens=200,
        lr=1e-2,
        eval_every=2,
        eval_n=10,
        eval_temperature=1.0,
        save_every=0,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture
def small(config, tmp_path):
    return replace(config, out_dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The metrics of the uninterrupted run."""
    return comparable(train(replace(config, out_dir=str(tmp_path_factory.mktemp("whole") / "run"))))


TIMINGS = ("seconds", "tokens_per_s", "peak_memory")


def comparable(history):
    return [{k: v for k, v in m.items() if not k.startswith(TIMINGS)} for m in history]


def test_the_settled_micro_batch_is_used_saved_and_resumed(small, monkeypatch, capsys):
    used = []
    monkeypatch.setattr(
        trainer,
        "partition",
        lambda a, b, tokens, *c: used.append(tokens) or partition(a, b, tokens, *c),
    )
    out_of_memory_above(monkeypatch, 60, [])
    train(replace(small, steps=1, eval_every=0))
    (settled,) = set(used)
    assert 44 <= settled <= 60 < small.micro_batch_tokens
    assert read_config(small.out_dir)["micro_batch_tokens"] == settled
    saved = Config(**read_config(small.out_dir))
    used.clear()
    train(replace(saved, steps=2, resume=True))
    assert set(used) == {settled}


def fails_once(monkeypatch, owner, name, call):
    """The call-th call of owner.name finds no memory, counted from 1."""
    real, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise torch.cuda.OutOfMemoryError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    "owner,name,call,step,knob",
    [
        (trainer, "generate", 3, 2, "'sample': lower --rollout_rows or --max_new_tokens"),
        (trainer, "score", 2, 1, "'score': lower --micro_batch_tokens"),
        (trainer.grpo, "policy_loss", 21, 2, "'update': lower --micro_batch_tokens"),
        (trainer.grpo, "policy_loss", 3, 0, "'update': lower --micro_batch_tokens"),
        (trainer, "evaluate", 2, 2, "'eval': lower --rollout_rows"),
        (trainer, "evaluate", 1, 0, "'eval': lower --rollout_rows"),
    ],
)
def test_memory_that_runs_out_costs_one_step(
    small, whole, monkeypatch, owner, name, call, step, knob, capsys
):
    """The run ends at a step's boundary, whatever it was doing, and goes on as if nothing was."""
    with monkeypatch.context() as patch:
        fails_once(patch, owner, name, call)
        with pytest.raises(UserError) as error:
            train(small)
    message = str(error.value)
    assert knob in message and f"saved as of step {step}, --resume=True" in message
    assert "\n" not in message
    assert comparable(train(replace(small, resume=True))) == whole
    assert f"resumed after step {step}" in capsys.readouterr().out


def test_full_training_goes_back_to_its_checkpoint(small, monkeypatch):
    cfg = replace(small, lora_r=0, lr=1e-3, save_every=2)
    whole = train(replace(cfg, out_dir=small.out_dir + "whole"))
    with monkeypatch.context() as patch:
        fails_once(patch, trainer, "update", 3)
        with pytest.raises(UserError, match="saved as of step 2"):
            train(cfg)
    assert comparable(train(replace(cfg, resume=True))) == comparable(whole)


@pytest.mark.parametrize("how,saved", [("auto", "merged"), ("merged", "merged"), ("adapter",) * 2])
def test_rollout_weights_are_used_and_saved(small, how, saved, monkeypatch, capsys):
    seen = []
    generate = trainer.generate

    def spy(model, *args, **kwargs):
        seen.append({layer.use_merged for layer in lora_layers(model).values()})
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "generate", spy)
    monkeypatch.setattr(evaluation, "generate", spy)
    train(replace(small, steps=1, eval_every=1, rollout_weights=how))
    assert seen == [{saved == "merged"}] * 3  # eval, step, eval
    assert read_config(small.out_dir)["rollout_weights"] == saved
    line = {"merged": "a merged copy, which fits", "adapter": "base and adapter, as asked"}[saved]
    assert f"rollout weights: {line}" in capsys.readouterr().out


def test_freed_samples_what_kept_samples(small, monkeypatch):
    kept = train(replace(small, steps=2, out_dir=small.out_dir + "kept"))
    monkeypatch.setattr(memory.Plan, "choose", lambda self, wanted: ("freed", "a test"))
    freed = train(replace(small, steps=2, out_dir=small.out_dir + "freed"))
    assert comparable(freed) == comparable(kept)
    monkeypatch.setattr(memory.Plan, "choose", lambda self, wanted: ("adapter", "a test"))
    adapter = train(replace(small, steps=2, out_dir=small.out_dir + "adapter"))
    gaps = [[m["sampler_gap_max"] for m in history[1:]] for history in (kept, adapter)]
    assert gaps[0] != gaps[1]  # the knob does something: another rounding


def test_a_resumed_run_keeps_what_auto_chose(small, whole, monkeypatch, capsys):
    train(replace(small, steps=2))
    monkeypatch.setattr(memory, "device_memory", lambda device: 1)  # a busy device would say no
    assert comparable(train(replace(small, resume=True))) == whole
    assert "rollout_weights was" not in capsys.readouterr().out


def test_rollout_weights_that_cannot_act_warn():
    cfg = Config(lora_r=0, quant="none")
    assert check(cfg) == []
    for how in ("merged", "adapter"):
        (warning,) = check(replace(cfg, rollout_weights=how))
        assert f"rollout_weights={how} has no effect" in warning


# --------------------------------------------------------------------------------------- the scales


@pytest.mark.parametrize(
    "recipe,choices",
    [
        (
            (
                "qwen2.5_math_1.5b",
                ["--rollout_rows=32", "--micro_batch_tokens=2048"],
                "qwen2.5-1.5b",
            ),
            ("kept", "kept", "kept", "kept"),
        ),
        (("qwen2.5_math_1.5b", [], "qwen2.5-1.5b"), ("-", "freed", "kept", "kept")),
        (("qwen2.5_math_1.5b_paper", [], "qwen2.5-1.5b"), ("-", "-", "-", "kept")),
        (("qwen2.5_math_7b", [], "qwen2.5-7b"), ("-", "-", "-", "adapter")),
    ],
)
def test_what_auto_picks_on_8_12_16_and_24_gb(recipe, choices):
    _, planned = memory_table.recipe(*recipe, 24e9)
    assert tuple(memory_table.picks(planned, gb) for gb in memory_table.CARDS) == choices


def test_the_scale_of_a_gpu_follows_from_the_plan(model_folders, monkeypatch):
    """Not from the card alone: a small model fits a small card, and a full card holds none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = {"model": model_folders["qwen2"]}
    for free, scale in ((2e9, "qwen2.5_math_1.5b.py"), (1e6, "tiny.py")):
        monkeypatch.setattr(scales, "device_memory", lambda device, free=free: int(free))
        assert choose_scale(given)[0].endswith(scale)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_plan_from_a_configuration_is_that_of_the_model(model_folders, quant):
    real = lora_model(model_folders["qwen2"], quant, torch.bfloat16)
    meta = meta_model(real.config, quant, 4, torch.bfloat16, False)
    a, b = (plan([m], 100, 64, 6, False) for m in (real, meta))
    assert a == replace(b, device=a.device)
