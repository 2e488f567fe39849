"""Offline self-certainty, by the frozen base model: an ablation of INTUITOR (2505.19590)."""

reward = "self_certainty(base)"
