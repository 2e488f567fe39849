"""Qwen2.5-Math-1.5B with the papers' batch and lengths: 64 prompts x 16, 1024 + 3072 tokens."""

base = "qwen2.5_math_1.5b.py"
max_prompt_tokens = 1024
max_new_tokens = 3072
steps = 300
prompts_per_step = 64
group_size = 16
eval_n = 0  # all of MATH-500
