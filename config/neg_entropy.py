"""RENT (2505.22660): minus the mean entropy of the response's tokens, -7 where no box is found."""

reward = "neg_entropy(mean, no_answer=-7)"
