"""CISPO (MiniMax-M1, arXiv 2506.13585): a cap scales gradients and drops none. Is there a bias?"""

reward = "random(0.5)"
loss = "cispo"
cispo_cap = 5.0  # TRL's recommendation; an absolute ratio
