"""INTUITOR (2505.19590): mean KL(U || p) over the response, under the policy that sampled it."""

reward = "self_certainty"
