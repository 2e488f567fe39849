"""grpo.py against hand-computed numbers, autograd, and TRL's loss on the same tensors."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import grpo

AGGREGATIONS = ("token_mean", "seq_mean", "constant")
ARMS = [  # each loss with a clip, or a cap, that acts on example()
    dict(loss="grpo", clip_low=0.2, clip_high=0.28),
    dict(loss="gspo", clip_low=0.05, clip_high=0.1),
    dict(loss="cispo", cispo_cap=1.3),
    *(dict(loss="hoelder", hoelder_p=p, clip_low=0.05, clip_high=0.1) for p in (2.0, 0.3, -2.0)),
]


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
    centred = [0.5, -0.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5]
    assert grpo.advantages(r, 4, "group_mean").tolist() == centred
    # 1 - mean(0, 0, 1) = 2/3 and so on; of 3, 1, 1, 1: 3 - 1 = 2 and 1 - 5/3
    others = [2 / 3, -2 / 3, -2 / 3, 2 / 3, 2, -2 / 3, -2 / 3, -2 / 3]
    assert grpo.advantages(r, 4, "leave_one_out").tolist() == pytest.approx(others, abs=1e-6)
    assert grpo.advantages(r, 4, "raw").tolist() == r.tolist()


@pytest.mark.parametrize("r", [0.1, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("norm", ["group", "group_mean", "leave_one_out"])
def test_flat_group_has_advantage_exactly_zero(r, norm):
    rewards = torch.full((5 * 7,), r)
    for precision in (rewards, torch.full((5 * 7,), r, dtype=torch.float64)):
        A = grpo.advantages(precision, 7, norm)
        assert (A == 0).all() and (grpo.whiten(A, torch.arange(35)) == 0).all()
    assert (grpo.advantages(rewards, 7, "raw") == rewards).all()
    naive = rewards.view(5, 7)
    naive = (naive - naive.mean(1, keepdim=True)) / (naive.std(1, keepdim=True) + 1e-9)
    assert r != 0.1 or naive.abs().max() > 1  # the fault is real for at least this value


def test_groups_are_by_position_and_a_group_of_one_is_flat():
    r = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert grpo.advantages(r, 2, "group_mean").tolist() == [-0.5, 0.5, -3.5, 3.5]
    assert grpo.advantages(r, 1).tolist() == [0, 0, 0, 0]
    assert grpo.flat_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2).tolist() == [True, False]


def test_whitened_advantages_by_hand():
    A, tokens = torch.tensor([1.0, -1.0, 7.0]), torch.tensor([3, 1, 0])  # 1 1 1 -1; the 7 is masked
    # mean .5, biased variance 1 - .25; the unbiased one would give .5
    assert grpo.whiten(A, tokens)[:2].tolist() == pytest.approx([0.5 / 0.75**0.5, -(3**0.5)])
    expanded = A.repeat_interleave(tokens).numpy()
    exact = (expanded - expanded.mean()) / expanded.std()
    ours = grpo.whiten(A, tokens).repeat_interleave(tokens)
    assert ours.tolist() == pytest.approx(exact.tolist())
    assert grpo.whiten(A, torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]
    assert grpo.whiten(torch.full((3,), 0.1), tokens).tolist() == [0, 0, 0]  # raw, one value


def test_whitening_lifts_one_rare_reward_from_4_to_31():
    """64 prompts x 16, a single 1: (1 - 1/16) / (1/4) = 3.75, over sqrt(15 / 1024) = 30.98."""
    rewards = torch.zeros(64 * 16)
    rewards[100] = 1
    A = grpo.advantages(rewards, 16)
    assert A.max().item() == pytest.approx(3.75, rel=1e-6) and A.abs().max() == A[100]
    white = grpo.whiten(A, torch.full((1024,), 300))
    assert white[100].item() == pytest.approx(3.75 * (1024 / 15) ** 0.5, rel=1e-6)
    assert white[0].abs() < 1e-6  # equal lengths: the mean is 0, flat groups stay


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


def test_sequence_ratios_by_hand():
    """Two responses, of two and of one token; the sequence ratio stands at each of their tokens."""
    log = torch.log(torch.tensor([[1.5, 0.9], [0.5, 7.0]]))
    mask = torch.tensor([[True, True], [True, False]])
    A = torch.tensor([2.0, -3.0])
    first = {
        "gspo": (1.5 * 0.9) ** 0.5,
        2.0: ((2.25 + 0.81) / 2) ** 0.5,
        1.0: 1.2,
        -1.0: 2 / (1 / 1.5 + 1 / 0.9),
    }
    for p, rho in first.items():
        arm = dict(loss="gspo") if p == "gspo" else dict(loss="hoelder", hoelder_p=p)
        run = lambda clip, agg, n, arm=arm: grpo.policy_loss(  # noqa: E731
            log, torch.zeros(2, 2), A, mask, n, clip, 0.3, 0.15, agg, **arm
        )
        loss, stats = run("off", "token_mean", 3)
        assert loss.item() == pytest.approx(-(2 * 2 * rho - 3 * 0.5) / 3, rel=1e-6)
        assert stats["ratio"].item() == pytest.approx(2 * rho + 0.5)
        assert stats["ratio_max"].item() == pytest.approx(rho)
        assert (stats["clip_low"], stats["clip_high"]) == (0, 0)
        loss, stats = run("both", "seq_mean", 2)
        high = min(rho, 1.15)
        assert loss.item() == pytest.approx(-(2 * high - 3 * 0.7) / 2, rel=1e-6)
        # every token of a clipped response counts
        assert (stats["clip_low"], stats["clip_high"]) == (1, 2 * (rho > 1.15))
        assert run("low", "seq_mean", 2)[0].item() == pytest.approx(-(2 * rho - 2.1) / 2, rel=1e-6)
        assert run("high", "constant", 8)[0].item() == pytest.approx(-(4 * high - 1.5) / 8)


def test_cispo_by_hand():
    logp = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    old = logp.detach() - torch.log(torch.tensor([[3.0, 0.5], [4.0, 1.0]]))
    mask = torch.tensor([[True, True], [True, False]])
    A = torch.tensor([2.0, -1.0])
    loss, stats = grpo.policy_loss(logp, old, A, mask, 3, loss="cispo", cispo_cap=2.0)
    assert loss.item() == pytest.approx(-(2 * 2 * -1 + 0.5 * 2 * -2 + 2 * -1 * -0.5) / 3)
    loss.backward()
    assert (logp.grad * -3).flatten().tolist() == pytest.approx([4.0, 1.0, -2.0, 0.0])
    assert (stats["clip_low"], stats["clip_high"]) == (0, 2)  # beyond the cap, both signs of A


def test_power_means():
    log_ratio = example()[0].detach().double() * 0.7
    mask = example()[3]
    gspo = torch.stack([row[m].mean().exp() for row, m in zip(log_ratio, mask, strict=True)])
    for p in (2.0, 1.0, 1e-4, -2.0):
        rho, share = grpo.sequence_ratio(log_ratio.masked_fill(~mask, 0.0), mask, p)
        exact = [
            ((p * row[m]).exp().mean() ** (1 / p)).item()
            for row, m in zip(log_ratio, mask, strict=True)
        ]
        assert rho[:, 0].tolist() == pytest.approx(exact, rel=1e-10)
        assert share.sum(1).tolist() == pytest.approx(mask.sum(1).tolist())
    masked = log_ratio.masked_fill(~mask, 0.0)
    assert torch.equal(grpo.sequence_ratio(masked, mask, 0.0)[0][:, 0], gspo)
    previous = math.inf
    for p in (1e-2, 1e-4, 2e-6, 1e-6, 1e-8, 1e-12):  # continuous across the threshold, both sides
        gap = max(
            (grpo.sequence_ratio(masked, mask, q)[0][:, 0] - gspo).abs().max() for q in (p, -p)
        )
        assert gap <= previous and gap < 2 * p
        previous = gap
    big = torch.tensor([[60.0, 0.0]])  # exp(2 * 60) is no float32
    rho, _ = grpo.sequence_ratio(big, torch.ones(1, 2, dtype=torch.bool), 2.0)
    assert rho[0, 0].log().item() == pytest.approx(60 - math.log(2) / 2)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm['loss']}{arm.get('hoelder_p', '')}")
def test_rows_and_columns_out_of_the_loss_are_harmless(arm):
    logp, old, A, mask = example()
    mask[2] = False
    dirty = logp.detach().clone()
    dirty[~mask] = torch.tensor([float("inf"), float("nan"), -1e30]).repeat(99)[: (~mask).sum()]
    results = []
    for x in (logp, dirty.requires_grad_()):
        alignment = torch.full_like(old, 0.3)
        loss, stats = grpo.policy_loss(x, old, A, mask, 5.0, alignment=alignment, **arm)
        loss.backward()
        results.append([loss.detach(), x.grad, *stats.values()])
        assert torch.isfinite(x.grad).all() and (x.grad[~mask] == 0).all()
        assert stats["clip_low"] + stats["clip_high"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("loss", ["gspo", "hoelder"])
@pytest.mark.parametrize("clip", ["both", "high", "low", "off"])
def test_a_clipped_response_has_no_gradient_at_all(loss, clip):
    logp, old, A, mask = example(b=40, R=30)
    out, stats = grpo.policy_loss(logp, old, A, mask, 1.0, clip, 0.05, 0.05, loss=loss)
    out.backward()
    lost = (logp.grad == 0) & mask
    assert lost.sum() == stats["clip_low"] + stats["clip_high"]
    assert torch.equal(lost.any(1), (lost | ~mask).all(1))
    assert (lost.sum() == 0) == (clip == "off")


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


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm['loss']}{arm.get('hoelder_p', '')}")
def test_gradient_is_that_of_finite_differences(arm, loss_agg):
    logp, old, A, mask = example(b=4, R=5, dtype=torch.float64)
    logp = (logp.detach() + 0.013).requires_grad_()  # away from the kinks
    f = lambda x: grpo.policy_loss(x, old, A, mask, 3.0, loss_agg=loss_agg, **arm)[0]  # noqa: E731
    if arm["loss"] != "cispo":
        assert torch.autograd.gradcheck(f, logp)
        return
    # No finite difference sees the stopped gradient: it is that of a weighted log-likelihood.
    weight = (logp.detach() - old).exp().clamp(max=arm["cispo_cap"]) * A[:, None]
    expected = -grpo.aggregate(weight * logp, mask, loss_agg, 3.0)
    a, b = (torch.autograd.grad(value, logp)[0] for value in (f(logp), expected))
    assert torch.allclose(a, b, rtol=1e-12, atol=0) and a.abs().max() > 0


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm['loss']}{arm.get('hoelder_p', '')}")
def test_micro_batches_add_up_to_the_mini_batch(arm, loss_agg):
    logp, old, A, mask = example(b=6, R=9, dtype=torch.float64)
    mask[4] = False
    n = grpo.normalizer(mask, loss_agg, 20)
    whole_stats = grpo.policy_loss(logp, old, A, mask, n, loss_agg=loss_agg, **arm)
    whole_stats[0].backward()
    whole, logp.grad = logp.grad, None
    counts = 0
    for rows in ([0], [1, 2, 3], [4, 5]):
        R = int(mask[rows].sum(1).max())  # as training cuts them
        part = (x[rows, :R] for x in (logp, old))
        loss, stats = grpo.policy_loss(*part, A[rows], mask[rows, :R], n, loss_agg=loss_agg, **arm)
        loss.backward()
        counts += stats["clip_high_bins"]
    assert torch.allclose(whole, logp.grad, rtol=1e-12, atol=0) and whole.abs().max() > 0
    assert torch.equal(counts, whole_stats[1]["clip_high_bins"])


def test_aggregations_by_hand():
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert grpo.normalizer(mask, "token_mean") == 3 and grpo.normalizer(mask, "seq_mean") == 2
    assert grpo.aggregate(values, mask, "token_mean", 3).item() == pytest.approx(7 / 3)
    assert grpo.aggregate(values, mask, "seq_mean", 2).item() == pytest.approx((1.5 + 4) / 2)
    masked_row = torch.tensor([[True, True, False], [False, False, False]])
    assert grpo.normalizer(masked_row, "seq_mean") == 1  # a row out of the loss does not count
    assert grpo.normalizer(masked_row, "constant", 8) == 16  # but to Dr. GRPO's constant
    assert grpo.aggregate(values, mask, "constant", 16).item() == pytest.approx(7 / 16)


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_on_policy_every_arm_has_the_plain_gradient(loss_agg):
    """With one update a step no arm differs, at equal aggregation."""
    logp, _, A, mask = example()
    n = grpo.normalizer(mask, loss_agg, 20)
    arms = [*ARMS, *({"clip": clip} for clip in ("both", "high", "low", "off"))]
    plain = torch.autograd.grad(-grpo.aggregate(A[:, None] * logp, mask, loss_agg, n), logp)[0]
    for arm in arms:
        loss, stats = grpo.policy_loss(logp, logp.detach(), A, mask, n, loss_agg=loss_agg, **arm)
        (grad,) = torch.autograd.grad(loss, logp)
        assert torch.allclose(grad, plain, rtol=1e-6, atol=0)
        assert arm.get("loss", "grpo") != "grpo" or torch.equal(grad, plain)
        assert stats["clip_low"] == 0 and stats["clip_high"] == 0 and stats["ratio_max"] == 1


# ------------------------------------------------------------------------------ what the clip does


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm['loss']}{arm.get('hoelder_p', '')}")
def test_pull_is_what_the_clip_adds_to_the_likeliest_token(arm):
    """On a table of logits: the ascent direction with the clip less that without, along
    grad log pi(top) of each context, both by autograd."""
    g = torch.Generator().manual_seed(7)
    b, R, V = 32, 9, 5
    mask = torch.arange(R) < torch.randint(1, R + 1, (b, 1), generator=g)
    A = torch.tensor([-2.0, 1.5] * 16, dtype=torch.float64)
    old = torch.randn(b, R, V, generator=g, dtype=torch.float64) * 1.5
    y = torch.multinomial(old.softmax(-1).view(-1, V), 1, generator=g).view(b, R)
    at = torch.nn.functional.one_hot(y, V)
    moved = torch.randn(b, 1, 1, generator=g) * at  # whole responses up or down, and noise
    z = (
        old + moved + 0.4 * torch.randn(b, R, V, generator=g, dtype=torch.float64)
    ).requires_grad_()
    at_y = lambda logits: logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]  # noqa: E731
    pi = z.detach().softmax(-1)
    top = torch.nn.functional.one_hot(pi.argmax(-1), V) - pi  # grad log pi(top), [b, R, V]
    alignment = ((at - pi) * top).sum(-1)

    def run(clip, **changes):
        loss, stats = grpo.policy_loss(
            at_y(z), at_y(old), A, mask, 1.0, clip, alignment=alignment, **(arm | changes)
        )
        return -torch.autograd.grad(loss, z)[0], stats

    if arm["loss"] == "cispo":
        sides = {"high": (run("both")[0], run("both", cispo_cap=math.inf)[0])}
    else:
        sides = {side: (run(side)[0], run("off")[0]) for side in ("high", "low")}
    stats = run("both")[1]
    for side, (ascent, unclipped) in sides.items():
        expected = ((ascent - unclipped) * top).sum().item()
        assert abs(expected) > 1e-3
        assert stats[f"clip_pull_{side}"].item() == pytest.approx(expected, rel=1e-9)
    if arm["loss"] == "cispo":
        assert stats["clip_pull_low"] == 0


def test_pull_has_the_sign_of_the_paper():
    """A rare token clipped from above would have taken from the likeliest one: the clip helps."""
    pi = torch.tensor([0.7, 0.2, 0.1])
    logp = pi[torch.tensor([[2], [0]])].log()  # the rare token, then the likeliest itself
    old, A, mask = logp - math.log(1.5), torch.ones(2), torch.ones(2, 1, dtype=torch.bool)
    alignment = (torch.tensor([[0.0], [1.0]]) - 0.7 - logp.exp()) + (pi * pi).sum()
    for row, pull in ((0, -1.5 * (-0.7 - 0.1 + 0.54)), (1, -1.5 * (1 - 1.4 + 0.54))):
        rows = [row]
        _, stats = grpo.policy_loss(
            logp[rows], old[rows], A[rows], mask[rows], 1.0, alignment=alignment[rows]
        )
        assert stats["clip_pull_high"].item() == pytest.approx(pull, rel=1e-5)
    assert "clip_pull_high" not in grpo.policy_loss(logp, old, A, mask, 1.0)[1]


def test_bins_by_hand():
    """By old probability, edges at twelfths: 10/12 is 1 / 1.2, above which none can be clipped."""
    old = torch.tensor([[0.02, 0.8, 0.85, 1.0], [0.5, 0.82, 0.01, 0.3]]).log()
    ratio = torch.tensor([[1.5, 1.25, 1.17, 1.0], [0.5, 0.7, 0.9, 9.0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    A = torch.tensor([1.0, -1.0])
    _, stats = grpo.policy_loss(old + ratio.log(), old, A, mask, 1.0)
    count = lambda **at: [at.get(f"b{i}", 0) for i in range(12)]  # noqa: E731
    assert stats["prob_bins"].tolist() == count(b0=2, b9=2, b10=1, b11=1, b6=1)
    assert stats["clip_high_bins"].tolist() == count(b0=1, b9=1)
    assert stats["clip_low_bins"].tolist() == count(b6=1, b9=1)
    _, stats = grpo.policy_loss(old + ratio.log(), old, A, mask, 1.0, loss="gspo")
    assert stats["clip_high_bins"].tolist() == count(b0=1, b9=1, b10=1, b11=1)  # s = 1.22
    assert stats["clip_low_bins"].tolist() == count(b6=1, b9=1, b0=1)  # s = .68


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

    expected = {
        kind: gradient(lambda p, k=kind: (p.detach().exp() * grpo.kl(p, q, k)).sum())
        for kind in ("k1", "k2", "k3")
    }
    reverse = gradient(lambda p: (p.exp() * (p - q)).sum())
    forward = gradient(lambda p: (q.exp() * (q - p)).sum())
    assert expected["k1"].abs().max() < 1e-12
    assert torch.allclose(expected["k2"], reverse) and torch.allclose(expected["k3"], forward)
    assert not torch.allclose(reverse, forward, rtol=1e-2)


# ---------------------------------------------------------------------------------------------- TRL


@pytest.mark.parametrize(
    "loss_type,arm",
    [
        ("dapo", dict(loss_agg="token_mean", clip_high=0.28)),
        ("bnpo", dict(loss_agg="token_mean")),
        ("grpo", dict(loss_agg="seq_mean")),
        ("dr_grpo", dict(loss_agg="constant")),
        ("cispo", dict(loss="cispo", loss_agg="token_mean", cispo_cap=1.3)),
        ("grpo", dict(loss="gspo", loss_agg="seq_mean", clip_low=0.05, clip_high=0.1)),
    ],
    ids=["dapo", "bnpo", "grpo", "dr_grpo", "cispo", "gspo"],
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_equals_trl(loss_type, arm, beta):
    """TRL's GRPOTrainer._compute_loss on the same tensors, its model replaced by our logp."""
    trl = pytest.importorskip("trl")
    logp, old, A, mask = example(seed=5, b=8, R=10)
    ref = old + 0.1
    trainer = SimpleNamespace(  # what _compute_loss reads of a GRPOTrainer
        loss_type=loss_type,
        beta=beta,
        epsilon_low=arm.get("clip_low", 0.2),
        epsilon_high=arm.get("cispo_cap", arm.get("clip_high", 0.2)),
        importance_sampling_level="sequence" if arm.get("loss") == "gspo" else "token",
        max_completion_length=16,
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
    loss_agg = arm["loss_agg"]
    n = grpo.normalizer(mask, loss_agg, 16)
    ours, stats = grpo.policy_loss(logp, old, A, mask, n, **arm)
    ours = ours + beta * grpo.aggregate(grpo.kl(logp, ref), mask, loss_agg, n)
    (ours_grad,) = torch.autograd.grad(ours, logp)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(ours_grad, theirs_grad, rtol=1e-5, atol=1e-8)
    assert stats["clip_low"] + stats["clip_high"] > 0
    if "loss" in arm:
        return  # TRL counts responses, and of CISPO's tokens only those with A > 0
    for side in ("low", "high"):
        share = trainer._metrics["train"][f"clip_ratio/{side}_mean"][0]
        assert (stats[f"clip_{side}"] / stats["tokens"]).item() == pytest.approx(share, abs=1e-6)
