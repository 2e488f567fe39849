"""Which way does the clip pull at a real model's base policy? For python -m tools.clip_pull."""

reward = "random(0.5)"
prompt = "simplerl"
max_prompt_tokens = 160
max_new_tokens = 48
prompts_per_step = 4
group_size = 8
updates_per_step = 4
base_every = 1000  # only the log would use the base model
eval_every = 0  # and nothing of an eval is set, at whichever scale
eval_n = 0
eval_k = 1
eval_temperature = 0.0
