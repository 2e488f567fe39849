"""No-repetition reward: 0 if a pattern repeats ten times in a row ("Spurious Rewards")."""

reward = "no_repetition"
