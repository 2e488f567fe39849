"""HoelderPO (arXiv 2605.12058): a power mean of a response's ratios, p from 2 to -2 over the run.

Clip range and mean over responses are those of its released code. The mean moves less than one
token's ratio: watch clip_frac_low and clip_frac_high, lower the range where nothing is clipped.
"""

reward = "random(0.5)"
loss = "hoelder"
hoelder_p = 2.0
hoelder_p_end = -2.0
clip_low = 0.2
clip_high = 0.2
loss_agg = "seq_mean"
