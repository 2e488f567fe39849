"""The tiny world (tasks/tiny.py): minutes on two cores, no download. 128 rollouts per step."""

model = "tiny"
quant = "none"
device = "cpu"
dtype = "float32"
lora_r = 8
lora_alpha = 16
gradient_checkpointing = False
train_data = "tiny"
eval_data = "tiny"
prompt = "none"
max_prompt_tokens = 32
max_new_tokens = 56
steps = 40
prompts_per_step = 16
group_size = 8
micro_batch_tokens = 2048  # small: rows of similar length together, less padding
rollout_rows = 1024
lr = 5e-4
eval_every = 20
eval_n = 200
eval_k = 4
eval_temperature = 1.0  # greedy decoding would always pick code
save_every = 20
