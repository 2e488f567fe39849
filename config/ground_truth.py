"""The true reward: 1 if the last boxed answer equals the gold answer."""

reward = "ground_truth"
