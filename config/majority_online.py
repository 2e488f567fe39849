"""Online majority (TTRL, 2504.16084): 1 if the last box equals the group's majority answer."""

reward = "majority(online)"
