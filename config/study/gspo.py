"""GSPO (arXiv 2507.18071): does the bias need a clip of tokens, or does one of responses do?

Its clip range is the paper's: a response's mean log-ratio is far nearer 0 than a token's.
"""

reward = "random(0.5)"
loss = "gspo"
clip_low = 3e-4
clip_high = 4e-4
loss_agg = "seq_mean"
