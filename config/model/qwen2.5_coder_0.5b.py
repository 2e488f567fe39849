"""Qwen2.5-Coder-0.5B-Instruct on a laptop: real code habits, 4 prompts x 8 per step on the CPU.

The prompt shows two worked examples. With it the model solves about a third of SVAMP in some 16
tokens per response, so a true reward has something to teach (docs/LOG.md).
"""

model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
quant = "none"
device = "cpu"
lora_r = 16
lora_alpha = 32
gradient_checkpointing = False
train_data = "svamp"
eval_data = "svamp"
prompt = "few_shot"
max_prompt_tokens = 256
max_new_tokens = 64
steps = 30
prompts_per_step = 4
group_size = 8
updates_per_step = 4
micro_batch_tokens = 2048
rollout_rows = 64
lr = 1e-4
eval_every = 30
eval_n = 200
base_every = 10
save_every = 10
