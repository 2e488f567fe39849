"""GSPO (arXiv 2507.18071): one clip per response. Does the bias need a clip per token?

The clip range is the paper's. The mean log-ratio of a response is far nearer 0 than that of a token.
"""

reward = "random(0.5)"
loss = "gspo"
clip_low = 3e-4
clip_high = 4e-4
loss_agg = "seq_mean"
