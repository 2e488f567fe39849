"""Compound of "Spurious Rewards" (2506.10947): a box, and no Python."""

reward = "format & ~python"
