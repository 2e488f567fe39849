"""The pull of the clip at the base policy: every step is undone, results are continued."""

import json

import numpy as np
import pytest
from conftest import run_config

from harness.errors import UserError
from tools.clip_pull import (
    KEPT,
    PullConfig,
    main,
    measure,
    per_clipped,
    read_results,
    summarize,
    text_of,
)


@pytest.mark.slow
def test_every_rate_starts_from_the_base_policy_and_results_go_on(tiny_random, tmp_path):
    settings = vars(run_config(tiny_random, str(tmp_path / "run"))) | {"max_new_tokens": 8}
    path = tmp_path / "pull.jsonl"
    cfg = PullConfig(**settings, rates=(3e-2, 1e-2, 3e-2 + 1e-9), batches=2, results=str(path))
    measure(cfg, path)
    rows = read_results(path, cfg)
    assert [(row["batch"], row["lr"]) for row in rows] == [
        (batch, lr) for batch in (1, 2) for lr in cfg.rates
    ]
    for row, again in ((rows[0], rows[2]), (rows[3], rows[5])):  # the same rate, nearly
        assert row["clip_frac_high"] == again["clip_frac_high"] > 0
        assert row["clip_pull_low"] == pytest.approx(again["clip_pull_low"], rel=1e-3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n")  # as if it had been stopped
    measure(cfg, path)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [json.loads(line) for line in lines]
    with pytest.raises(UserError, match="clip_low"):
        read_results(path, PullConfig(**(settings | {"clip_low": 0.1})))
    table = summarize(rows)
    assert [t["lr"] for t in table] == sorted(cfg.rates) and table[0]["batches"] == 2
    assert table[0]["clip_frac_high"] < table[1]["clip_frac_high"]


def test_pull_per_clipped_token():
    pull, share = np.array([0.02, 0.0, -0.01]), np.array([0.1, 0.0, 0.1])
    mean, half = per_clipped(pull, share)
    assert mean == pytest.approx(0.01 / 0.2) and 0.05 < half < 0.3
    assert per_clipped(pull, 0 * share) is None
    assert per_clipped(pull[:1], share[:1]) == (pytest.approx(0.2), None)


def test_a_single_batch_has_no_interval():
    """The fault: it was shown as 0, which excludes every effect."""
    row = {"batch": 1, "lr": 1e-3, "tokens": 5} | dict.fromkeys(KEPT, 0.5)
    (one,) = summarize([row])
    assert one["pull_high"] == (0.5, None) and one["per_clipped_low"] == (1.0, None)
    assert "±" not in text_of([one]) and "±" in text_of(summarize([row, row]))


@pytest.mark.parametrize(
    "args,word",
    [
        (["--results="], "--results"),
        (["--rates=-1"], "--rates"),
        (["--lr=1"], "lr has no effect"),
        (["--lr_schedule=linear"], "lr_schedule"),
        (["--warmup=0.5"], "warmup"),
        (["--loss=hoelder"], "hoelder_p_end"),
        (["--updates_per_step=1"], "updates_per_step"),
        (["--clip=off"], "clip=off"),
        (["--results={folder}"], "cannot be written"),
        (["--results={folder}/other.jsonl"], "other lines"),
    ],
)
def test_mistakes(tiny_random, tmp_path, args, word):
    """Schedules would give each batch another rate than the one in its line."""
    (tmp_path / "other.jsonl").write_text('{"batch": 1}\n')
    args = [arg.format(folder=tmp_path) for arg in args]
    if not args[0].startswith("--results"):
        args.append(f"--results={tmp_path}/new.jsonl")
    with pytest.raises(UserError, match=word):
        main([f"--model={tiny_random}", "config/model/tiny.py", *args])


def test_a_reward_that_reads_scores_is_computed_after_scoring(tiny_random, tmp_path):
    settings = vars(run_config(tiny_random, str(tmp_path / "run")))
    settings |= {"max_new_tokens": 4, "reward": "self_certainty"}
    path = tmp_path / "pull.jsonl"
    measure(PullConfig(**settings, rates=(1e-2,), batches=1, results=str(path)), path)
    assert len(path.read_text().splitlines()) == 1
