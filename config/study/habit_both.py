"""The habit alone, clipped on both sides, with random rewards (docs/STUDY.md).

In the tiny world the first token chooses between code and a sentence. These files train only that
token, with plain SGD and a narrow clip, so that the clip acts and the calculations survive. Use
them with config/model/tiny.py or tiny_bad.py. Run each seed with its coins flipped as well:
--reward='random(0.5),~random(0.5)'.
"""

reward = "random(0.5)"
max_new_tokens = 1
eval_new_tokens = 56  # evals sample whole answers
prompts_per_step = 32
micro_batch_tokens = 4096
optimizer = "sgd"
lr = 0.15
clip_low = 0.1
clip_high = 0.1
steps = 40
eval_every = 40
base_every = 1000  # only the log would use the base model
save_every = 0
