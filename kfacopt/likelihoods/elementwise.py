"""What losses of single entries of z share; each of them has a file of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.interface import Likelihood


def drawn(random: Callable[..., Tensor], output: Tensor, generator: Generator) -> Tensor:
    """Draw a number for each entry of z, on the generator's device, wherever z lives."""
    shape, device = output.shape, generator.device
    return random(shape, generator=generator, dtype=output.dtype, device=device).to(output.device)


@dataclass(frozen=True, eq=False)
class Elementwise(Likelihood):
    """A loss whose terms are single entries of z, `[N, ...]`.

    A subclass says `second_derivative`, that of ℓ or, where the two differ, the Fisher information;
    and `draw_gradient` where gradients with drawn labels are to have their own distribution. Both
    are of one entry's term: no weight, no mean.

    Attributes:
        weight: A factor of each term, broadcast to z, ≥ 0; `None` for 1.

    Example:
        Counts with the rate eᶻ: ℓ = eᶻ − y z, whose second derivative is eᶻ.

        >>> import torch
        >>> from torch import nn
        >>> import kfacopt
        >>> class Counts(kfacopt.Elementwise):
        ...     def second_derivative(self, output):
        ...         return output.exp()
        >>> @kfacopt.register_likelihood(lambda z, y: Counts("mean"))
        ... def poisson_loss(z, y):
        ...     return (z.exp() - y * z).mean()
        >>> model, X = nn.Linear(3, 1, bias=False), torch.rand(8, 3)
        >>> args = model, poisson_loss, list(model.parameters()), [(X, torch.ones(8, 1))]
        >>> K = kfacopt.KFACLinearOperator(*args, fisher_type="type-2") @ torch.eye(3)
        >>> torch.allclose(K, model(X).exp().mean() * X.T @ X / 8)  # G ⊗ A
        True
    """

    weight: Tensor | None = None

    @abstractmethod
    def second_derivative(self, output: Tensor) -> Tensor:
        """Return h ≥ 0 `[*z.shape]`, the curvature of each entry's term.

        Args:
            output: z, `[N, ...]`, without a graph.
        """

    def draw_gradient(self, output: Tensor, generator: Generator) -> Tensor:
        """Draw √h ε, ε ~ N(0, 1), as for a mean square: h is the mean of its square."""
        return self.second_derivative(output).sqrt() * drawn(torch.randn, output, generator)

    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the weight of each entry `[*z.shape]`."""
        ones = torch.ones_like(output)
        return ones if self.weight is None else ones * self.weight.to(output)

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of entries of z."""
        return torch.full((), output.numel(), dtype=output.dtype, device=output.device)

    def num_terms(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of rows of z: the mean over a datum's outputs is part of ℓ_n."""
        rows = output.shape[0] if output.ndim else 1
        return torch.full((), rows, dtype=output.dtype, device=output.device)

    def num_positions(self, output: Tensor) -> int:
        """Return the number of vectors along the last axis of z."""
        return output.shape[:-1].numel() if output.ndim > 1 else output.numel()

    def multiply_hessian(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return h v."""
        return self.second_derivative(output) * vector

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √(∂²ℓ/∂z²) at one entry of each datum."""
        root = self.second_derivative(output).sqrt()
        if root.ndim == 0:
            yield root
            return
        flat = root.reshape(root.shape[0], root.shape[1:].numel())
        for i in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, i] = flat[:, i]
            yield column.reshape(root.shape)
