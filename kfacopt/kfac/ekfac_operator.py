"""The eigenvalue-corrected K-FAC matrix over data; one pass's eigenvalues are in `eigenvalues`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kfacopt.argument_checks import check_choice, check_range
from kfacopt.data import evaluation
from kfacopt.kfac.block_diagonal import KFACInverseLinearOperator
from kfacopt.kfac.capture import group_by_layer
from kfacopt.kfac.eigenvalues import Bases, block_second_moments
from kfacopt.kfac.layers import Block
from kfacopt.kfac.linear_operator import KFACLinearOperator
from kfacopt.linalg import decompositions
from kfacopt.linalg.kronecker import (
    DampingMethod,
    KroneckerEigendecomposition,
    dense,
    eigendecomposition,
)
from kfacopt.linalg.precision import null_directions


class EKFACLinearOperator(KFACLinearOperator):
    r"""The Fisher/GGN in the eigenbasis of its K-FAC approximation, with corrected eigenvalues.

    K-FAC's block G ⊗ A of a layer has the eigenvectors Q_G ⊗ Q_A and the eigenvalues λ_G λ_Aᵀ.
    EKFAC keeps the vectors and takes, as eigenvalues, the second moments of the gradients of single
    data along them,

        F ≈ (Q_G ⊗ Q_A) diag(vec Λ) (Q_G ⊗ Q_A)ᵀ,    Λ = Σ_{n,v} (Q_Gᵀ (Σ_s g_ns a_nsᵀ) Q_A)²,

    the diagonal of the exact block in that basis: with `fisher_type="type-2"` no matrix with these
    eigenvectors, K-FAC's included, is nearer to the GGN's block in the Frobenius norm. Where K-FAC
    is exact they are equal.

    A datum n is an entry of the leading axis of a layer's input: in a model that puts the sequence
    first (`batch_first=False`), or flattens it into the data, the gradients of positions are not
    added up as those of one datum, and Λ is no longer that diagonal.

    The bases and Λ are computed, in two passes over the data, in the first product. If the
    parameters change, make a new operator.

    Args:
        model_func: As all arguments, that of `KFACLinearOperator`.
        loss_func: See there.
        params: See there.
        data: See there.
        progressbar: See there.
        check_deterministic: See there.
        shape: See there.
        seed: See there. Both passes draw the same labels.
        fisher_type: See there.
        mc_samples: See there.
        kfac_approx: See there; it decides on the eigenvectors alone.
        loss_average: See there.
        separate_weight_and_bias: See there.
        batch_size_fn: See there.
        conv_factor: See there. Q_A of a split A is a Kronecker product as well.
        wide_factor: See there; the bases are those of the low rank plus the diagonal.
        max_factor_dim: See there; a diagonal factor's basis is the identity.

    Raises:
        UnsupportedLossError: As all errors, those of `KFACLinearOperator`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> data = [(torch.rand(8, 4), torch.randint(3, (8,)))]
        >>> E = EKFACLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
        >>> E.shape, (E.inverse(damping=1e-3) @ torch.ones(43)).shape
        ((43, 43), torch.Size([43]))

    References:
        George et al. (2018), https://arxiv.org/abs/1806.03884, section 3.
    """

    _covers_tied = False

    def inverse(
        self, damping: float, *, method: DampingMethod = "exact"
    ) -> KFACInverseLinearOperator:
        """Return the damped inverse (Q_G ⊗ Q_A) diag(1 / (Λ + δ)) (Q_G ⊗ Q_A)ᵀ.

        Args:
            damping: δ ≥ 0, in units of F; 0 needs positive eigenvalues.
            method: `"exact"`; there are no factors whose damping could be split.

        Returns:
            An operator that knows `trace`, `logdet`, `det` and `frobenius_norm` too.

        Raises:
            ValueError: If the damping is negative or not finite, or the method not `"exact"`.
            DecompositionError: If the matrix is singular and the damping 0.
        """
        check_range("damping", damping, 0)
        check_choice("method", method, ("exact",))
        blocks = [(b, matrix.inverse(damping)) for b, matrix in self._kronecker_blocks()]
        return KFACInverseLinearOperator(self._params, blocks)

    def _kronecker_blocks(self) -> list[tuple[Block, Any]]:
        return list(self._corrected)

    @cached_property
    def _corrected(self) -> list[tuple[Block, KroneckerEigendecomposition]]:
        factored = super()._kronecker_blocks()
        with evaluation(self._model_func):
            return self._correct_eigenvalues(factored)

    def _correct_eigenvalues(
        self, factored: list[tuple[Block, Any]]
    ) -> list[tuple[Block, KroneckerEigendecomposition]]:
        bases: dict[Block, Bases] = {}
        moments: dict[Block, Tensor] = {}
        null: dict[Block, Tensor] = {}
        own_blocks: dict[Any, list[Block]] = {}
        for block, matrix in factored:
            G = dense(matrix.grad_output_factor)
            values_g, basis_g = decompositions.eigendecomposition(G)
            spectrum_a = eigendecomposition(matrix.input_factor)
            bases[block] = (basis_g, spectrum_a[1])
            null_g, null_a = null_directions(values_g, basis_g), null_directions(*spectrum_a)
            null[block] = null_g.unsqueeze(-1) | null_a.unsqueeze(-2)
            shape = (block.layer.groups, block.layer.d_out, block.d_in)
            moments[block] = G.new_zeros(shape)
            own_blocks.setdefault(block.layer, []).append(block)
        for *_, gradients in self._passes("EKFAC eigenvalues"):
            for by_use in gradients:
                for layer, own in group_by_layer(by_use).items():
                    grads = [by_use[use] for use in own]
                    for block in own_blocks[layer]:
                        moments[block] += block_second_moments(block, own, grads, bases[block])
        for block, values in moments.items():
            # What round-off leaves of the data where a factor has none would make det and inverse
            # of a singular matrix. (Factors of averages, `"reduce"`, may lack what the data have.)
            noise = max(values.shape[-2:]) * torch.finfo(values.dtype).eps * values.amax()
            values.masked_fill_(null[block] & (values <= noise), 0.0)
        return [
            (block, KroneckerEigendecomposition(*bases[block], moments[block] * self._scale))
            for block in bases
        ]
