"""Random rewards: a fair coin a response, whatever it says ("Spurious Rewards", 2506.10947)."""

reward = "random(0.5)"
