"""Clipping bias: no clip by a small batch. One update a step on 8 prompts, as many responses as a
mini-batch of the other arms has: 128 at the papers' 16 a prompt ("Spurious Rewards", arXiv
2506.10947). At a scale with other sizes, say --prompts_per_step, an eighth of the scale's.
"""

reward = "random(0.5)"
prompts_per_step = 8
updates_per_step = 1
clip = "off"  # it could not act
