"""Clip-higher, as in DAPO (arXiv 2503.14476): .2 below, .28 above. Does it hold the entropy?

DAPO's token mean is our default. Its dynamic sampling and its length penalty are not here.
"""

reward = "random(0.5)"
clip_high = 0.28
