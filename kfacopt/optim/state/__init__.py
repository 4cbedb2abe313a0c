"""What is kept between steps, saved and checked; nothing here knows a hook or a gradient's step.

What is in a checkpoint, by parameter; "anchor" is a layer's or block's first parameter:

- of a layer, at its anchor: `input_factor` A, `grad_output_factor` G, `factor_weight`,
  `factor_updates`, `skipped_updates`, `factor_step`; at the first layer's `generator_state`
- of a block, at its anchor: `input_inverse` and `grad_output_inverse`, or `input_basis`,
  `grad_output_basis` and `inverse_eigenvalues` (exact damping) or `second_moments` and
  `second_moment_weight` (EKFAC); `inverse_step`, `inverse_failures`
- of a parameter with a direction: `momentum_buffer`; for `lr="auto"` `previous_parameter`,
  `has_previous_parameter`
- of a parameter that AdamW trains: `exp_avg`, `exp_avg_sq`, `step`
- of a group: `settings.GROUP_SETTINGS`, `base_lr`, `num_steps`
"""
