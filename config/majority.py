"""Majority reward: the last box equals the base model's majority answer ("Spurious Rewards").

Labels are made once, before training: python eval.py --labels=labels.jsonl --model=... --data=...,
then --train_data=labels.jsonl here. The tiny world makes its own.
"""

reward = "majority"
