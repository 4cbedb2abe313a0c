"""What becomes of a gradient; nothing here knows where its curvature comes from.

In order: `preconditioning`; `clipped_step` with `kl_clip` and `update` (momentum, decay), or
`self_tuning` with `quadratic_model`, `replay` and `closures`; `fallback` for all others.
"""
