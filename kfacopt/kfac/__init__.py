"""K-FAC's layers, hooks, factors and operators; what becomes of factors over time is in `optim`."""
