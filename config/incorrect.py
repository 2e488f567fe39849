"""Incorrect labels ("Spurious Rewards", 2506.10947): the reward is 1 for a wrong majority label.

Only problems whose majority label is wrong are used. Make labels as for config/majority.py. In the
tiny world most of these problems are among the harder ones: --train_data=tiny_hard.
"""

reward = "incorrect"
