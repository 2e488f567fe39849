"""Advantages whitened over the tokens of the batch.

The released code of "Spurious Rewards" does this; its paper (arXiv 2506.10947) does not say so. The
effect is largest with rare rewards: --reward="random(0.001)".
"""

reward = "random(0.5)"
whiten = True
