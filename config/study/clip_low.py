"""The clip from below only. Does this side alone raise the entropy (2509.26114)?"""

reward = "random(0.5)"
clip = "low"
