"""The habit alone (habit_both.py), clipped from below only."""

base = "habit_both.py"
clip = "low"
clip_high = 0.2  # has no effect
