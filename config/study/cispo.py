"""CISPO (MiniMax-M1, arXiv 2506.13585): a cap scales gradients down but drops none.

Is there still a bias?"""

reward = "random(0.5)"
loss = "cispo"
cispo_cap = 5.0  # TRL's recommendation; an absolute ratio
