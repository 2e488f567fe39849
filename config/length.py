"""Length as the reward, in tokens: a control for rewards that lengthen responses by the way."""

reward = "length"
