"""No-repetition reward: 0 where a pattern stands ten times in a row ("Spurious Rewards")."""

reward = "no_repetition"
