"""The habit alone (habit_off.py), one update at 8 times the rate: a walk of equal length."""

base = "habit_off.py"
lr = 1.2
updates_per_step = 1
