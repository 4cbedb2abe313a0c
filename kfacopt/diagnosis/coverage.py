"""Which parameters K-FAC covers, and why it does not cover others; no curvature."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn import Parameter

from kfacopt.argument_checks import checked_output
from kfacopt.data import Batch, to_device
from kfacopt.kfac.capture import LayerUse, capture
from kfacopt.kfac.choice import Choice
from kfacopt.kfac.data_axes import DataAxes
from kfacopt.kfac.layers import Block, Kinds, all_kinds, described, families_of, find_layers
from kfacopt.kfac.matrix_layouts import MatrixLayout
from kfacopt.kfac.operator_layers import layers_of, parameters_of
from kfacopt.kfac.unrolled import unrolled
from kfacopt.kfac.unseen_uses import edges_of, is_undercounted, past_modules


@dataclass(frozen=True)
class Coverage:
    """What K-FAC covers of a model.

    Attributes:
        params: The parameters in layers.
        uncovered: The names of the other trained parameters, with the reason.
        outputs: How many entries the predictions for a datum have.
        operations: About how many multiplications a forward pass takes.
    """

    params: list[Parameter]
    uncovered: dict[str, str]
    outputs: int
    operations: int


class _Uses:
    """What is seen of layers, batch by batch.

    Args:
        model: The model.
        params: Its trained parameters.
        kinds: The kinds of modules that are layers.
        separate: Whether W and b have blocks of their own.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Parameter], kinds: Kinds, separate: bool
    ) -> None:
        self._model, self.choice = model, Choice.of(model.modules(), kinds, corrected=False)
        self._layers = find_layers(model.named_modules(), params, separate, kinds)
        self.layer_of = parameters_of(self._layers)
        others = [p for p in params if p not in self.layer_of and p.numel()]
        self._free = [p for p in others if p.is_floating_point() and self.choice.looks_for(p)]
        self.axes = DataAxes()
        own = {id(p) for p in params}
        self._unrolled = [
            m for m in model.modules() if any(id(p) in own for p in m._parameters.values())
        ]
        self.found: dict[Parameter, MatrixLayout] = {}
        self.reached: set[Parameter] = set()
        self.otherwise: set[Parameter] = set()
        self.tied: set[Parameter] = set()
        self.reasons: dict[Parameter, str] = {}
        self.outputs = self.operations = 0

    def look(self, batch: Batch) -> None:
        """Add what a batch's forward pass shows."""
        device = next(self._model.parameters()).device
        X = to_device(batch[0], device)
        with capture(self._layers) as uses, unrolled(self._unrolled):
            output = checked_output(self._model(X))
        edges = edges_of(output)
        free = [p for p in self._free if p not in self.found]
        entries = (self.axes, [output]) if self.choice.by_entries else None
        past = past_modules(edges, uses, self.layer_of, free, entries, free)
        self.reasons |= past.reasons
        for p, layout in past.found.items():
            if layout.is_tied:
                self.tied.add(p)
            elif self.choice.makes_layer(p, layout) and p not in self.layer_of:
                self.found[p] = layout
        uses = [*uses, *past.uses]
        for p in past.rest:
            if is_undercounted(edges, [output], uses, p):
                layer = self.layer_of[p]
                self.otherwise |= {q for q in (layer.weight, layer.bias) if q is not None}
        self.reached |= {
            p for use in uses for p in (use.layer.weight, use.layer.bias) if p is not None
        }
        self._count(output, uses)

    def _count(self, output: Tensor, uses: Sequence[LayerUse]) -> None:
        self.outputs = max(self.outputs, output[:1].numel())
        rows = max(len(output), 1) if output.ndim else 1
        for use in uses:
            # of the output, which has one entry for each row of a and of W
            entries = prod(use.edge.node._input_metadata[use.edge.output_nr].shape)
            rows = max(rows, entries // max(use.layer.d_out, 1))
            self.operations += entries * (1 if use.layer.diagonal_input else use.layer.d_in)
        self.operations += sum(p.numel() for p in self.found) * rows


def find_coverage(
    model: nn.Module,
    batches: Sequence[Batch],
    kinds: Kinds,
    separate: bool,
    allowed: Collection[Parameter] | None,
) -> Coverage:
    """Return which trained parameters of a model K-FAC covers.

    Args:
        model: The model.
        batches: Data that tell how it uses its parameters.
        kinds: The kinds of modules that are layers.
        separate: Whether W and b have blocks of their own.
        allowed: The parameters of an optimizer, if there is one.
    """
    names = {p: name for name, p in model.named_parameters()}
    trained = [p for p in names if p.requires_grad]
    own = [p for p in trained if allowed is None or p in allowed]
    uses = _Uses(model, own, kinds, separate)
    for batch in batches:
        uses.look(batch)
    mine = set(own)
    biases = {x.bias for x in uses.found.values() if x.bias is not None}
    covered, uncovered = [], {}
    for p in trained:
        of_product = p in uses.found or (p in biases and p in mine and p not in uses.layer_of)
        of_module = p in uses.layer_of and p in uses.reached
        of_module = of_module and p not in uses.otherwise and p not in uses.tied
        if of_product or of_module:
            covered.append(p)
        else:
            uncovered[names[p]] = _reason(p, model, uses, allowed)
    return Coverage(covered, uncovered, uses.outputs, uses.operations)


def _reason(
    p: Parameter, model: nn.Module, uses: _Uses, allowed: Collection[Parameter] | None
) -> str:
    if allowed is not None and p not in allowed:
        return "not one of the optimizer's"
    if p in uses.tied:
        return "an embedding tied to a head, which is not looked at here"
    if p in uses.otherwise:
        return "used in other ways than by calls of its layer, too"
    if p in uses.axes.reasons:
        return uses.axes.reasons[p]
    if p in uses.layer_of:
        return "not used for these data"
    if id(p) in uses.choice.left_out:
        return f"in {uses.choice.left_out[id(p)]}, which layers= does not name"
    owners = [m for m in model.modules() if any(q is p for q in m._parameters.values())]
    known = all(isinstance(m, all_kinds()) and families_of(m) for m in owners)
    kinds = tuple(dict.fromkeys(type(m) for m in owners))
    if known and len(owners) == 1:
        return f"in {described(kinds)}, which layers= does not name"
    if known:
        return f"shared by {described(kinds)}"
    return uses.reasons.get(p, "in no layer that K-FAC knows")


def blocks_of(
    model: nn.Module, params: Sequence[Parameter], separate: bool, batches: Sequence[Batch]
) -> list[Block]:
    """Return the diagonal blocks of the layers of covered parameters, as the operators have them.

    Args:
        model: The model.
        params: The parameters.
        separate: Whether W and b have blocks of their own.
        batches: Data that show products past the calls of modules.
    """
    device = params[0].device

    def on_device() -> list[Batch]:
        return [(to_device(X, device), to_device(y, device)) for X, y in batches]

    layers = layers_of(model, params, separate, on_device)
    return [block for layer, _ in layers for block in layer.blocks]
