"""What happens in the user's loop, none of it changed; nothing here computes a statistic.

`watch` has the hooks; losses are noticed in `probed_tensors` and recognised in `loss_calls`.
"""
