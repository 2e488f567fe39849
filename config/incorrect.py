"""Incorrect labels: only problems whose majority label is wrong, and that label is rewarded
("Spurious Rewards", 2506.10947). Labels as for config/majority.py; on the tiny world the harder
slice has most of them: --train_data=tiny_hard.
"""

reward = "incorrect"
