"""Qwen2.5-Math-7B on one 24 GB card: 16 prompts x 8 per step, 1024 new tokens."""

base = "qwen2.5_math_1.5b.py"
model = "Qwen/Qwen2.5-Math-7B"
micro_batch_tokens = 4096
rollout_rows = 32  # leaves room for merged rollout weights, by the plan printed at the start
