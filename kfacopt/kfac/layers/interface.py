"""What K-FAC asks of a family of layers; each is in a file of its own, named in `registry`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Size, Tensor, nn

from kfacopt.kfac.layers.sparse_rows import SparseRows

KFACApprox = Literal["expand", "reduce"]
KFAC_APPROXES: tuple[KFACApprox, ...] = ("expand", "reduce")


def first_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Return what a module was called with, by place or by name."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


class LayerFamily(ABC):
    """From the calls of a kind of module to a and g, and from its parameters to a matrix [W | b].

    A module is of one family for each such matrix that it has.

    Attributes:
        datum_axes: How many axes the input of a single datum has, without an axis N.
        weight_name: Which parameter of a module W is.
        bias_name: Which one b is; `None` if there is none.
        diagonal_input: Whether A is kept as its diagonal, however small it is.
        routed: Whether a use may have some of the B groups alone, see `groups_used`; each has
            counts of its own then.
        elementwise: Whether all B blocks are 1 x 1. A is then 1, and G the mean squares of the
            gradients of single data, which makes G ⊗ A exact.

    Example:
        A layer z = W cos x, and what K-FAC has to know of it.

        >>> import torch
        >>> from torch import nn
        >>> import kfacopt
        >>> class Cosines(nn.Module):
        ...     def __init__(self, d_in, d_out):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(d_out, d_in))
        ...     def forward(self, x):
        ...         return x.cos() @ self.weight.mT
        >>> class CosinesFamily(kfacopt.LayerFamily):
        ...     datum_axes, bias_name = 1, None
        ...     def inputs(self, module, x, reduce):
        ...         return x.cos().reshape(1, len(x), 1, -1), 1
        ...     def grad_outputs(self, module, g):
        ...         return g.reshape(1, len(g), 1, -1)
        >>> kfacopt.register_layer(Cosines, CosinesFamily())
        >>> model, data = Cosines(3, 2), [(torch.rand(8, 3), torch.rand(8, 2))]
        >>> args = model, nn.MSELoss(), list(model.parameters()), data
        >>> K = kfacopt.KFACLinearOperator(*args, fisher_type="type-2") @ torch.eye(6)
        >>> torch.allclose(K, kfacopt.GGNLinearOperator(*args) @ torch.eye(6), atol=1e-6)
        True
    """

    datum_axes: int
    weight_name: str = "weight"
    bias_name: str | None = "bias"
    diagonal_input: bool = False
    elementwise: bool = False
    routed: bool = False

    def computes(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Tell whether a module of a kind, or a subclass, computes what the kind does."""
        # A scripted module has no forward of its class, and takes no hooks.
        return getattr(type(module), "forward", None) is kind.forward

    def record(
        self, module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor
    ) -> tuple[Any, Tensor] | None:
        """Return what is kept of a call: what other methods get as `module` and as `x`.

        By default, the module and the first argument. `None` is for calls that the family does not
        cover; their parameters are then known to be used in ways that K-FAC does not see.

        Args:
            module: A module of this family.
            args: What it was called with.
            kwargs: What it was called with by name.
            output: What it returned.
        """
        return module, first_argument(args, kwargs)

    def is_single(self, module: Any, x: Tensor) -> bool:
        """Tell whether an input is that of a single datum, without an axis N."""
        return x.ndim == self.datum_axes

    def groups(self, module: Any) -> int:
        """Return the number B of blocks that W is made of: 1, or its entries if elementwise."""
        if not self.elementwise:
            return 1
        weight: Tensor = module._parameters[self.weight_name]
        return weight.numel()

    def groups_used(self, module: Any) -> slice | None:
        """Return which groups a use has, whose a and g have these alone; `None` for all."""
        return None

    @abstractmethod
    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring a module's input to `[B, N, S, d_in]`.

        Args:
            module: A module of this family, or what `record` kept of it.
            x: Its input, or what `record` made of it; the axis N may lack.
            reduce: Whether to average over the positions, which leaves S = 1.

        Returns:
            a, and the number S of positions before averaging.
        """

    @abstractmethod
    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Bring the gradient by a module's output, whose axis N may lack, to `[B, N, S, d_out]`."""

    def sparse_inputs(self, module: Any, x: Tensor) -> SparseRows | None:
        """Return a by its entries that are not 0; `None` unless these are few.

        Sums over a are then made of these; it needs `diagonal_input`, and no bias.
        """
        return None

    def counted(self, module: Any, x: Tensor) -> Tensor | None:
        """Return which rows `[N, S]` W acts on; `None` for all.

        The others have a = 0, and are left out of both factors, as they have no part in F.
        """
        return None

    def input_moment(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Return Σ a aᵀ `[B, d_in, d_in]`, Σ a `[B, d_in]` and the number of summands.

        `None` where nothing is faster than to sum over the rows a.
        """
        return None

    def grad_output_moment(self, g: Tensor, groups: int) -> Tensor | None:
        """Return Σ g gᵀ `[B, d_out, d_out]`; `None` where summing over rows is as fast."""
        return None

    def kernel_entries(self, shape: Size) -> int:
        """Return K of columns `[C, K]` of a weight of some shape; 0 where they are of one kind."""
        return 0

    def split_moment(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return the sums of `kfacopt.linalg.split_factors.packed` over inputs, and their number.

        Only for families whose columns have positions.
        """
        raise NotImplementedError

    # The layout of parameters: here, the axis of outputs leads, as that of biases does always ----

    def matrix_shape(self, shape: Size, groups: int) -> tuple[int, int, int]:
        """Return B, d_out and the number of columns of a weight or bias of some shape."""
        if self.elementwise:
            return groups, 1, 1
        return groups, shape[0] // groups, shape[1:].numel()

    def to_matrix(self, tensor: Tensor, shape: Size, groups: int) -> Tensor:
        """Bring `[*lead, *shape]` to `[*lead, B, d_out, columns]`."""
        lead = tensor.shape[: tensor.ndim - len(shape)]
        return tensor.reshape(*lead, *self.matrix_shape(shape, groups))

    def from_matrix(self, matrix: Tensor, shape: Size) -> Tensor:
        """Invert `to_matrix`."""
        return matrix.reshape((*matrix.shape[:-3], *shape))
