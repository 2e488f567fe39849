"""The clip from above only. Does this side alone lower the entropy (2509.26114)?"""

reward = "random(0.5)"
clip = "high"
