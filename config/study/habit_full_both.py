"""The habit alone (habit_both.py), with all weights trained."""

base = "habit_both.py"
quant = "none"
lora_r = 0
lora_alpha = 64  # has no effect without an adapter
lr = 0.007
max_grad_norm = 1e9  # plain SGD; with an adapter no norm comes near 1
base_every = 1  # full training keeps no base model
