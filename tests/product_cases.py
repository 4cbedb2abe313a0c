"""Networks that multiply by parameters past modules' calls; each says itself what a and z are."""

import torch
from torch import nn
from torch.nn import functional as F

LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
D = 4


class Net(nn.Module):
    """A layer, a free matrix and a free vector, used as `use(net, x)` says, and a head."""

    def __init__(self, use, shape=(D, D), outputs=D):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.use = nn.Linear(D, D), nn.Linear(outputs, 3), use
        self.kernel, self.shift = nn.Parameter(torch.randn(*shape)), nn.Parameter(torch.randn(D))
        self.uses = []

    def forward(self, x):
        self.uses.clear()
        return self.head(self.use(self, x))

    def tape(self, a, z, constant=0.0, turned=False):
        """Keep that z has the products of rows a with a matrix, plus a constant times a bias."""
        self.uses.append((a.detach(), z, constant, turned))
        return z


def functional(net, x):
    W, b = net.layer.weight, net.layer.bias
    return net.tape(x, F.linear(x, W, b), 1.0).tanh()


def functional_without_bias(net, x):
    return net.tape(x, F.linear(x, net.layer.weight)).tanh() + net.layer.bias


def forward_called(net, x):
    return net.tape(x, net.layer.forward(x), 1.0).tanh()


def both(net, x):
    h = net.tape(x, net.layer(x), 1.0).tanh()
    return net.tape(h, F.linear(h, net.layer.weight)).tanh()


def both_with_bias(net, x):
    h = net.tape(x, F.linear(x, net.layer.weight, net.layer.bias), 1.0).tanh()
    return net.tape(h, net.layer(h), 1.0).tanh()


def a_copy_of_a_view(net, x):
    h = net.tape(x, net.layer(x), 1.0).tanh()
    return net.tape(h, h @ net.layer.weight[:, :D].T.contiguous())


def addmm(net, x):
    return net.tape(x, torch.addmm(net.shift, x, net.kernel), 1.0).tanh()


def at(net, x):
    return net.tape(x, x @ net.kernel + net.shift, 1.0).tanh()


def einsum(net, x):
    return net.tape(x, torch.einsum("ni,io->no", x, net.kernel)).tanh() * net.shift


def shared_tower(net, x):
    h = x
    for _ in range(3):
        h = net.tape(h, h @ net.kernel + net.shift, 1.0).tanh()
    return h


def on_the_left(net, x):
    return net.tape(x, net.kernel.T @ x.T, turned=True).T.tanh()


LAYER = (functional, forward_called, both, both_with_bias, a_copy_of_a_view)
KERNEL = (addmm, at, einsum, shared_tower, on_the_left)
USES = {
    # name: (what the network does, which layer it is)
    use.__name__.replace("_", " "): (use, name)
    for name, group in (("layer", LAYER), ("kernel", KERNEL))
    for use in group
}


def data(*shape):
    """Return data whose entries are all different."""
    places = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64)
    return (3 * places.square() + places).cos().reshape(shape)


def dense_rows(net, vectors):
    """Return a, with the constants of a bias, and for each vector g, of all uses together."""
    joint = any(constant for _, _, constant, _ in net.uses)
    rows = []
    for a, _, constant, _ in net.uses:
        a = a.reshape(-1, a.shape[-1])
        rows.append(torch.cat([a, torch.full((len(a), int(joint)), constant)], dim=1))
    outputs = [z for _, z, _, _ in net.uses]
    found = []
    for root, v in vectors:
        grads = torch.autograd.grad(root, outputs, v, retain_graph=True)
        own = zip(grads, net.uses, strict=True)
        turned = [g.mT if turned else g for g, (*_, turned) in own]
        found.append(torch.cat([g.reshape(-1, g.shape[-1]) for g in turned]))
    return torch.cat(rows), found


def dense_factors(rows, grads):
    """Return A and G from all a, and for each vector all g."""
    A = sum(torch.outer(a, a) for a in rows) / len(rows)
    return A, sum(torch.outer(g, g) for by_use in grads for g in by_use)


def damped_step(A, G, gradient, damping):
    """Return (G + √δ/π I)⁻¹ ∇ (A + π√δ I)⁻¹, π² = (tr A / d_in) / (tr G / d_out)."""
    pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt()
    left = G + damping**0.5 / pi * torch.eye(len(G))
    right = A + damping**0.5 * pi * torch.eye(len(A))
    return torch.linalg.inv(left) @ gradient @ torch.linalg.inv(right)


def corrected_step(A, G, rows, grads, num_data, gradient, damping):
    """Return Q_G ((Q_Gᵀ ∇ Q_A) / (Λ + δ)) Q_Aᵀ; a datum's gradient is the sum over all uses."""
    Q_A, Q_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    moments = sum(
        (Q_G.T @ (by_use[n::num_data].T @ rows[n::num_data]) @ Q_A).square()
        for by_use in grads
        for n in range(num_data)
    )
    return Q_G @ ((Q_G.T @ gradient @ Q_A) / (moments + damping)) @ Q_A.T
