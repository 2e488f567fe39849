"""GSPO (arXiv 2507.18071): one clip per response. Does the bias need a clip per token?

The clip range is the paper's. A response's mean log-ratio is far nearer 0 than a token's.
"""

reward = "random(0.5)"
loss = "gspo"
clip_low = 3e-4
clip_high = 4e-4
loss_agg = "seq_mean"
