"""Offline self-certainty: scored by the frozen base model (INTUITOR, 2505.19590, its ablation)."""

reward = "self_certainty(base)"
