"""Operations of torch that lack derivatives, and compiled code, in all exact operators."""

import dense_curvature as dense
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfacopt
from kfacopt.experimental import ActivationHessianLinearOperator

DTYPE = torch.float64
ROUND_OFF = 1e-12
COLUMNS = 9
LOSS = nn.CrossEntropyLoss()


class Bag(nn.Module):
    """`nn.EmbeddingBag` by an embedding, or itself."""

    def __init__(self, bag, options):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 2)
        self.scales = nn.Parameter(torch.randn(4, 3)) if options.get("mode") == "sum" else None
        self.bag, self.options = bag, options

    def forward(self, ids):
        if self.bag:
            rows = F.embedding_bag(ids, self.weight, per_sample_weights=self.scales, **self.options)
            return self.head(rows).tanh()
        return self.head(self.rows(F.embedding(ids, self.weight), ids)).tanh()

    def rows(self, rows, ids):
        kept = (ids != self.options.get("padding_idx", -1)).unsqueeze(-1)
        mode = self.options.get("mode", "mean")
        if mode == "max":
            largest = rows.masked_fill(~kept, -torch.inf).amax(1)
            return torch.where(kept.any(1), largest, torch.zeros(()))
        if mode == "sum":
            rows = rows * self.scales.unsqueeze(-1)
        sums = (rows * kept).sum(1)
        return sums / kept.sum(1).clamp(min=1) if mode == "mean" else sums


class BiasAlone(nn.Module):
    """A normalisation with a bias and no weight; or with a weight of ones."""

    def __init__(self, norm, plain):
        super().__init__()
        self.first, self.bias, self.last = (
            nn.Linear(2, 4),
            nn.Parameter(torch.randn(4)),
            nn.Linear(4, 2),
        )
        self.norm, self.plain = norm, plain

    def forward(self, x):
        weight = None if self.plain else torch.ones(4)
        return self.last(self.norm(self.first(x), weight, self.bias))


def layer_norm(x, weight, bias):
    return F.layer_norm(x, (4,), weight, bias)


def layer_norm_of_torch(x, weight, bias):
    return torch.layer_norm(x, (4,), weight=weight, bias=bias)


def group_norm(x, weight, bias):
    return F.group_norm(x, 2, weight, bias)


def batch_norm(x, weight, bias):
    return F.batch_norm(x, None, None, weight=weight, bias=bias, training=True)


def instance_norm(x, weight, bias):
    x = x.unsqueeze(-1) * torch.tensor([1.0, 2.0, -1.0])
    return F.instance_norm(x, None, None, weight, bias).square().sum(-1)


def embeddings(**options):
    model = nn.Sequential(nn.Embedding(6, 4, **options), nn.Flatten(), nn.Linear(12, 2), nn.Tanh())
    same = nn.Sequential(nn.Embedding(6, 4), *model[1:])
    same[0].weight = model[0].weight
    return model, same


class Graph(nn.Module):
    """A graph convolution with a sparse or a dense adjacency."""

    def __init__(self, adjacency):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x):
        return self.layer(self.adjacency @ x).tanh()


class SparseInput(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.weight, self.sparse = nn.Parameter(torch.randn(2, 2)), sparse

    def forward(self, x):
        return (
            torch.sparse.mm(x.to_sparse(), self.weight) if self.sparse else x @ self.weight
        ).tanh()


def bag(**options):
    return lambda: (Bag(True, options), Bag(False, options))


def bias_alone(norm):
    return lambda: (BiasAlone(norm, True), BiasAlone(norm, False))


ADJACENCY = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 1, 1]], dtype=DTYPE)
IDS = torch.tensor([[0, 1, 2], [2, 2, 5], [5, 5, 5], [3, 0, 0]])
CASES = {
    "sparse embedding": lambda: embeddings(sparse=True),
    "embedding by frequency": lambda: embeddings(scale_grad_by_freq=True),
    "bag, mean": bag(),
    "bag, mean with padding": bag(padding_idx=5),
    "bag, sum with weights": bag(mode="sum"),
    "bag, max": bag(mode="max"),
    "bag, max with padding": bag(mode="max", padding_idx=5),
    "bag, sparse": bag(sparse=True),
    "layer norm": bias_alone(layer_norm),
    "torch.layer_norm": bias_alone(layer_norm_of_torch),
    "group norm": bias_alone(group_norm),
    "batch norm": bias_alone(batch_norm),
    "instance norm": bias_alone(instance_norm),
    "sparse buffer": lambda: (Graph(ADJACENCY.to_sparse()), Graph(ADJACENCY)),
    "compressed buffer": lambda: (Graph(ADJACENCY.to_sparse_csr()), Graph(ADJACENCY)),
    "sparse on the way": lambda: (SparseInput(True), SparseInput(False)),
}


def loader_of(data):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data[0]), batch_size=4)


SOURCES = {
    "list": lambda data: (data, {}),
    "loader": lambda data: (loader_of(data), {}),
    "nothing kept": lambda data: (data, {"cache_bytes": 0}),
}


def assert_all_operators(model, same, data, sources, loss=LOSS):
    params, same_params = list(model.parameters()), list(same.parameters())
    size = sum(p.numel() for p in params)
    J = dense.jacobian(same, same_params, data)
    expected = {
        kfacopt.HessianLinearOperator: dense.hessian(same, LOSS, same_params, data),
        kfacopt.GGNLinearOperator: dense.ggn(same, LOSS, same_params, data),
        kfacopt.JacobianLinearOperator: J,
        kfacopt.TransposedJacobianLinearOperator: J.T,
    }
    eye = torch.eye(size, dtype=DTYPE)
    for operator in (kfacopt.EFLinearOperator, kfacopt.FisherMCLinearOperator):
        expected[operator] = operator(same, LOSS, same_params, data, cache_bytes=0) @ eye
    for source in sources:
        batches, options = SOURCES[source](data)
        for operator, matrix in expected.items():
            losses = () if "Jacobian" in operator.__name__ else (loss,)
            A = operator(model, *losses, params, batches, **options)
            V = torch.randn(A.shape[1], COLUMNS, dtype=DTYPE)
            for columns in (1, COLUMNS, 1, COLUMNS):
                found = A @ V[:, :columns]
                torch.testing.assert_close(
                    found, matrix @ V[:, :columns], rtol=ROUND_OFF, atol=ROUND_OFF
                )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CASES)
def test_operations_in_all_operators(name, source):
    model, same = CASES[name]()
    for p, q in zip(same.parameters(), model.parameters(), strict=True):
        p.data.copy_(q)
    uses_ids = "emb" in name or "bag" in name
    X = IDS if uses_ids else torch.randn(4, 2, dtype=DTYPE)
    assert_all_operators(model, same, [(X, torch.tensor([0, 1, 1, 0]))], [source])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_sparse_inputs():
    weight = nn.Parameter(torch.randn(3, 2, dtype=DTYPE))
    X, y = torch.randn(4, 3, dtype=DTYPE).relu(), torch.randint(2, (4,))
    expected = dense.ggn(lambda X: (X @ weight).tanh(), LOSS, [weight], [(X, y)])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return (x @ self.weight).tanh()

    for layout in (X.to_sparse(), X.to_sparse_csr()):
        G = kfacopt.GGNLinearOperator(Net(), LOSS, [weight], [(layout, y)])
        for _ in range(3):
            torch.testing.assert_close(
                G @ torch.eye(6, dtype=DTYPE), expected, rtol=ROUND_OFF, atol=ROUND_OFF
            )


class Target(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            factor = self.b(h)
        return self.b(h) * factor


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


COMPILED = {
    "model": lambda model, backend: torch.compile(model, backend=backend),
    "in place": compiled_in_place,
    "part": lambda model, backend: nn.Sequential(torch.compile(model, backend=backend)),
}


@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend, what):
    model, same = Target().to(DTYPE), Target().to(DTYPE)
    same.load_state_dict(model.state_dict())
    X, y = torch.randn(4, 2, dtype=DTYPE), torch.randint(2, (4,))
    compiled = COMPILED[what](model, backend)
    compiled(X).sum().backward()  # compiles, and must go on to work
    model.zero_grad()
    assert_all_operators(compiled, same, [(X, y)], ["list", "loader"])
    compiled(X).sum().backward()
    layer = next(name for name, m in compiled.named_modules() if m is model.a)
    args = LOSS, (layer, "output", 0), [(X, y)]
    found, expected = (
        ActivationHessianLinearOperator(net, args[0], (name, "output", 0), args[2])
        @ torch.eye(12, dtype=DTYPE)
        for net, name in ((compiled, layer), (same, "a"))
    )
    torch.testing.assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_a_compiled_loss():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(DTYPE)
    data = [(torch.randn(4, 2, dtype=DTYPE), torch.randint(2, (4,)))]
    params, loss = list(model.parameters()), torch.compile(F.cross_entropy, backend="aot_eager")
    for operator, matrix in (
        (kfacopt.GGNLinearOperator, dense.ggn),
        (kfacopt.HessianLinearOperator, dense.hessian),
    ):
        found = operator(model, loss, params, data) @ torch.eye(17, dtype=DTYPE)
        expected = matrix(model, LOSS, params, data)
        torch.testing.assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.HuberLoss()], ids=["known", "found"])
def test_compiled_loss_modules_have_the_curvature_of_what_was_compiled(loss):
    model = nn.Linear(2, 2).to(DTYPE)
    y = (
        torch.randint(2, (4,))
        if isinstance(loss, nn.CrossEntropyLoss)
        else torch.rand(4, 2, dtype=DTYPE)
    )
    data, params = [(torch.randn(4, 2, dtype=DTYPE), y)], list(model.parameters())
    compiled = torch.compile(loss, backend="aot_eager")
    for kind in (kfacopt.FisherMCLinearOperator, kfacopt.KFACLinearOperator):
        found, expected = (
            kind(model, f, params, data) @ torch.eye(6, dtype=DTYPE) for f in (compiled, loss)
        )
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False], ids=["model", "part"])
def test_models_in_torchscript(whole):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(DTYPE)
    data = [(torch.randn(4, 2, dtype=DTYPE), torch.randint(2, (4,)))]
    scripted = torch.jit.script(model)
    for _ in range(3):  # the profiling executor
        scripted(data[0][0]).sum().backward()
    net = scripted if whole else nn.Sequential(scripted)
    assert_all_operators(net, model, data, ["list"])
