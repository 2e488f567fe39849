"""Dr. GRPO (arXiv 2503.20783): no division by std or by length. Does the bias need either?"""

reward = "random(0.5)"
adv_norm = "group_mean"
loss_agg = "constant"
