"""Qwen2.5-Math-7B on one 24 GB card: 16 prompts x 8 per step, 1024 new tokens."""

base = "qwen2.5_math_1.5b.py"
model = "Qwen/Qwen2.5-Math-7B"
micro_batch_tokens = 4096
rollout_rows = 128  # by base and adapter: more rows bring more than a merged copy, as computed
