"""Self-certainty: mean KL(U || p) over the response, under the policy that sampled it.

The reward of INTUITOR (2505.19590). Its whole recipe is config/intuitor.py.
"""

reward = "self_certainty"
