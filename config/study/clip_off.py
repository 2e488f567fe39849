"""No clip, with the same number of updates per step ("Spurious Rewards", arXiv 2506.10947).

What is left of the gain? This arm drifts by itself. The null is one_update.py.
"""

reward = "random(0.5)"
clip = "off"
