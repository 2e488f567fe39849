"""The habit alone (habit_both.py), without a clip."""

base = "habit_both.py"
clip = "off"
clip_low = 0.2  # has no effect
clip_high = 0.2  # has no effect
