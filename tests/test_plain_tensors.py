"""Outputs and losses behave as plain tensors on steps that look at them."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from kfacopt import KFACOptimizer

X = torch.linspace(-1, 1, 24).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


def output(model):
    return model(X)


def loss(model):
    """A loss with a further term is computed from a probed tensor and stays one."""
    z = model(X)
    return F.cross_entropy(z, LABELS) + 1e-3 * z.pow(2).mean()


def number(model):
    return model(X)[0, 1]


def saved_by_torch(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def increased(x):
    x += 1
    return x


def sorted_by_identity(x):
    return [{x: 1}[x], {id(x): 2}[id(x)], hash(x) == id(x), x in {x}]


def in_place_views(x):
    x = x * 1
    x.view(-1)[0] = 5.0
    return x.clamp_(-2, 2)


def error_of(function):
    def message(x):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
            function(x)
        return type(caught.value), str(caught.value)

    return message


OF_ANY = {
    "repr": lambda x: repr(x.detach()),
    "str with a graph": lambda x: str(x * 2),
    "f-string": lambda x: f"{x.detach()} {x + 1}",
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "pickle of containers": lambda x: pickle.loads(pickle.dumps({"a": [x, (x,)]}))["a"][1][0],
    "copy": copy.copy,
    "deepcopy": error_of(copy.deepcopy),
    "deepcopy of the detached": lambda x: copy.deepcopy(x.detach()),
    "torch.save": saved_by_torch,
    "numpy": lambda x: x.detach().numpy(),
    "np.asarray": lambda x: np.asarray(x.detach()),
    "np.asarray with a graph": error_of(np.asarray),
    "numpy with a graph": error_of(lambda x: x.numpy()),
    "numpy by force": lambda x: x.numpy(force=True),
    "tolist": lambda x: x.tolist(),
    "hash": sorted_by_identity,
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "comparison": lambda x: (x > 0) & (x == x) & (x != 3),
    "logical": lambda x: bool((x.abs() >= 0).all()),
    "isinstance": lambda x: isinstance(x, torch.Tensor) and torch.is_tensor(x),
    "collation": lambda x: default_collate([x, x]),
    "in place": lambda x: increased(x * 1),
    "in-place views": in_place_views,
    "operators": lambda x: -x + 2 * x / 3 - x**2,
    "into a plain tensor": lambda x: torch.zeros_like(x).add_(x),
    "as a type": lambda x: torch.zeros(3, dtype=torch.float64).type_as(x),
    "data": lambda x: x.data,
    "new": lambda x: x.new_zeros(2),
    "shape": lambda x: (x.shape, x.ndim, x.dtype, x.device, x.stride(), x.is_leaf, x.requires_grad),
    "to": lambda x: x.to(torch.float64).cpu().contiguous(),
    "out": error_of(lambda x: torch.add(x, 1, out=torch.zeros(x.shape, requires_grad=True))),
    "a list's subclass": lambda x: torch.stack(type("List", (list,), {})([x, x])),
    "torch.func": lambda x: torch.func.vmap(torch.sin)(x.reshape(-1)),
}
OF_NUMBERS = {
    "format": lambda x: f"{x:.3f} {x:>10.2e} {x:g}",
    "float": lambda x: float(x.detach()),
    "item": lambda x: x.item(),
    "int": lambda x: int(x.detach() * 1000),
    "bool": lambda x: bool(x.detach() > 0.5),
    "complex": lambda x: complex(x.detach()),
    "round": lambda x: round(x.detach().item(), 3),
    "index": lambda x: [10, 20, 30][x.detach().long().clamp(0, 2)],
    "running sum": lambda x: sum([x, x]) / 2,
    "sum in place": lambda x: increased(x + 0),
    "repeated formats": lambda x: f"{x:.2f}|{x:8.4f}",
}
CASES = [
    *((make, name, f) for make in (output, loss, number) for name, f in OF_ANY.items()),
    *((make, name, f) for make in (loss, number) for name, f in OF_NUMBERS.items()),
]


def assert_same(a, b):
    if not isinstance(a, torch.Tensor):
        assert type(a) is type(b)
    if isinstance(a, torch.Tensor | np.ndarray):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bool((a == b).all())
    else:
        assert a == b
    assert getattr(a, "requires_grad", None) == getattr(b, "requires_grad", None)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize(
    ("make", "function"),
    [(make, f) for make, _, f in CASES],
    ids=[f"{make.__name__}, {name}" for make, name, _ in CASES],
)
def test_probed_tensors_behave_as_plain_ones(make, function):
    watched, alone = Network(), Network()
    optimizer = KFACOptimizer(watched.parameters())
    probed, plain = make(watched), make(alone)
    assert type(plain) is torch.Tensor
    assert_same(function(probed), function(plain))
    # what goes on from it arrives at the parameters
    probed.sum().backward()
    plain.sum().backward()
    for p, q in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    del optimizer


@pytest.mark.parametrize("interval", [1, 10])
def test_after_the_step_they_are_plain_tensors(interval):
    model = Network()
    optimizer = KFACOptimizer(model.parameters(), factor_update_interval=interval)
    z = model(X)
    value = F.cross_entropy(z, LABELS) + 1e-3 * z.pow(2).mean()
    value.backward()
    assert type(z) is not torch.Tensor  # else this test shows nothing
    optimizer.step()
    assert type(z) is torch.Tensor
    assert type(value) is torch.Tensor
    assert set(vars(z)) == set(vars(value)) == set()


def test_tensors_of_two_optimizers_stay_probed_for_the_other():
    body, head = nn.Linear(4, 5), nn.Linear(5, 3)
    optimizers = [KFACOptimizer(m.parameters()) for m in (body, head)]
    z = head(body(X))
    F.cross_entropy(z, LABELS).backward()
    optimizers[1].step()
    F.cross_entropy(z.detach() + body(X).sum() * 0, LABELS).backward()
    optimizers[0].step()
    assert type(z) is torch.Tensor
    assert all(
        "factor_updates" in o.state[m.weight] for o, m in zip(optimizers, (body, head), strict=True)
    )


class Named(torch.Tensor):
    """A subclass of others, which has a say in every function it is given to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if type(result) is torch.Tensor else result


def test_subclasses_of_others_have_their_say():
    model = Network()
    optimizer = KFACOptimizer(model.parameters())
    target = torch.zeros(6, 3).as_subclass(Named)
    z = model(X)
    value = F.mse_loss(z, target)
    assert type(value) is Named
    value.backward()
    optimizer.step()
    assert optimizer.factors("head").grad_output_factor.trace() > 0


class WithShapes(nn.Module):
    """Takes a shape and returns one beside its output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, shape):
        assert type(shape) is torch.Size
        return {"z": self.layer(x), "shape": x.shape}


def test_shapes_stay_shapes():
    model = Network()
    optimizer = KFACOptimizer(model.parameters())
    z = model(X)
    assert type(z.shape) is type(z.size()) is torch.Size
    assert torch.distributions.Categorical(logits=z).batch_shape.numel() == 6
    (F.mse_loss(z, torch.zeros(6, 3), reduction="sum") / z.shape.numel()).backward()
    optimizer.step()
    model = WithShapes()
    optimizer = KFACOptimizer(model.parameters())
    out = model(X, X.shape)
    assert type(out["shape"]) is torch.Size
    F.cross_entropy(out["z"], LABELS).backward()
    optimizer.step()
    assert optimizer.statistics()["layer/factor_age"] == 0


def test_libraries_that_go_by_the_name_of_a_class_take_it_for_a_tensor():
    """opt_einsum looks for a backend of the module's name, wandb for a class of torch's."""
    opt_einsum = pytest.importorskip("opt_einsum")
    model = Network()
    optimizer = KFACOptimizer(model.parameters())
    z = model(X)
    assert (type(z).__module__, type(z).__qualname__) == ("torch", "Tensor")
    product = opt_einsum.contract("ij,ik->jk", z, z)
    assert torch.allclose(product, (z.T @ z))
    F.cross_entropy(z, LABELS).backward()
    optimizer.step()
    assert optimizer.statistics()["first/factor_age"] == 0
