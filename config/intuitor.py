"""INTUITOR (2505.19590): self-certainty as the reward, with the published recipe.

Published: 128 prompts x 7 responses a step, one update a step, 512 + 3072 tokens, T = .9, KL to the
base of .005 (k3, in the loss), AdamW at 3e-6 with all weights trained, cosine with 10 % warm-up, 58
steps on MATH's training set. The released script has 8 responses a prompt.

What an adapter and one card change: an adapter learns nothing at 3e-6, so the rate stays the scale
file's (docs/TRAINING.md); prompts and tokens are the scale file's too. For the published sizes add
--prompts_per_step=128 --group_size=7 --max_prompt_tokens=512 --max_new_tokens=3072 --steps=58
--train_data=math_train; where all weights fit, also --lora_r=0 --quant=none --dtype=float32
--lr=3e-6.
"""

reward = "self_certainty"
updates_per_step = 1
clip = "off"  # it has no effect with one update a step
temperature = 0.9
kl_coef = 0.005
kl_type = "k3"
lr_schedule = "cosine"
warmup = 0.1
