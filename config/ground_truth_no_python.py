"""Compound of "Spurious Rewards" (2506.10947): 1 for a right answer without Python."""

reward = "ground_truth & ~python"
