"""Products with split inverses of convolutions' A where many are taken; the form has another file.

A gradient `[d_out, C K]` is brought to an order by positions of the kernel, where both of its sides
are multiplied, and back. What no data reach in a kernel (its border, on maps of 1 x 1) has the
gradient 0 there, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.linalg.split_factors import Side, SplitInverse


def multiplied(G: Side, A: SplitInverse, columns: Sequence[Tensor]) -> list[Tensor]:
    """Return G X A for X `[B, d_out, d_in]`, in the columns that X is given in, as [W | b].

    Args:
        G: `[B, d_out, d_out]`, or of low rank.
        A: The inverse of a split factor.
        columns: The columns of W, and that of b if there is one.
    """
    weight, dtype = columns[0], columns[0].dtype
    B, n = weight.shape[:2]
    K, C = A.blocks.shape[1:3]
    by_position, places = _by_position(weight.unflatten(-1, (C, K)), A)
    kept = slice(None) if places is None else places
    w = A.update[:, : C * K].unflatten(-1, (C, K)).mT[:, kept].to(dtype)  # [B, K, C]
    left = _left(G, by_position.flatten(2))
    shares = torch.bmm(left, w.flatten(1).unsqueeze(-1))  # X w, [B, n, 1]
    results = []
    if A.joint:
        bias, own = _left(G, columns[1]), A.update[:, -2, None, None].to(dtype)
        shares = shares + bias * own
        results = [bias * A.update[:, -1, None, None].to(dtype) - shares * own]
    product = left.unflatten(-1, (-1, C)).transpose(1, 2) @ A.blocks[:, kept].to(dtype)
    product.addcmul_(shares.unsqueeze(1), w.unsqueeze(2), value=-1)  # [B, K, n, C]
    if places is None:
        # Plain transposes of matrices are fast to copy.
        flat = torch.stack([x.flatten(1).T.contiguous() for x in product])
        return [flat.view(B, n, C * K), *results]
    whole = product.new_zeros(B, n, C, K)
    whole[..., places] = product.permute(0, 2, 3, 1)
    return [whole.view(B, n, C * K), *results]


def _left(G: Side, X: Tensor) -> Tensor:
    return torch.bmm(G, X) if isinstance(G, Tensor) else G.left(X)


def _by_position(X: Tensor, A: SplitInverse) -> tuple[Tensor, Tensor | None]:
    """Return X `[B, n, C, K]` as `[B, n, K, C]`, and which positions these are, if not all."""
    if X.device.type != "cpu":  # a product may be rounded there, and to ask takes time
        return X.mT.contiguous(), None
    K = X.shape[-1]
    selection = torch.eye(K, dtype=X.dtype)  # a product copies with strides faster than copy_
    w = A.update[:, : X.shape[-2] * K].unflatten(-1, (-1, K))
    unseen = (w == 0).all(0).all(0)
    if bool(unseen.any()) and not bool((selection[unseen] @ X.mT).any()):
        places = (~unseen).nonzero().squeeze(-1)
        return selection[places] @ X.mT, places
    return selection @ X.mT, None
