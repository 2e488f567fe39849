"""The null: one reward for all, so every advantage is 0 and no weight moves."""

reward = "constant"
