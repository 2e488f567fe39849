"""HoelderPO (arXiv 2605.12058): a power mean of a response's ratios, p from 2 to -2 over the run.

Clip range and mean over responses are those of the released code. The mean of a response moves less
than the ratio of one token. Watch clip_frac_low and clip_frac_high, and lower the range if nothing
is clipped.
"""

reward = "random(0.5)"
loss = "hoelder"
hoelder_p = 2.0
hoelder_p_end = -2.0
clip_low = 0.2
clip_high = 0.2
loss_agg = "seq_mean"
