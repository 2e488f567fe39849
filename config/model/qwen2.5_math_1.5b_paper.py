"""Qwen2.5-Math-1.5B with the papers' batch and lengths: 64 prompts x 16, 1024 + 3072 tokens."""

model = "Qwen/Qwen2.5-Math-1.5B"
quant = "nf4"
lora_r = 32
lora_alpha = 64
train_data = "deepscaler"
eval_data = "math500"
prompt = "qwen_math"
max_prompt_tokens = 1024
max_new_tokens = 3072
steps = 300
prompts_per_step = 64
group_size = 16
micro_batch_tokens = 8192
rollout_rows = 128
lr = 1e-5
eval_every = 50
save_every = 10
