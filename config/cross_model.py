"""CME (2605.29009): the mean log-likelihood under a frozen second model, named by --verifier."""

reward = "cross_model"
