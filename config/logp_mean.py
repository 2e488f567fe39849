"""EM-RL-sequence per token (2505.15134): the mean log-probability of the response's tokens."""

reward = "logp(mean)"
