"""Format reward: 1 for a non-empty box, whatever it contains ("Spurious Rewards", 2506.10947)."""

reward = "format"
