"""The habit alone (habit_off.py), one update of 8 times the rate: a walk as long."""

base = "habit_off.py"
lr = 1.2
updates_per_step = 1
