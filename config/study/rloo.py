"""RLOO (arXiv 2402.14740): each response against the mean of the others, one update a step.

Do random rewards move a policy at all without the division by a standard deviation and the clip?
"""

reward = "random(0.5)"
adv_norm = "leave_one_out"
updates_per_step = 1
clip = "off"  # it has no effect with one update a step
