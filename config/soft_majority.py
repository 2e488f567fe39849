"""Soft majority (SRT, 2505.21444): the share of the group that gives the response's own answer."""

reward = "soft_majority"
