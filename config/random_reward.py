"""Random rewards: one fair coin flip per response ("Spurious Rewards", 2506.10947)."""

reward = "random(0.5)"
