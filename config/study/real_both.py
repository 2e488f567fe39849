"""The habit of a real model, clipped on both sides, with random rewards (docs/STUDY.md, section 7).

The prompt's response prefix makes the first tokens decide, so responses are that short. Use it with
config/model/qwen2.5_coder_0.5b.py or smollm2_135m.py. Run each seed with its coins flipped as well:
--reward='random(0.5),~random(0.5)'.
"""

reward = "random(0.5)"
prompt = "code_habit"
max_prompt_tokens = 128
max_new_tokens = 2
prompts_per_step = 8
group_size = 8
updates_per_step = 4
clip_low = 0.2
clip_high = 0.2
steps = 20
base_every = 1000  # only the log would use the base model
save_every = 0
eval_every = 0  # and nothing of an eval is set, at whichever scale
eval_n = 0
eval_k = 1
eval_temperature = 0.0
