"""Dense curvature matrices by plain double loops over autograd: the oracle of the operators.

Nothing here comes from kfacopt. The risk of several batches is the loss of all predictions at
once: they are concatenated before the loss sees them.
"""

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def flatten(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def gradient(scalar, params):
    grads = torch.autograd.grad(
        scalar, params, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return flatten(grads)


def derivative(vector, params):
    """Return the Jacobian of a vector, one backward pass for each entry."""
    zero = sum(p.sum() * 0 for p in params)
    return torch.stack([gradient(entry + zero, params) for entry in vector.reshape(-1)]).detach()


def predictions(model, data):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.cat([model(X) for X, _ in data])


def targets(data):
    return torch.cat([y for _, y in data])


def jacobian(model, params, data):
    return derivative(predictions(model, data), params)


def hessian(model, loss_func, params, data):
    risk = loss_func(predictions(model, data), targets(data))
    return derivative(gradient(risk, params), params)


def loss_hessian(loss_func, z, y):
    z = z.detach().requires_grad_()
    return derivative(gradient(loss_func(z, y), [z]), [z])


def ggn(model, loss_func, params, data):
    z = predictions(model, data)
    J = derivative(z, params)
    return J.T @ loss_hessian(loss_func, z, targets(data)) @ J


def per_datum_losses(model, loss_func, data):
    """Return ℓ_n of every datum: the loss of a data set of one, where every target counts."""
    z, y = predictions(model, data), targets(data)
    return torch.stack([loss_func(z[n : n + 1], y[n : n + 1]) for n in range(len(z))])


def empirical_fisher(model, loss_func, params, data):
    """Return c Σ_n ∇ℓ_n ∇ℓ_nᵀ, where every target counts the same."""
    G = derivative(per_datum_losses(model, loss_func, data), params)
    c = 1 / len(G) if loss_func.reduction == "mean" else 1.0
    return c * G.T @ G


def weighted_empirical_fisher(model, loss_func, params, data, num_data, normalizer):
    """Return N / Z² Σ_n ∇s_n ∇s_nᵀ, s_n the summed losses, where targets have weights."""
    summed = copy.copy(loss_func)
    summed.reduction = "sum"
    G = derivative(per_datum_losses(model, summed, data), params)
    c = num_data / normalizer**2 if loss_func.reduction == "mean" else 1.0
    return c * G.T @ G


def activation_hessian(risk_of, z):
    """Return the Hessian of `risk_of` at z, flattened."""
    z = z.detach().requires_grad_()
    return derivative(gradient(risk_of(z), [z]), [z])
