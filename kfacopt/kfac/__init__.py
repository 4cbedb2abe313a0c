"""The Kronecker-factored approximation: layers, hooks, factors and the K-FAC operator."""
