"""Share of permutations that a search trace finds; for problems of the kind `permutations`."""

reward = "coverage"
