"""The habit alone (habit_full_both.py), with all weights trained and no clip."""

base = "habit_full_both.py"
clip = "off"
clip_low = 0.2  # has no effect
clip_high = 0.2  # has no effect
