"""A null test: all responses get the same reward, so no weight moves."""

reward = "constant"
