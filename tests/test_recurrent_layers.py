"""Recurrent modules are layers of an optimizer if `layers=` names their kind, and AdamW's else."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from kfacopt import KFACLinearOperator, KFACOptimizer, default_layers
from kfacopt.kfac.matrix_uses import graph_parents

D_IN, D = 3, 4
KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
    "RNNCell": nn.RNNCell,
}
X = torch.linspace(-1, 1, 90).reshape(6, 5, D_IN).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2])


class Network(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.recurrent, self.head = kind(D_IN, D), nn.Linear(D, 3)

    def forward(self, x):
        if isinstance(self.recurrent, nn.RNNBase):
            return self.head(self.recurrent(x)[0][-1])
        state = None
        for x_t in x:
            state = self.recurrent(x_t, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def train(model, optimizer, steps):
    """Return the losses, and whether the fused LSTM ran in each step."""
    losses, fused = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        nodes = graph_parents([get_gradient_edge(loss)], {})
        fused.append(any(node.name() == "MkldnnRnnLayerBackward0" for node in nodes))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, fused


def preconditioned(optimizer):
    return {p.parameter for p in optimizer.describe().parameters if p.preconditioned}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_by_default_they_are_adamws_and_the_description_says_why(kind):
    model = Network(kind)
    optimizer = KFACOptimizer(model.parameters(), factor_update_interval=1)
    losses, _ = train(model, optimizer, 4)
    assert losses[-1] < losses[0]
    assert preconditioned(optimizer) == {"head.weight", "head.bias"}
    why = {p.curvature for p in optimizer.describe().parameters if "recurrent" in p.parameter}
    assert why == {f"AdamW: nn.{kind.__name__} is not among layers="}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_named_they_have_curvature(kind):
    model = Network(kind)
    optimizer = KFACOptimizer(
        model.parameters(), layers=[*default_layers(), kind], factor_update_interval=1
    )
    train(model, optimizer, 3)
    assert preconditioned(optimizer) == {name for name, _ in model.named_parameters()}


def test_by_default_the_fused_kernel_runs_in_every_step():
    model = Network(nn.LSTM)
    _, fused = train(model, KFACOptimizer(model.parameters(), factor_update_interval=1), 3)
    if not train(Network(nn.LSTM), torch.optim.SGD(model.parameters()), 1)[1][0]:
        pytest.skip("this torch has no fused LSTM on the CPU")
    assert all(fused)


class Free(nn.Module):
    """A recurrent module beside a matrix that is multiplied by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.recurrent = nn.Parameter(torch.randn(D, 3)), nn.LSTM(D_IN, D)

    def forward(self, x):
        return self.recurrent(x)[0][-1] @ self.kernel


@pytest.mark.parametrize(
    ("layers", "names"),
    [([nn.LSTM], ("recurrent",)), ([nn.Linear], ("kernel",)), ([nn.GRU, nn.Conv2d], ())],
    ids=["LSTM", "Linear", "GRU"],
)
@pytest.mark.filterwarnings("ignore:KFACOptimizer. none of the parameters")
def test_only_what_is_named(layers, names):
    model = Free()
    optimizer = KFACOptimizer(model.parameters(), layers=layers, factor_update_interval=1)
    train(model, optimizer, 3)
    own = {name for name, _ in model.named_parameters() if name.split(".")[0] in names}
    assert preconditioned(optimizer) == own


class Same(nn.LSTM):
    """A subclass that does not compute anything else."""


class ByHand(nn.RNNCell):
    """One that computes by itself: its products are as good as any."""

    def forward(self, x, h=None):
        z = F.linear(x, self.weight_ih, self.bias_ih)
        return (z if h is None else z + F.linear(h, self.weight_hh, self.bias_hh)).tanh()


def test_subclasses_count_as_for_other_kinds():
    model = Network(Same)
    optimizer = KFACOptimizer(model.parameters(), layers=[nn.LSTM], factor_update_interval=1)
    train(model, optimizer, 3)
    assert len(preconditioned(optimizer)) == 4
    model = Network(ByHand)
    optimizer = KFACOptimizer(model.parameters(), factor_update_interval=1)
    train(model, optimizer, 3)
    assert len(preconditioned(optimizer)) == 6


def test_a_model_of_nothing_else_is_adamws_and_says_so():
    model = nn.LSTM(D_IN, D)
    with pytest.warns(UserWarning, match="none of the parameters is in"):
        optimizer = KFACOptimizer(model.parameters())
    F.mse_loss(model(X)[0], torch.ones(6, 5, D)).backward()
    optimizer.step()
    assert optimizer.statistics()["fallback_parameters"] == 4.0


def test_a_self_tuned_run_evaluates_them_all_the_same():
    model = Network(nn.LSTM)
    losses, _ = train(model, KFACOptimizer(model.parameters(), lr="auto"), 6)
    assert losses[-1] < losses[0]


def test_the_operators_know_them_always():
    model = Network(nn.LSTM)
    data = [(X, LABELS)]
    options = {"check_deterministic": False, "batch_size_fn": lambda x: x.shape[1]}
    kfac = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, **options
    )
    assert "recurrent.weight_hh_l0" in kfac.layer_names
    assert float(kfac.trace()) > 0
