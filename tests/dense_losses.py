"""The factors of a layer under any loss, from dense Jacobians and Hessians: an oracle."""

import torch


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def loss_hessian(loss, zs):
    """H `[Z, Z]` at all outputs together, by backward passes through a backward pass."""
    zs = tuple(z.detach() for z in zs)
    blocks = torch.autograd.functional.hessian(loss, zs)
    rows = [[b.reshape(z.numel(), -1) for b in row] for z, row in zip(zs, blocks, strict=True)]
    return torch.cat([torch.cat(row, 1) for row in rows])


def positive_part(H):
    values, vectors = torch.linalg.eigh(H)
    return (vectors * values.clamp(min=0)) @ vectors.T


def absolute_value(H):
    values, vectors = torch.linalg.eigh(H)
    return (vectors * values.abs()) @ vectors.T


def jacobians(run, layer):
    """∂z/∂s for each use of a layer, `[Z, *s.shape]`, and the inputs of the uses."""
    inputs, shapes = [], []

    def record(module, args, output):
        inputs.append(args[0].detach())
        shapes.append(output.shape)

    handle = layer.register_forward_hook(record)
    run()
    handle.remove()

    def outputs(*deltas):
        left = list(deltas)
        handle = layer.register_forward_hook(lambda module, args, s: s + left.pop(0))
        try:
            return flat(run())
        finally:
            handle.remove()

    zeros = [torch.zeros(shape) for shape in shapes]
    found = torch.func.jacrev(outputs, tuple(range(len(zeros))))(*zeros)
    return [J.detach() for J in found], inputs


def dense_factors(run, layer, loss, curvature=positive_part):
    """A and G = Σ Jᵀ H⁺ J over data and uses, J the Jacobian of z by one datum's output of a layer.

    Args:
        run: Calls the models; returns the tensors z, a tuple.
        layer: An `nn.Linear`.
        loss: L as a function of the tensors z, all else held fixed.
        curvature: What is made of H; `None` for the empirical Fisher of data, N Σ_n g_n g_nᵀ with
            the gradients g_n of L by one datum's output of the layer.
    """
    zs = run()
    found, inputs = jacobians(run, layer)
    G = torch.zeros(layer.out_features, layer.out_features)
    a = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    a = torch.cat([a, torch.ones(len(a), 1)], 1)
    if curvature is None:
        leaves = [z.detach().requires_grad_() for z in zs]
        gradient = flat(torch.autograd.grad(loss(*leaves), leaves))
        H = max(len(z) for z in zs) * torch.outer(gradient, gradient)
    else:
        H = curvature(loss_hessian(loss, zs))
    for J in found:
        for Jn in J.flatten(1, -2).unbind(1):
            G += Jn.T @ H @ Jn
    return a.T @ a / len(a), G
