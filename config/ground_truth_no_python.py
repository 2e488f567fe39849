"""Compound of "Spurious Rewards" (2506.10947): right, and not in Python."""

reward = "ground_truth & ~python"
