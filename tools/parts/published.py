"""Figures published in "Spurious Rewards" (arXiv 2506.10947): Qwen2.5-Math-7B on MATH-500.

These are not results of this code. Every figure and table that shows them says so.
"""

PUBLISHED = "published, Qwen2.5-Math-7B, not ours"
START = 49.4  # accuracy before training, percent
# Points of accuracy gained, by reward (figure 1)
GAIN = {
    "ground truth": 29.1,
    "majority": 27.1,
    "one-shot": 26.0,
    "incorrect": 24.1,
    "random(0.5)": 21.4,
    "format": 13.8,
}
# Percent. The code frequency at the end is given as "about 90" and as 95.6.
CODE = {
    "code frequency, start": 65.0,
    "code frequency, end": (90.0, 95.6),
    "accuracy with code, start": 60.9,
    "accuracy without, start": 28.0,
}
# Percent of the gain, by habit before and after training
PARTS_OF_GAIN = {
    "code to code": 11.6,
    "code to language": 8.6,
    "language to code": 58.3,
    "language to language": 21.4,
}
