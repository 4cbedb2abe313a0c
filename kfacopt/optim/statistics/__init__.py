"""From what was watched to sums of moments; nothing here averages over steps.

`collector` receives losses and gradients; the sums of a backward pass are in `backward_pass`.
"""
