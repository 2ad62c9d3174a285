"""What distributed tests share: layouts, models, cases, the oracle and the parity."""
