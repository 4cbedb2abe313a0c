"""Weights that are used past their modules: K-FAC names them, or has their whole block."""

import dense_curvature as dense
import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from kfacopt import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from kfacopt.kfac.capture import capture
from kfacopt.kfac.layers import find_layers
from kfacopt.kfac.unseen_uses import is_undercounted, unseen_parameters

DTYPE = torch.float64
TOLERANCE = 1e-12  # of float64 products with entries of about 1
D = 3
OPERATORS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}


class Net(nn.Module):
    """Two layers, the first of which `forward(net, x)` may use in its own way."""

    def __init__(self, forward):
        super().__init__()
        self.layer, self.head = nn.Linear(D, D, dtype=DTYPE), nn.Linear(D, D, dtype=DTYPE)
        self.hidden = [nn.Linear(D, D, dtype=DTYPE)]  # a list: no module of the network's
        self.hidden[0].weight = self.layer.weight
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


class PlusOther(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.other = [other]

    def forward(self, weight):
        return weight + self.other[0].weight


def gradient_by_input(net, x):
    x = x.detach().requires_grad_()
    value = net.head(net.layer(x).tanh()).sum()
    return torch.autograd.grad(value, x, create_graph=True)[0]


def cases():
    def f(net, x):
        return net.head(net.layer(x).tanh()).sum()

    return {
        "functional": lambda n, x: n.head(F.linear(x, n.layer.weight).tanh()),
        "matmul": lambda n, x: n.head(torch.tanh(x @ n.layer.weight.T)),
        "einsum": lambda n, x: n.head(torch.einsum("ni,oi->no", x, n.layer.weight).tanh()),
        "forward called": lambda n, x: n.head(n.layer.forward(x).tanh()),
        "both": lambda n, x: n.head(n.layer(x).tanh() + F.linear(x, n.layer.weight)),
        "both, before": lambda n, x: n.head(n.layer(F.linear(x, n.layer.weight).tanh())),
        "scaled": lambda n, x: n.head(F.linear(x, 2 * n.layer.weight).tanh()),
        "both, behind": lambda n, x: F.linear(n.head(n.layer(x).tanh()), n.layer.weight.T),
        "a row of it": lambda n, x: n.head(n.layer(x).tanh()) + n.layer.weight[0],
        "one output": lambda n, x: torch.cat(
            [n.head(n.layer(x))[:, :2], x @ n.layer.weight[2:].T], 1
        ),
        "on the left": lambda n, x: n.head(n.layer(x) + (n.layer.weight @ x.T).T),
        "at vectors": lambda n, x: n.head(n.layer(x) + torch.mv(n.layer.weight, x[0])),
        "some inputs": lambda n, x: n.head(n.layer(x) + x[:, 1:] @ n.layer.weight[:, 1:].T),
        "scaled product": lambda n, x: n.head(
            torch.addmm(n.layer(x), x, n.layer.weight.T, alpha=2)
        ),
        "in a checkpoint": lambda n, x: checkpoint(
            lambda x: n.head(n.layer(x) + (x @ n.layer.weight.T).sin()), x, use_reentrant=False
        ),
        "a small part": lambda n, x: n.head(n.layer(x)) + 1e-6 * (x @ n.layer.weight.T),
        "penalty": lambda n, x: n.head(n.layer(x).tanh()) + n.layer.weight.square().sum(),
        "hidden module": lambda n, x: n.head(n.layer(x).tanh() + n.hidden[0](x)),
        "input of a layer": lambda n, x: n.head(n.layer(x)) + n.head(n.layer.weight.exp()).sum(),
        "scaled weight": lambda n, x: n.head(
            functional_call(n.layer, {"weight": 2 * n.layer.weight}, (x,))
        ),
        "checkpointed": lambda n, x: checkpoint(
            lambda x: n.head(n.layer(x).tanh() + x @ n.layer.weight), x, use_reentrant=False
        ),
        "input's gradient": gradient_by_input,
        "func.grad": lambda n, x: grad(lambda x: f(n, x))(x),
        "func.jacrev": lambda n, x: jacrev(lambda x: f(n, x))(x),
        "func.jvp": lambda n, x: jvp(lambda x: n.head(n.layer(x).tanh()), (x,), (x,))[1],
        "func.vmap": lambda n, x: vmap(lambda x: n.head(n.layer(x).tanh()))(x),
    }


CASES = cases()
# Products with the whole weight, as the layer has them: further uses of it.
PRODUCTS = ["functional", "matmul", "einsum", "forward called", "func.vmap"]
SEVERAL = ["both", "both, before", "a small part", "hidden module", "func.jvp", "one output"]
SEVERAL += ["on the left", "at vectors", "some inputs", "scaled product", "in a checkpoint"]
UNSEEN = {name: case for name, case in CASES.items() if name not in {*PRODUCTS, *SEVERAL}}


def loss_and_data(num_data=4):
    torch.manual_seed(1)
    X, y = torch.rand(num_data, D, dtype=DTYPE), torch.randint(D, (num_data,))
    return nn.CrossEntropyLoss(), [(X, y)]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("forward", UNSEEN.values(), ids=UNSEEN)
def test_unseen_uses_are_refused_by_name(forward, operator):
    """Else the block would be zero, or too small."""
    net = Net(forward)
    K = operator(net, *loss_and_data()[:1], [net.layer.weight], loss_and_data()[1])
    with pytest.raises(NotImplementedError, match=r"'layer\.weight' other than by calling"):
        K @ torch.ones(K.shape[1], dtype=DTYPE)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself
@pytest.mark.parametrize("name", [*PRODUCTS, *SEVERAL])
def test_products_past_the_module_have_their_whole_block(name):
    """For one datum and one use K-FAC is exact; of several uses it has all, as `Σ g aᵀ` tells."""
    net, (loss, data) = Net(CASES[name]), loss_and_data(1)
    params = [net.layer.weight, net.head.weight]
    K = KFACLinearOperator(net, loss, params, data, fisher_type="type-2")
    found = K @ torch.eye(2 * D * D, dtype=DTYPE)
    expected = dense.ggn(net, loss, params, data)
    own, head = slice(D * D), slice(D * D, None)
    torch.testing.assert_close(found[head, head], expected[head, head], **close())
    if name in PRODUCTS:
        torch.testing.assert_close(found[own, own], expected[own, own], **close())
    E = EKFACLinearOperator(net, loss, params, data, fisher_type="type-2")
    # Λ is the diagonal of the exact block in a basis, so that their traces are the same.
    exact = expected[own, own].trace()
    corrected = E @ torch.eye(2 * D * D, dtype=DTYPE)
    torch.testing.assert_close(corrected[own, own].trace(), exact, **close())


def test_the_way_out_is_one():
    """Without the parameter K-FAC has the other block, and the GGN is exact for all."""
    net, (loss, data) = Net(UNSEEN["scaled"]), loss_and_data(1)
    params = [net.head.weight]
    K = KFACLinearOperator(net, loss, params, data, fisher_type="type-2")
    expected = dense.ggn(net, loss, params, data)
    torch.testing.assert_close(K @ torch.eye(D * D, dtype=DTYPE), expected, **close())
    params = [net.layer.weight, net.head.weight]
    G = GGNLinearOperator(net, loss, params, data)
    expected = dense.ggn(net, loss, params, data)
    torch.testing.assert_close(G @ torch.eye(2 * D * D, dtype=DTYPE), expected, **close())


def close():
    return {"rtol": TOLERANCE, "atol": TOLERANCE}


def in_place(n, x):
    h = n.layer(x)
    return n.head(h.relu_())


SEEN = {
    "modules": lambda n, x: n.head(n.layer(x).tanh()),
    "in place": in_place,
    "a term of weight 0": lambda n, x: n.head(n.layer(x)) + 0 * n.layer.weight.sum(),
    "detached": lambda n, x: n.head(n.layer(x)) + x @ n.layer.weight.detach(),
    "checkpointed": lambda n, x: checkpoint(
        lambda x: n.head(n.layer(x).tanh()), x, use_reentrant=False
    ),
    "input requires gradients": lambda n, x: n.head(n.layer(x.requires_grad_()).tanh()),
}


@pytest.mark.parametrize("forward", SEEN.values(), ids=SEEN)
def test_uses_that_are_seen_have_their_whole_block(forward):
    """For one datum K-FAC is exact."""
    net, (loss, data) = Net(forward), loss_and_data(1)
    params = [net.layer.weight, net.head.weight]
    K = KFACLinearOperator(net, loss, params, data, fisher_type="type-2")
    expected = dense.ggn(net, loss, params, data)
    found = K @ torch.eye(len(expected), dtype=DTYPE)
    for own in (slice(D * D), slice(D * D, None)):
        torch.testing.assert_close(found[own, own], expected[own, own], **close())


def test_parametrisations_of_others_are_uses():
    net, (loss, data) = Net(SEEN["modules"]), loss_and_data()
    parametrize.register_parametrization(net.head, "weight", PlusOther(net.layer))
    K = KFACLinearOperator(net, loss, [net.layer.weight], data)
    with pytest.raises(NotImplementedError, match=r"'layer\.weight' other than by"):
        K.trace()


def test_checkpointing_with_reentry_is_refused():
    """Its parts are not in the graph, and torch's derivatives by what they use are zero."""
    net = Net(lambda n, x: n.head(checkpoint(n.layer, x.requires_grad_(), use_reentrant=True)))
    loss, data = loss_and_data()
    K = KFACLinearOperator(net, loss, [net.layer.weight], data)
    with pytest.raises(NotImplementedError, match="checkpoint with use_reentrant=False"):
        K.trace()


def test_autocast_shares_a_cast_between_seen_and_unseen_uses():
    """Autocast keeps a weight's cast for all of its uses."""
    net, (loss, data) = Net(CASES["both, behind"]).float(), loss_and_data()
    data = [(X.float(), y) for X, y in data]
    with torch.autocast("cpu", torch.bfloat16):
        K = KFACLinearOperator(net, loss, [net.layer.weight], data)
        with pytest.raises(NotImplementedError, match=r"'layer\.weight' other than by"):
            K.trace()
        plain = Net(SEEN["a term of weight 0"]).float()
        assert KFACLinearOperator(plain, loss, [plain.layer.weight], data).trace() > 0


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_layers_that_are_never_used_have_zero_blocks(operator):
    """So they have in the GGN, also where no layer is used, or nothing depends on parameters."""
    loss, data = loss_and_data()
    for forward in (lambda n, x: n.head(x), lambda n, x: x, lambda n, x: x @ n.head.weight):
        net = Net(forward)
        K = operator(net, loss, [net.layer.weight, net.layer.bias], data, fisher_type="type-2")
        assert not (K @ torch.ones(D * D + D, dtype=DTYPE)).any()
        inverse = K.inverse(0.5) @ torch.ones(D * D + D, dtype=DTYPE)
        torch.testing.assert_close(inverse, 2 * torch.ones_like(inverse))


def test_compiled_models_have_the_blocks_of_the_model():
    """Compiled code would ignore the hooks that see the calls."""
    net, (loss, data) = Net(SEEN["modules"]), loss_and_data()
    params = [net.layer.weight, net.head.weight]
    expected = KFACLinearOperator(net, loss, params, data).trace()
    compiled = torch.compile(net, backend="eager")
    compiled(data[0][0])
    assert KFACLinearOperator(compiled, loss, params, data).trace() == expected
    net.layer.compile(backend="eager")
    assert KFACLinearOperator(net, loss, params, data).trace() == expected


def test_the_search_tells_compiled_code_by_its_derivatives():
    """Compiled code is one node of the graph, which hides what leads where."""
    for name, undercounted in (("scaled", True), ("a term of weight 0", False)):
        net = Net({**UNSEEN, **SEEN}[name])
        X, weight = loss_and_data()[1][0][0], net.layer.weight
        with capture(find_layers(net.named_modules(), [weight], True)) as uses:
            z = net(X)
        edges = [get_gradient_edge(z)]
        assert unseen_parameters(edges, uses, [net.head.weight, weight])[-1] is weight
        assert is_undercounted(edges, [z], uses, weight) == undercounted
