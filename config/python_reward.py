"""Python reward: 1 if the response contains the word "python" ("Spurious Rewards", 2506.10947)."""

reward = "python"
