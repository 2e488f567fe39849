"""Response length in tokens: a control for rewards that also make responses longer."""

reward = "length"
