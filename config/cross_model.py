"""CME (2605.29009): the mean log-likelihood under a frozen second model.

By default that is Qwen/Qwen2.5-1.5B, and in the tiny world the other family. Name another one by
--reward='cross_model("hub id or folder")'.
"""

reward = "cross_model"
