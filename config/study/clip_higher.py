"""Clip-higher (DAPO, arXiv 2503.14476): .2 below, .28 above. Does the wider side hold entropy?"""

reward = "random(0.5)"
clip = "both"
clip_low = 0.2
clip_high = 0.28
