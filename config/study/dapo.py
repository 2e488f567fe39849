"""DAPO's loss (arXiv 2503.14476): token mean and clip-higher (its dynamic sampling and length
penalty are not here). The same as clip_higher, whose token mean is the default, spelt out.
"""

reward = "random(0.5)"
loss_agg = "token_mean"
clip_low = 0.2
clip_high = 0.28
