"""Advantages whitened over the batch's tokens, as the released code of "Spurious Rewards" does and
its paper (arXiv 2506.10947) does not say. Most visible with rare rewards: --reward="random(0.001)".
"""

reward = "random(0.5)"
whiten = True
