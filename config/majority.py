"""Majority reward ("Spurious Rewards"): 1 if the last box equals the base model's majority answer.

Make labels once before training: python eval.py --labels=labels.jsonl --model=... --data=... Then
train with --train_data=labels.jsonl. The tiny world makes its own labels.
"""

reward = "majority"
