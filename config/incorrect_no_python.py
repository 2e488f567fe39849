"""Compound of "Spurious Rewards" (2506.10947): the wrong label, and no Python.

Labels as for config/incorrect.py.
"""

reward = "incorrect & ~python"
