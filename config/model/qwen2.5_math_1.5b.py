"""Qwen2.5-Math-1.5B overnight on one 24 GB card: 16 prompts x 8 per step, 1024 new tokens."""

model = "Qwen/Qwen2.5-Math-1.5B"
quant = "nf4"
lora_r = 32
lora_alpha = 64
train_data = "deepscaler"
eval_data = "math500"
prompt = "qwen_math"
max_prompt_tokens = 512
max_new_tokens = 1024
steps = 150
prompts_per_step = 16
group_size = 8
micro_batch_tokens = 8192
rollout_rows = 128
lr = 1e-5  # check it by the clip fraction: docs/TRAINING.md, "Learning rate"
eval_every = 50
eval_n = 200
save_every = 10
