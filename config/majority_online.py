"""Online majority (TTRL, 2504.16084): the last box equals the group's own most frequent answer."""

reward = "majority(online)"
