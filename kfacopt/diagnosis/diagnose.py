"""`kfacopt.diagnose`, whose measurements are in `measurement`; what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn

from kfacopt.data import Batch, evaluation
from kfacopt.diagnosis.assembly import complete, report_of
from kfacopt.diagnosis.clock import Clock
from kfacopt.diagnosis.cost import cost_of
from kfacopt.diagnosis.plan import check_arguments, evaluation_mode, make_plan
from kfacopt.diagnosis.report import Diagnosis
from kfacopt.diagnosis.sample import generators_put_back
from kfacopt.diagnosis.subject import Limits, take
from kfacopt.diagnosis.words import own_words
from kfacopt.optim.kfac import KFACOptimizer


def diagnose(
    model: nn.Module,
    loss_func: Callable[[Tensor, Any], Tensor],
    data: Iterable[Batch],
    optimizer: KFACOptimizer | None = None,
    *,
    damping: float | None = None,
    layers: Collection[type[nn.Module]] | None = None,
    max_batches: int = 4,
    max_data: int | None = None,
    max_seconds: float = 100.0,
    seed: int = 0,
    progressbar: bool = False,
    batch_size_fn: Callable[[Any], int] | None = None,
) -> Diagnosis:
    r"""Compare K-FAC with the exact GGN on a sample of data, and say what follows.

    With F the GGN over the parameters θ that K-FAC covers, F_l its diagonal block of layer l, g the
    gradient and δ the damping, the report has, on one sample of data,

    - for each block and M_l of K-FAC (expand and reduce) and EKFAC, ‖M_l − F_l‖_F / ‖F_l‖_F;
    - the cosine of the steps (M + δI)⁻¹ g, of diag(F_l + δI)⁻¹ g and of g to (F + δI)⁻¹ g, and that
      of their parts; the share of the best decrease of gᵀd + ½ dᵀ(F + δI)d that each reaches at its
      best length; and what the loss falls by there, on the sample and on data that follow, over
      what gᵀd + ½ dᵀFd says;
    - 1 − Σ_l ‖F_l‖²_F / ‖F‖²_F, the share of curvature outside of the blocks;
    - rank, condition and eigenvalues of each A and G, δ beside those of G ⊗ A, and π;
    - with an optimizer, its direction for g by its running inverses, and as far as its `lr` and
      KL clip go along that; how far its running factors are from those of the sample; and what its
      steps cost beside a forward and a backward pass and AdamW.

    F is that of `GGNLinearOperator`. A block of at most 1,024 parameters is formed where that is
    cheap, a larger one multiplied onto 16 vectors v of random signs (4 where products are
    expensive): E‖(M_l − F_l) v‖² is the squared distance, and its error the jackknife's over these.
    (F + δI)⁻¹ g is solved for by conjugate gradients to a relative residual of 1e-5 or up to a
    number of iterations; the report says how far it came, and compares nothing with what is far
    from it. Numbers follow from the arguments alone, but for the cost, and unless time runs out,
    which the report says. Costs are of copies of model, loss and optimizer. Model (in evaluation
    mode meanwhile), gradients, buffers and generators of random numbers are as before afterwards.
    Memory: factors and inverses of all candidates, some dozens of vectors of θ's size, and what
    passes of the sample keep; then the copies.

    `docs/diagnose.md` has an example of a report, and all formulas.

    Args:
        model: The network.
        loss_func: The loss, of predictions and targets; see `KFACLinearOperator`. Without a
            `reduction` it is tried on a batch that comes twice; if it is neither a mean nor a sum,
            one batch is looked at.
        data: Batches `(X, y)`, of which the first ones are read.
        optimizer: Its layers, damping, settings and running factors are looked at; it is not
            changed.
        damping: δ > 0, in units of F; `None` is the optimizer's, or `KFACOptimizer`'s default.
        layers: Which kinds of modules are layers, as for `KFACOptimizer`; not with an optimizer.
        max_batches: How many batches are looked at, at most.
        max_data: How many data (entries of the first axis), at most. `None`: so many that a forward
            pass takes about 2e9 multiplications, at most 1,024, at least one. Where tensors of a
            batch have first axes of several lengths, the first batch alone is looked at.
        max_seconds: When to stop measuring; a single product is not interrupted.
        seed: Of labels and probes.
        progressbar: Show a bar.
        batch_size_fn: A function from X to the number of data, see `KFACLinearOperator`.

    Returns:
        The report: `print` shows tables and advice, `to_dict()` returns plain data, and `plot()`
        draws a picture (with matplotlib).

    Raises:
        ValueError: If an argument is out of its range, K-FAC covers no parameter, or the gradient
            is not finite.
        TypeError: If the model does not return one tensor.
        UnsupportedLossError: If the loss has no curvature in the model's predictions.
        RuntimeError: If the model gives different predictions for the same data.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> report = diagnose(model, nn.CrossEntropyLoss(), data, damping=0.01)
        >>> [layer.layer for layer in report.layers]
        ['0', '2']
        >>> [step.step for step in report.steps]
        ['gradient', 'K-FAC', 'EKFAC', 'exact blocks']
        >>> all(step.cosine > 0 for step in report.steps)
        True
    """
    settings = {"damping": damping, "layers": layers, "progressbar": progressbar}
    limits = Limits(max_batches, max_data, max_seconds, seed, batch_size_fn)
    check_arguments(model, loss_func, data, optimizer, settings | vars(limits))
    clock = Clock(max_seconds, progressbar)
    try:
        with (
            own_words(),
            generators_put_back(data),
            evaluation_mode(model, loss_func) as changed,
            evaluation(model, loss_func),
        ):
            if type(model).__name__ == "OptimizedModule":  # of torch.compile
                model = model.get_submodule("_orig_mod")
            plan = make_plan(model, loss_func, optimizer, damping, layers)
            subject = take(model, loss_func, data, plan, limits, clock)
            report = report_of(subject, changed)
        with generators_put_back(data):
            return complete(report, subject, *cost_of(subject, optimizer))
    finally:
        clock.close()
