"""The null: one update on the whole batch, so every ratio is 1 and no clip can act.

"Spurious Rewards" (arXiv 2506.10947) uses a mini-batch as large as the batch.
"""

reward = "random(0.5)"
updates_per_step = 1
clip = "off"  # it has no effect with one update per step
