"""The K-FAC matrix over data as a linear operator; one pass's factors are formed in `factors`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from kfacopt import argument_checks
from kfacopt.data import Batch, evaluation, iterate, run_determinism_check, some, sum_gradients
from kfacopt.kfac.block_diagonal import KFACInverseLinearOperator, KroneckerBlockLinearOperator
from kfacopt.kfac.capture import LayerUse, WouldBePass, capture, group_by_layer
from kfacopt.kfac.data_axes import DataAxes
from kfacopt.kfac.factor_forms import FactorForm, Factors, as_factors
from kfacopt.kfac.factors import factor_dtype, grad_output_moment, input_moment, mean_input
from kfacopt.kfac.layers import (
    CONV_FACTORS,
    KFAC_APPROXES,
    WIDE_FACTORS,
    Block,
    ConvFactor,
    KFACApprox,
    Layer,
    WideFactor,
    split,
)
from kfacopt.kfac.layers.tied import joined_factors
from kfacopt.kfac.live_rows import LiveRows
from kfacopt.kfac.loss_fisher import loss_fisher
from kfacopt.kfac.operator_layers import layers_of, parameters_of, refuse_tied
from kfacopt.kfac.unrolled import unrolled
from kfacopt.kfac.unseen_uses import edges_of, past_modules, refuse_unseen_uses
from kfacopt.likelihoods import SUPPORTED_LOSSES, FisherType
from kfacopt.linalg.kronecker import DAMPING_METHODS, DampingMethod, KroneckerProduct


class KFACLinearOperator(KroneckerBlockLinearOperator):
    r"""The Fisher/GGN's K-FAC approximation, one Kronecker product per layer.

    For a layer z = W a + b, with W of the shape `[d_out, d_in]` and row-major vec (as torch
    flattens parameters),

        F(vec W) ≈ G ⊗ A,    A = E[a aᵀ],    G = Σ g gᵀ,

    where a are the layer's inputs and g the gradients of the loss, for labels from the model
    (`"mc"`), for the columns of a root of the loss's Hessian (`"type-2"`) or for the data's labels
    (`"empirical"`), by its output. `kfacopt.kfac.factors` has the formulas with all axes. Factors
    follow the true reduction of the loss: for `reduction="mean"` they are those of the mean over
    all terms of the data set (targets that are ignored are not counted), however it is batched.

    The factors are computed, once, in the first product. If the parameters change, make a new
    operator.

    Args:
        model_func: The network, made of modules. `nn.Linear` with any number of shared axes,
            `nn.Conv1d` to `nn.Conv3d` and `nn.ConvTranspose1d` to `nn.ConvTranspose3d` (stride,
            padding, dilation, groups), embeddings (A is diagonal), scale and shift of
            normalisations (the exact diagonal of F) and what `kfacopt.register_layer` was told of:
            see docs/layers.md. Products with matrices
            past modules' calls (`x @ W`, `F.linear`, `nn.MultiheadAttention`) and lookups
            (`F.embedding`) count as well; a matrix of which the model makes no other use is a layer
            by the parameter's name. So is an embedding that is tied to the head, and what
            multiplies or is added entry by entry, where its data's axis is certain (the exact
            diagonal of F).
        loss_func: `nn.MSELoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss`, or `NLLLoss` at
            log-probabilities; or any function or module that maps predictions z and targets to a
            scalar. Of this the positive part of the Hessian at z is the curvature, found exactly
            batch by batch: where it is diagonal; that of softmax cross entropy, with any weight of
            either sign for each row, which counts by its absolute value; in rows of at most 32
            entries (of the last axis, of axis 1, or a datum's); or over all of z, of at most 128
            entries, where rows see each other. The risk is then a sum or mean over batches. A loss
            of `register_likelihood` has the curvature that it was given. A batch where the Hessian
            has no positive part adds nothing.
        params: The parameters of F's rows and columns: any subset of the supported layers', in
            any order, as a list or as a dict by their names in the model.
        data: Batches `(X, y)`; may be iterated any number of times, in the same order.
        progressbar: Show a bar while the factors are computed.
        check_deterministic: Check that data and model are deterministic, at the cost of two
            forward passes over the data.
        shape: The shape `(D, D)`; checked against the parameters.
        seed: Seeds the generator of sampled labels, anew for each computation of the factors.
        fisher_type: `"mc"`, `"type-2"` or `"empirical"`. `"mc"` is unbiased in expectation over
            the seed. `"type-2"` takes one backward pass for every entry of a datum's output and
            is exact where the rows of the output are independent data; where the model mixes
            them (flattened sequences), random signs of the rows keep it unbiased.
        mc_samples: Labels drawn for each datum; 1 unless `fisher_type="mc"`.
        kfac_approx: `"expand"` or `"reduce"`, for layers with shared positions.
        loss_average: `"batch"`, `"batch+sequence"` or `None` (a sum). Checked against the loss's
            reduction; a loss that does not say its reduction is taken to be the sum over the data
            for `None`, else their mean. What the loss really averages over is seen from its input,
            so that the two means differ for `"empirical"` only, in what they take for one datum.
        separate_weight_and_bias: Give W and b blocks of their own. `False` takes [W | b] together,
            where both are in `params`.
        conv_factor: `"full"` keeps A of convolutions whole, `"channels"` by channels and positions
            of the kernel, `"auto"` where it is wide; see `KFACOptimizer`.
        wide_factor: `"full"` keeps sides whole, `"low_rank"` as a low rank plus a diagonal,
            `"auto"` where they are wide; see `KFACOptimizer`.
        batch_size_fn: A function from X to the number of data in a batch, for inputs that do not
            tell it themselves; `"empirical"` asks for it, and means of losses other than the four.
        max_factor_dim: A side of a layer wider than that gets a diagonal factor, as in
            `KFACOptimizer`; `None` keeps all dense.

    Raises:
        UnsupportedLossError: (a `NotImplementedError`) If the loss has no exact curvature, or none
            at all, in a product; `fisher_type="empirical"` takes any loss.
        ValueError: If an argument has a value that is not listed, or contradicts another.
        NotImplementedError: If a parameter is in an unsupported layer.
        RuntimeError: If the check for deterministic behavior fails.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> data = [(torch.rand(8, 4), torch.randint(3, (8,)))]
        >>> K = KFACLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
        >>> K.shape, (K @ torch.ones(43)).shape
        ((43, 43), torch.Size([43]))
        >>> gradient = [torch.ones_like(p) for p in model.parameters()]
        >>> [tuple(step.shape) for step in K.inverse(damping=1e-3) @ gradient]
        [(5, 4), (5,), (3, 5), (3,)]
        >>> K.factors("2").input_factor.shape
        torch.Size([5, 5])

    References:
        - Martens & Grosse (2015), https://arxiv.org/abs/1503.05671 (Eq. 1 and section 3).
        - Grosse & Martens (2016), https://arxiv.org/abs/1602.01407 (convolutions).
        - Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636 (weight sharing).
    """

    _SUPPORTED_LOSSES = SUPPORTED_LOSSES
    _covers_tied = True

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: Callable[[Tensor, Any], Tensor],
        params: list[Parameter] | Mapping[str, Parameter],
        data: Iterable[Batch],
        progressbar: bool = False,
        check_deterministic: bool = True,
        shape: tuple[int, int] | None = None,
        seed: int = 2147483647,
        fisher_type: FisherType = "mc",
        mc_samples: int = 1,
        kfac_approx: KFACApprox = "expand",
        loss_average: str | None = "batch",
        separate_weight_and_bias: bool = True,
        *,
        batch_size_fn: Callable[[Any], int] | None = None,
        conv_factor: ConvFactor = "full",
        wide_factor: WideFactor = "full",
        max_factor_dim: int | None = None,
    ) -> None:
        argument_checks.check_evaluation(data, progressbar, check_deterministic, batch_size_fn)
        if max_factor_dim is not None:
            argument_checks.check_count("max_factor_dim", max_factor_dim)
        argument_checks.check_flag("separate_weight_and_bias", separate_weight_and_bias)
        self._fisher = loss_fisher(loss_func, fisher_type, mc_samples, loss_average, batch_size_fn)
        argument_checks.check_choice("kfac_approx", kfac_approx, KFAC_APPROXES)
        argument_checks.check_choice("conv_factor", conv_factor, CONV_FACTORS)
        argument_checks.check_choice("wide_factor", wide_factor, WIDE_FACTORS)
        argument_checks.check_integer("seed", seed)
        if not isinstance(model_func, nn.Module):
            raise ValueError(
                f"model_func must be an nn.Module for K-FAC, got {type(model_func).__name__}."
            )
        own = _own_parameters(model_func, argument_checks.check_params(params))
        argument_checks.check_distinct(own)
        super().__init__(own)
        self._model_func, self._data, self._progressbar = model_func, data, progressbar
        batches = partial(self._batches, "K-FAC layers")
        layers = layers_of(model_func, own, separate_weight_and_bias, batches)
        self._layers = split(layers, conv_factor, wide_factor, max_factor_dim)
        self._axes = DataAxes()
        if not self._covers_tied:
            refuse_tied(self._layers)
        argument_checks.check_shape(shape, self.shape)
        self._seed, self._form = seed, FactorForm(kfac_approx, max_factor_dim)
        if check_deterministic:
            with evaluation(model_func):
                run_determinism_check(data, self.device, model_func)

    # Access ----------------------------------------------------------------------------------

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers that the parameters belong to."""
        return [layer.name for layer, _ in self._layers]

    def factors(self, key: str | Parameter) -> Factors:
        """Return the Kronecker factors of a layer.

        Args:
            key: The layer's name, a parameter's name, or a parameter.

        Raises:
            KeyError: If there is no such layer; the error lists those that there are.
        """
        named = self._model_func.named_parameters(remove_duplicate=False)
        names = {id(p): name for name, p in named}
        for layer, matrix in self._layer_factors.items():
            if layer.owns(key, names):
                return Factors.of(layer, matrix.input_factor, matrix.grad_output_factor)
        raise KeyError(f"{key!r}: no such layer or parameter; layers: {self.layer_names}.")

    def inverse(
        self, damping: float, *, method: DampingMethod = "factored"
    ) -> KFACInverseLinearOperator:
        """Return the damped inverse as a linear operator.

        Args:
            damping: δ ≥ 0, in units of F; 0 needs regular factors.
            method: `"factored"` is (G + √δ/π I)⁻¹ ⊗ (A + π√δ I)⁻¹, by Cholesky; it is what
                `KFACOptimizer` uses by default. `"exact"` is (G ⊗ A + δI)⁻¹, in the eigenbases.

        Returns:
            An operator that knows `trace`, `logdet`, `det` and `frobenius_norm` too.

        Raises:
            ValueError: If the damping is negative or not finite, or the method unknown.
            DecompositionError: If a factor cannot be inverted (0 damping and a singular factor).
        """
        argument_checks.check_range("damping", damping, 0)
        argument_checks.check_choice("method", method, DAMPING_METHODS)
        blocks = [(b, matrix.inverse(damping, method)) for b, matrix in self._kronecker_blocks()]
        return KFACInverseLinearOperator(self._params, blocks)

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Return the gradient of the loss over all data, and the loss, reduced as it says.

        Returns:
            One tensor `[*p.shape]` for each parameter, and a scalar.
        """

        def terms() -> Iterator[tuple[Tensor, Tensor | float]]:
            for X, y in self._batches("gradient and loss"):
                output = argument_checks.checked_output(self._model_func(X))
                yield self._fisher.summed_loss(output, X, y)

        with evaluation(self._model_func):
            return sum_gradients(self._params, terms(), self._fisher.is_mean)

    # Factors ---------------------------------------------------------------------------------

    def _kronecker_blocks(self) -> list[tuple[Block, Any]]:
        return [
            (block, KroneckerProduct(m.grad_output_factor, block.input_factor(m.input_factor)))
            for layer, m in self._layer_factors.items()
            for block in layer.blocks
        ]

    @cached_property
    def _layer_factors(self) -> dict[Layer, KroneckerProduct]:
        with evaluation(self._model_func):
            return self._compute_factors()

    def _compute_factors(self) -> dict[Layer, KroneckerProduct]:
        inputs, grads = {}, {}
        for layer in (part for whole, _ in self._layers for part in whole.collected):
            dtype, device = factor_dtype(layer.anchor.dtype), layer.anchor.device
            inputs[layer], grads[layer] = (
                torch.zeros(shape, dtype=dtype, device=device) for shape in self._form.shapes(layer)
            )
        rows: dict[Layer, Any] = dict.fromkeys(inputs, 0)
        counts, vectors = [], 0
        for X, y, output, uses, gradients in self._passes("K-FAC factors"):
            counts.append(self._fisher.counts(output.detach(), X, y))
            reached: set[LayerUse] = set()
            live = LiveRows()
            live.note(getattr(self._fisher, "likelihood", None), output, y)
            for by_use in gradients:
                vectors += 1
                reached.update(by_use)
                for layer, own in group_by_layer(by_use).items():
                    own_grads = [by_use[use] for use in own]
                    live.add(own, own_grads)
                    grads[layer] += grad_output_moment(layer, own, own_grads, self._form)
            counted = [live.restricted(use) for use in uses if use in reached]
            for layer, own in group_by_layer(counted).items():
                moment, count = input_moment(layer, own, self._form)
                inputs[layer] += moment
                rows[layer] = rows[layer] + count
        self._scale = self._fisher.scale(counts)
        self._fisher.check_seen(vectors)
        factors = {
            part: (mean_input(A, rows[part]), grads[part] * self._scale)
            for part, A in inputs.items()
        }
        products = {}
        for layer, _ in self._layers:
            A, G = factors.get(layer) or joined_factors(layer, factors, self._form.shapes)
            inputs_factor, grads_factor = as_factors(layer, A, G)
            products[layer] = KroneckerProduct(grads_factor, inputs_factor)
        return products

    def _passes(
        self, description: str
    ) -> Iterator[tuple[Any, Any, Tensor, list[LayerUse], Iterator[dict[LayerUse, Tensor]]]]:
        """Yield X, y, the output, the uses of layers, and vector by vector the gradients by them.

        Every call draws the same labels.
        """
        generator = Generator(self.device).manual_seed(self._seed)
        params = {id(p) for p in self._params}
        modules = self._model_func.modules()
        own = [m for m in modules if any(id(p) in params for p in m._parameters.values())]
        for X, y in self._batches(description):
            with capture(self._layers) as uses, unrolled(own):
                output = argument_checks.checked_output(self._model_func(X))
            entries = (self._axes, [output])
            past = past_modules(edges_of(output), uses, parameters_of(self._layers), [], entries)
            uses += past.uses
            refuse_unseen_uses(self._model_func, [*past.rest, *past.found], output, uses)
            yield X, y, output, uses, self._gradients(output, X, y, uses, generator)

    def _batches(self, description: str) -> Iterator[Batch]:
        return some(iterate(self._data, self.device, self._progressbar, description))

    def _gradients(
        self, output: Tensor, X: Any, y: Any, uses: Sequence[LayerUse], generator: Generator
    ) -> Iterator[dict[LayerUse, Tensor]]:
        backward = WouldBePass(output, uses)
        for vector in self._fisher.vectors(output.detach(), X, y, generator):
            found: dict[LayerUse, Tensor] = {}
            backward.run(vector.to(output.dtype), found.__setitem__)
            yield {use: found[use] for use in uses if use in found}


def _own_parameters(
    model: nn.Module, params: list[Parameter] | Mapping[str, Parameter]
) -> list[Parameter]:
    """Return parameters as a list; raise if a dict has others than the model's of these names."""
    if not isinstance(params, Mapping):
        return params
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, p in params.items():
        if own.get(name) is not p:
            raise ValueError(
                f"params[{name!r}] is not model_func's parameter of this name. K-FAC is about "
                "layers and takes their own parameters, dict(model_func.named_parameters())."
            )
    return list(params.values())
