"""The habit alone, all weights, clipped on both sides: random rewards (docs/STUDY.md).

The tiny world's first token chooses between code and a sentence. Trained on it alone, with plain
SGD and a narrow clip, the clip acts and the calculations survive. For config/model/tiny.py and
tiny_bad.py; run each seed with the coins flipped, too: --reward='random(0.5),~random(0.5)'.
"""

reward = "random(0.5)"
max_new_tokens = 1
eval_new_tokens = 56  # whole answers
prompts_per_step = 32
micro_batch_tokens = 4096
optimizer = "sgd"
max_grad_norm = 1e9  # plain SGD; with an adapter no norm comes near 1
quant = "none"
lora_r = 0
lr = 0.007
clip_low = 0.1
clip_high = 0.1
steps = 40
eval_every = 40
save_every = 0
log_samples = 0
