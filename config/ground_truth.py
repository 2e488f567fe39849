"""The true reward: the last boxed answer equals the gold one."""

reward = "ground_truth"
