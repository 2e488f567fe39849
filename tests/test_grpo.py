"""grpo.py against hand-computed numbers, autograd, and TRL's loss on the same tensors."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import grpo


def example(seed=0, b=6, R=7, dtype=torch.float32, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(b, R, generator=g, dtype=dtype) * 3
    logp = (old + spread * torch.randn(b, R, generator=g, dtype=dtype)).requires_grad_()
    A = torch.randn(b, generator=g, dtype=dtype)
    length = torch.randint(1, R + 1, (b,), generator=g)
    mask = torch.arange(R) < length[:, None]
    return logp, old, A, mask


# -------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    r = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0])
    # group 1: mean .5, unbiased std sqrt(1/3); group 2: mean 1.5, std 1
    s = math.sqrt(1 / 3)
    expected = [0.5 / s, -0.5 / s, -0.5 / s, 0.5 / s, 1.5, -0.5, -0.5, -0.5]
    assert grpo.advantages(r, 4).tolist() == pytest.approx(expected, abs=1e-6)
    assert grpo.advantages(r, 4, "group_mean").tolist() == [
        0.5,
        -0.5,
        -0.5,
        0.5,
        1.5,
        -0.5,
        -0.5,
        -0.5,
    ]


@pytest.mark.parametrize("r", [0.1, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("norm", ["group", "group_mean"])
def test_flat_group_has_advantage_exactly_zero(r, norm):
    rewards = torch.full((5 * 7,), r)
    for precision in (rewards, torch.full((5 * 7,), r, dtype=torch.float64)):
        assert (grpo.advantages(precision, 7, norm) == 0).all()
    naive = rewards.view(5, 7)
    naive = (naive - naive.mean(1, keepdim=True)) / (naive.std(1, keepdim=True) + 1e-9)
    assert r != 0.1 or naive.abs().max() > 1  # the fault is real for at least this value


def test_groups_are_by_position_and_a_group_of_one_is_flat():
    r = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert grpo.advantages(r, 2, "group_mean").tolist() == [-0.5, 0.5, -3.5, 3.5]
    assert grpo.advantages(r, 1).tolist() == [0, 0, 0, 0]
    assert grpo.flat_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2).tolist() == [True, False]


# --------------------------------------------------------------------------------------------- loss


def test_policy_loss_by_hand():
    """Four tokens, one in each corner of (ratio above / below) x (A positive / negative)."""
    log = torch.log(torch.tensor([[1.5, 0.5], [1.5, 0.5]]))
    A = torch.tensor([2.0, -3.0])
    mask = torch.ones(2, 2, dtype=torch.bool)
    terms = {  # per token: R A, with the clipped ones replaced
        "off": [3.0, 1.0, -4.5, -1.5],
        "both": [2.4, 1.0, -4.5, -2.4],
        "high": [2.4, 1.0, -4.5, -1.5],
        "low": [3.0, 1.0, -4.5, -2.4],
    }
    counts = {"off": (0, 0), "both": (1, 1), "high": (0, 1), "low": (1, 0)}
    for clip, values in terms.items():
        loss, stats = grpo.policy_loss(log, torch.zeros(2, 2), A, mask, 4, clip)
        assert loss.item() == pytest.approx(-sum(values) / 4, abs=1e-6)
        assert (stats["clip_low"].item(), stats["clip_high"].item()) == counts[clip]
        assert stats["ratio"].item() == pytest.approx(4.0)
        assert stats["ratio_max"].item() == pytest.approx(1.5)


@pytest.mark.parametrize("clip", ["both", "high", "low", "off"])
def test_counted_tokens_are_those_without_gradient(clip):
    logp, old, A, mask = example(b=40, R=30)
    loss, stats = grpo.policy_loss(logp, old, A, mask, 1.0, clip)
    loss.backward()
    without = (logp.grad == 0) & mask
    assert without.sum() == stats["clip_low"] + stats["clip_high"]
    if clip == "off":
        ratio = (logp - old).exp().detach()
        assert torch.allclose(logp.grad, (-ratio * A[:, None]).masked_fill(~mask, 0.0))
    else:
        assert without.sum() > 0


@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean"])
def test_gradient_is_that_of_finite_differences(loss_agg):
    logp, old, A, mask = example(b=4, R=5, dtype=torch.float64)
    logp = (logp.detach() + 0.013).requires_grad_()  # away from the kinks
    f = lambda x: grpo.policy_loss(x, old, A, mask, 3.0, "both", 0.2, 0.28, loss_agg)[0]  # noqa: E731
    assert torch.autograd.gradcheck(f, logp)


@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean"])
def test_micro_batches_add_up_to_the_mini_batch(loss_agg):
    logp, old, A, mask = example(b=6, R=9, dtype=torch.float64)
    n = grpo.normalizer(mask, loss_agg)
    grpo.policy_loss(logp, old, A, mask, n, loss_agg=loss_agg)[0].backward()
    whole, logp.grad = logp.grad, None
    for rows in ([0], [1, 2, 3], [4, 5]):
        grpo.policy_loss(logp[rows], old[rows], A[rows], mask[rows], n, loss_agg=loss_agg)[
            0
        ].backward()
    assert torch.allclose(whole, logp.grad, rtol=1e-12, atol=0)


def test_aggregations_by_hand():
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert grpo.normalizer(mask, "token_mean") == 3 and grpo.normalizer(mask, "seq_mean") == 2
    assert grpo.aggregate(values, mask, "token_mean", 3).item() == pytest.approx(7 / 3)
    assert grpo.aggregate(values, mask, "seq_mean", 2).item() == pytest.approx((1.5 + 4) / 2)
    masked_row = torch.tensor([[True, True, False], [False, False, False]])
    assert grpo.normalizer(masked_row, "seq_mean") == 1  # a row out of the loss does not count


def test_padding_may_hold_anything():
    logp, old, A, mask = example()
    clean = grpo.policy_loss(logp, old, A, mask, 5.0)
    dirty = logp.detach().clone()
    dirty[~mask] = torch.tensor([float("inf"), float("nan"), -1e30]).repeat(99)[: (~mask).sum()]
    dirty.requires_grad_()
    loss, stats = grpo.policy_loss(dirty, old, A, mask, 5.0)
    loss.backward()
    assert loss.item() == clean[0].item() and stats["ratio_max"] == clean[1]["ratio_max"]
    assert torch.isfinite(dirty.grad).all() and (dirty.grad[~mask] == 0).all()


def test_on_policy_every_arm_has_the_plain_gradient():
    logp, _, A, mask = example()
    for clip in ("both", "high", "low", "off"):
        logp.grad = None
        loss, stats = grpo.policy_loss(logp, logp.detach(), A, mask, 1.0, clip)
        loss.backward()
        assert torch.equal(logp.grad, (-A[:, None]).expand_as(logp).masked_fill(~mask, 0.0))
        assert stats["clip_low"] == 0 and stats["clip_high"] == 0 and stats["ratio_max"] == 1


# ----------------------------------------------------------------------------------------------- KL


def test_kl_estimators_against_the_exact_divergence():
    """Averaged over the policy, k1 and k3 are KL(p || q); scipy has the exact value."""
    entropy = pytest.importorskip("scipy.stats").entropy
    g = torch.Generator().manual_seed(3)
    p, q = (torch.randn(11, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = entropy(p.exp().numpy(), q.exp().numpy())
    for kind in ("k1", "k3"):
        assert (p.exp() * grpo.kl(p, q, kind)).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (grpo.kl(p, q, "k3") >= 0).all()
    assert grpo.kl(p, q, "k2")[3].item() == pytest.approx((p[3] - q[3]).item() ** 2 / 2)


def test_kl_gradients_are_what_the_docstring_says():
    """On-policy expectation over tokens of the gradient on the logits, by exact enumeration."""
    g = torch.Generator().manual_seed(4)
    z = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    q = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)

    def gradient(term):
        p = z.log_softmax(0)
        return torch.autograd.grad(term(p), z)[0]

    expected = {kind: gradient(lambda p, k=kind: (p.detach().exp() * grpo.kl(p, q, k)).sum())
                for kind in ("k1", "k2", "k3")}  # fmt: skip
    reverse = gradient(lambda p: (p.exp() * (p - q)).sum())
    forward = gradient(lambda p: (q.exp() * (q - p)).sum())
    assert expected["k1"].abs().max() < 1e-12
    assert torch.allclose(expected["k2"], reverse) and torch.allclose(expected["k3"], forward)
    assert not torch.allclose(reverse, forward, rtol=1e-2)


# ---------------------------------------------------------------------------------------------- TRL


@pytest.mark.parametrize("loss_type,loss_agg", [("dapo", "token_mean"), ("grpo", "seq_mean")])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_equals_trl(loss_type, loss_agg, beta):
    """TRL's GRPOTrainer._compute_loss on the same tensors, its model replaced by our logp."""
    trl = pytest.importorskip("trl")
    logp, old, A, mask = example(seed=5, b=8, R=10)
    ref = old + 0.1
    trainer = SimpleNamespace(  # what _compute_loss reads of a GRPOTrainer
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
    )
    inputs = {
        "prompt_ids": torch.ones(8, 2, dtype=torch.long),
        "prompt_mask": torch.ones(8, 2, dtype=torch.long),
        "completion_ids": torch.ones(8, 10, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": A,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    (theirs_grad,) = torch.autograd.grad(theirs, logp)
    n = grpo.normalizer(mask, loss_agg)
    ours, stats = grpo.policy_loss(logp, old, A, mask, n, loss_agg=loss_agg)
    ours = ours + beta * grpo.aggregate(grpo.kl(logp, ref), mask, loss_agg, n)
    (ours_grad,) = torch.autograd.grad(ours, logp)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(ours_grad, theirs_grad, rtol=1e-5, atol=1e-8)
    assert stats["clip_low"] + stats["clip_high"] > 0
    for side in ("low", "high"):
        share = trainer._metrics["train"][f"clip_ratio/{side}_mean"][0]
        assert (stats[f"clip_{side}"] / stats["tokens"]).item() == pytest.approx(share, abs=1e-6)
