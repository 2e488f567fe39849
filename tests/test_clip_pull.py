"""The pull of the clip at the base policy: every step is undone, results are continued."""

import json

import numpy as np
import pytest
from conftest import run_config

from harness.errors import UserError
from tools.clip_pull import PullConfig, measure, per_clipped, read_results, summarize


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
