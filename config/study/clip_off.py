"""Clipping bias: no clip, but as many updates a step. What is left of the gain ("Spurious Rewards",
arXiv 2506.10947)? This arm drifts by itself: the null is one_update.
"""

reward = "random(0.5)"
clip = "off"
