"""RENT (2505.22660): minus the mean entropy of the tokens; -7 for a response without a box."""

reward = "neg_entropy(mean, no_answer=-7)"
