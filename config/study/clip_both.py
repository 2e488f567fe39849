"""Clipping bias: the usual clip, both sides at .2. Against clip_off, what does the clip add?

"Spurious Rewards", arXiv 2506.10947, section 4.3 and appendix B.
"""

reward = "random(0.5)"
clip = "both"
