"""The habit alone (habit_both.py), clipped from above only."""

base = "habit_both.py"
clip = "high"
clip_low = 0.2  # has no effect
