"""What K-FAC asks of a family of layers; each is in a file of its own, named in `registry`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Size, Tensor, nn

KFACApprox = Literal["expand", "reduce"]
KFAC_APPROXES: tuple[KFACApprox, ...] = ("expand", "reduce")


class LayerFamily(ABC):
    """From a use of a weight W to a and g, and from its layout to a matrix.

    Attributes:
        kind: The family's class of modules.
        datum_axes: How many axes the input of a single datum has, without an axis N.
    """

    kind: ClassVar[type[nn.Module]]
    datum_axes: ClassVar[int]

    def computes(self, module: nn.Module) -> bool:
        """Tell whether a module of this kind, or a subclass, computes what the kind does."""
        return type(module).forward is self.kind.forward

    def groups(self, module: Any) -> int:
        """Return the number B of blocks that W is made of."""
        return 1

    @abstractmethod
    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring a module's input to `[B, N, S, d_in]`.

        Args:
            module: A module of this family.
            x: Its input; the axis N may lack.
            reduce: Whether to average over the positions, which leaves S = 1.

        Returns:
            a, and the number S of positions before averaging.
        """

    @abstractmethod
    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Bring the gradient by a module's output, whose axis N may lack, to `[B, N, S, d_out]`."""

    def input_moment(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Return Σ a aᵀ `[B, d_in, d_in]`, Σ a `[B, d_in]` and the number of summands.

        `None` where nothing is faster than to sum over the rows a.
        """
        return None

    def grad_output_moment(self, g: Tensor, groups: int) -> Tensor | None:
        """Return Σ g gᵀ `[B, d_out, d_out]`; `None` where summing over rows is as fast."""
        return None

    # The layout of parameters: here, the axis of outputs leads, as that of biases does always ----

    def matrix_shape(self, shape: Size, groups: int) -> tuple[int, int, int]:
        """Return B, d_out and the number of columns of a weight or bias of some shape."""
        return groups, shape[0] // groups, shape[1:].numel()

    def to_matrix(self, tensor: Tensor, shape: Size, groups: int) -> Tensor:
        """Bring `[*lead, *shape]` to `[*lead, B, d_out, columns]`."""
        lead = tensor.shape[: tensor.ndim - len(shape)]
        return tensor.reshape(*lead, *self.matrix_shape(shape, groups))

    def from_matrix(self, matrix: Tensor, shape: Size) -> Tensor:
        """Invert `to_matrix`."""
        return matrix.reshape(*matrix.shape[:-3], *shape)
