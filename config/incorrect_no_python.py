"""Compound of "Spurious Rewards" (2506.10947): 1 for the wrong label without Python.

Make labels as for config/incorrect.py.
"""

reward = "incorrect & ~python"
