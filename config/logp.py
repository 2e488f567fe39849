"""EM-RL-sequence (2505.15134): the log-probability of the whole response."""

reward = "logp(sum)"
