"""The tiny permutations world: `python -m tools.exploration --build=cache/tiny_permutations`."""

base = "tiny.py"
model = "cache/tiny_permutations"
train_data = "cache/tiny_permutations"
eval_data = "cache/tiny_permutations"
max_new_tokens = 176
micro_batch_tokens = 8192
lr = 1e-3
eval_n = 0
eval_k = 8
