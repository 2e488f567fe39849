"""EM-RL-token (2505.15134): minus the summed entropy of the response's tokens."""

reward = "neg_entropy(sum)"
