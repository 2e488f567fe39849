"""No clip because of a small batch ("Spurious Rewards", arXiv 2506.10947).

One update per step on 8 prompts. With the papers' 16 responses per prompt that is 128 responses, as
many as a mini-batch of the other arms has. At another scale, set --prompts_per_step to an eighth of
that scale's.
"""

reward = "random(0.5)"
prompts_per_step = 8
updates_per_step = 1
clip = "off"  # it has no effect with one update per step
