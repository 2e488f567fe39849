"""Compound of "Spurious Rewards" (2506.10947): 1 for a box without Python."""

reward = "format & ~python"
