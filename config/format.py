"""Format reward: a non-empty box, whatever is in it ("Spurious Rewards", 2506.10947)."""

reward = "format"
