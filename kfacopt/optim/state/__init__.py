"""What is kept between steps, saved and checked; nothing here knows a hook or a gradient's step.

What is in a checkpoint, by parameter; "anchor" is a layer's or block's first trained parameter:

- of symmetric matrices, A and G and their inverses, what `linalg.triangles` keeps
- of a layer, at its anchor: `input_factor` A (of a split A the channels' moment, and
  `input_moments`), `grad_output_factor` G, `factor_weight`, `factor_updates`, `skipped_updates`,
  `factor_step`; at the first layer's `generator_state`
- of a block, at its anchor: `input_inverse` and `grad_output_inverse` (of a split A blocks, and
  `input_update`); with exact damping and for EKFAC `input_basis` and `grad_output_basis` (none of a
  diagonal side; of a split A also `position_basis`), and `inverse_eigenvalues` or, for EKFAC,
  `second_moments`, `second_moment_weight`, and `input_levels` and `grad_output_levels` (of a split
  A also `position_levels`) where there are bases; `inverse_step` (−1: only there to be loaded
  into), `inverse_failures`
- of a parameter in a layer: `momentum_buffer`, if its group has momentum; for `lr="auto"` instead
  `previous_parameter`, `has_previous_parameter`
- of a parameter outside of layers, or that AdamW ever trained: `exp_avg`, `exp_avg_sq`, `step`
- of a group: `settings.GROUP_SETTINGS`, `base_lr`, `num_steps`, `trust_region`, `searched`
"""
