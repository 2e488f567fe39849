"""The tiny world in which code is the bad habit (tasks/tiny.py)."""

base = "tiny.py"
model = "tiny_bad"
train_data = "tiny_bad"
eval_data = "tiny_bad"
