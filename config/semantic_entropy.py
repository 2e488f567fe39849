"""EMPO (2504.05812): the share of the group in the response's cluster of equivalent answers."""

reward = "semantic_entropy"
