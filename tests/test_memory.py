"""The plan against what is live, the settled micro-batch, and a run that goes on after an OOM."""

import weakref
from dataclasses import replace

import pytest
import torch
from conftest import comparable, run_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import eval as evaluation
import train as trainer
from data import partition
from decoding.slots import DecodeSetup
from harness import memory
from harness import plan as plans
from harness import scale as scales
from harness.errors import UserError
from harness.loading import load_model
from harness.memory import worst_case
from harness.plan import largest_micro_batch, plan
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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_logits_are_what_the_head_holds(model_folders, monkeypatch, dtype, trained):
    model = lora_model(model_folders["llama"], dtype=dtype)
    output = torch.nn.Linear(64, 9700, dtype=dtype).requires_grad_(trained)
    model.set_output_embeddings(output)
    monkeypatch.setattr(plans, "LOGITS_CHUNK", 9700 * 400)
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
    assert planned.rows * planned.row_cache == sum(t.numel() * t.element_size() for t in held)
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
    how, rows, reason = planned.choose("auto")
    assert (how, rows) == ("adapter", 6) and "lora_r=0" in reason


def made_plan(folder, **changes):
    """A plan of 16 rows, in bytes that are easy to add."""
    parts = dict(
        weights=50,
        trained=10,
        merged=130,
        unmerged=300,
        head=20,
        row_cache=4,
        row_step=1,
        prefill=5,
        activations=20,
        logits=10,
        rows=16,
    )
    return replace(plan([lora_model(folder)], 100, 64, 6, True), **{**parts, **changes})


def test_what_is_needed_at_once(model_folders):
    planned = made_plan(model_folders["llama"])
    assert planned.need("kept") == 50 + 10 + 130 + 16 * 5 + max(5, 20 + 10)
    assert planned.need("freed") == 50 + 10 + max(130 + 16 * 5 + 5, 20 + 10)
    assert planned.need("adapter") == 50 + 10 + 16 * 5 + max(5, 20 + 10)
    assert replace(planned, prefill=70).need("adapter", 8) == 50 + 10 + 8 * 5 + 70


@pytest.mark.parametrize(
    "room,unmerged,chosen",
    [
        (300, 300, ("kept", 16)),  # 300 needed
        (299, 300, ("freed", 16)),  # 275 needed
        (274, 300, ("kept", 8)),  # 260 needed; 8 / 166 rows a byte beat 16 / 352
        (259, 300, ("freed", 8)),  # 235 needed
        (274, 200, ("adapter", 16)),  # 170 needed; 16 / 252 beat 8 / 166
        (234, 300, ("adapter", 16)),
        (169, 300, ("adapter", 8)),
        (100, 300, ("adapter", 16)),  # nothing fits: what was asked for is tried
    ],
)
def test_auto_weighs_rows_against_merging(model_folders, room, unmerged, chosen):
    device = room / plans.USABLE + 1e-6
    planned = made_plan(model_folders["llama"], device=device, unmerged=unmerged)
    assert planned.choose("auto")[:2] == chosen
    assert "\n" not in planned.choose("auto")[2]
    # What was asked for explicitly is not weighed.
    assert planned.choose("merged")[:2] == ("kept" if room >= 300 else "freed", 16)
    assert planned.choose("adapter")[:2] == ("adapter", 16)
    assert (", freed before the update" in planned.table(*chosen)) == (chosen[0] == "freed")


def test_auto_decodes_fewer_rows_where_memory_is_short(small, monkeypatch, capsys):
    """The rows are saved, and a resumed run keeps them although memory is free again."""
    whole = train(replace(small, steps=2, out_dir=small.out_dir + "whole", eval_every=0))
    fits = plans.Plan.choose

    def scarce(self, wanted):
        self.device = self.need("adapter", 9) / plans.USABLE
        self.merged = 10**12
        return fits(self, wanted)

    cfg = replace(small, steps=1, rollout_rows=20, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(plans.Plan, "choose", scarce)
        train(cfg)
    saved = read_config(small.out_dir)
    assert (saved["rollout_rows"], saved["rollout_weights"]) == (8, "adapter")
    assert "rollout_rows was 20, now 8" in capsys.readouterr().out
    train(replace(cfg, steps=2, resume=True))
    assert read_config(small.out_dir)["rollout_rows"] == 8
    assert "rollout_rows stays 8" in capsys.readouterr().out
    history = train(replace(cfg, steps=3, rollout_rows=4, resume=True))
    assert read_config(small.out_dir)["rollout_rows"] == 4
    assert history[0]["reward"] == whole[0]["reward"]  # rows change no sample in fp32 on the CPU


def test_the_limit_of_the_process_counts(monkeypatch):
    all_of_it = plans.device_memory(torch.device("cpu"))
    assert all_of_it > 1e9
    monkeypatch.setattr(plans.resource, "getrlimit", lambda which: (10**9, 10**9))
    assert plans.device_memory(torch.device("cpu")) == 10**9


# ---------------------------------------------------------------------------------- the worst case


def lengths(micro_batch_tokens, in_update=16, rollout_rows=4, **more):
    """Settings of 10 + 40 tokens a row and so many rows in an update."""
    return Config(
        max_prompt_tokens=10,
        max_new_tokens=40,
        prompts_per_step=1,
        group_size=in_update,
        updates_per_step=1,
        micro_batch_tokens=micro_batch_tokens,
        rollout_rows=rollout_rows,
        **more,
    )


def settled(model, cfg, *how):
    worst_case(model, cfg, *how)
    return cfg.micro_batch_tokens


def test_no_micro_batch_is_larger_than_the_one_tried():
    """Of any lengths; and one of that size does come up."""
    g = torch.Generator().manual_seed(0)
    for micro in (20, 50, 75, 100, 130, 200, 1000):
        rows, T = largest_micro_batch(lengths(micro, in_update=6))
        assert T <= 50 and rows <= 6 and (rows * T <= micro or (rows, T) == (1, 50))
        for _ in range(20):
            drawn = torch.randint(2, 51, (24,), generator=g).tolist()
            for mini in partition(drawn, 4, micro, 0, 0):
                assert all(len(p) * max(drawn[i] for i in p) <= rows * T + rows for p in mini)
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
    assert settled(model, lengths(400)) == 100
    assert seen == [(8, 50), (4, 50), (2, 50)]
    out = capsys.readouterr().out
    assert "micro_batch_tokens was 400, now 100" in out and "2 x 50 tokens" in out
    assert all(p.grad is None for p in model.parameters())
    assert settled(model, lengths(80)) == 80 and "was" not in capsys.readouterr().out
    # 1000 tokens where an update has but 4 rows: halved from what there can be
    assert settled(model, lengths(1000, in_update=4)) == 100
    out_of_memory_above(monkeypatch, 49, seen)
    with pytest.raises(UserError, match=r"one row, 50 tokens: lower --max_new_tokens"):
        worst_case(model, lengths(400))


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
    worst_case(model, lengths(100, rollout_rows=6, eval_new_tokens=90), "kept")
    assert shapes == [(3, 10), (6, 1)] and caches == [(6, 2, 128, 16)]  # 100 columns, aligned
    assert model.decode_setup.kept is None


def test_a_gpu_has_what_is_free_and_what_we_hold(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 10**9)
    assert plans.device_memory(torch.device("cuda", 0)) == 8 * 10**9


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_reports_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert memory.peak_memory() > 0.05


def test_rollouts_that_do_not_fit_name_their_settings(model_folders, monkeypatch):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(memory, "merged", full)
    with pytest.raises(UserError, match="--rollout_rows .* --rollout_weights=adapter"):
        worst_case(lora_model(model_folders["llama"]), lengths(100), "kept")


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def config(tiny_random):
    """A run of 32 rollouts a step on the untrained tiny world, with an eval every second step."""
    return run_config(tiny_random, "", steps=3, eval_every=2, eval_temperature=1.0)


@pytest.fixture
def small(config, tmp_path):
    return replace(config, out_dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The metrics of the uninterrupted run."""
    return comparable(train(replace(config, out_dir=str(tmp_path_factory.mktemp("whole") / "run"))))


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
    "owner,name,call,step,setting",
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
    small, whole, monkeypatch, owner, name, call, step, setting, capsys
):
    """The run ends at a step's boundary, whatever it was doing, and goes on as if nothing was."""
    with monkeypatch.context() as patch:
        fails_once(patch, owner, name, call)
        with pytest.raises(UserError) as error:
            train(small)
    message = str(error.value)
    assert setting in message and f"saved as of step {step}, --resume=True" in message
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
    line = {"merged": "a merged copy, ", "adapter": "base and adapter, as asked"}[saved]
    assert f"rollout weights: {line}" in capsys.readouterr().out


def test_freed_samples_what_kept_samples(small, monkeypatch):
    kept = train(replace(small, steps=2, out_dir=small.out_dir + "kept"))
    monkeypatch.setattr(plans.Plan, "choose", lambda self, wanted: ("freed", self.rows, "a test"))
    freed = train(replace(small, steps=2, out_dir=small.out_dir + "freed"))
    assert comparable(freed) == comparable(kept)
    monkeypatch.setattr(plans.Plan, "choose", lambda self, wanted: ("adapter", self.rows, "a test"))
    adapter = train(replace(small, steps=2, out_dir=small.out_dir + "adapter"))
    gaps = [[m["sampler_gap_max"] for m in history[1:]] for history in (kept, adapter)]
    assert gaps[0] != gaps[1]  # the setting does something: another rounding


def test_a_resumed_run_keeps_what_auto_chose(small, whole, monkeypatch, capsys):
    train(replace(small, steps=2))
    monkeypatch.setattr(plans, "device_memory", lambda device: 1)  # a busy device would say no
    assert comparable(train(replace(small, resume=True))) == whole
    assert "rollout_weights was" not in capsys.readouterr().out


def test_rollout_weights_that_cannot_act_warn():
    cfg = Config(lora_r=0, quant="none")
    assert check(cfg) == []
    for how in ("merged", "adapter"):
        (warning,) = check(replace(cfg, rollout_weights=how))
        assert f"rollout_weights={how} has no effect" in warning


# --------------------------------------------------------------------------------------- the scales


EIGHT_GB = ["--rollout_rows=32", "--micro_batch_tokens=2048"]


@pytest.mark.parametrize(
    "name,more,shape,choices",
    [
        ("qwen2.5_math_1.5b", EIGHT_GB, "qwen2.5-1.5b", [("kept", 32)] * 4),
        (
            "qwen2.5_math_1.5b",
            [],
            "qwen2.5-1.5b",
            [("freed", 48), ("freed", 128), ("kept", 128), ("kept", 128)],
        ),
        (
            "qwen2.5_math_1.5b_paper",
            [],
            "qwen2.5-1.5b",
            [("freed", 16), ("freed", 48), ("freed", 80), ("kept", 128)],
        ),
        # More rows by base and adapter beat a merged copy of 13 GB.
        (
            "qwen2.5_math_7b",
            [],
            "qwen2.5-7b",
            [None, ("adapter", 16), ("adapter", 64), ("adapter", 128)],
        ),
    ],
)
def test_what_auto_picks_on_8_12_16_and_24_gb(name, more, shape, choices):
    _, planned = memory_table.recipe(name, more, shape, 24e9)
    assert [memory_table.picks(planned, gb) for gb in memory_table.CARDS] == choices


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
