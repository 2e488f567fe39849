"""One-shot RLVR (2504.20571): the true reward on one problem, duplicated to fill the batch."""

reward = "ground_truth"
one_shot = "pi_1"  # the wind on a sail; in the tiny world the first problem
