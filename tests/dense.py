"""Dense matrices in float64 by plain loops and torch.func; nothing of kfacopt is used."""

import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F


def flat_jacobian(model, params, X):
    """J of all outputs by all parameters, `[numel of z, D]`, columns in the order of `params`."""
    names = {id(p): n for n, p in model.named_parameters()}
    values = {names[id(p)]: p.detach() for p in params}
    jacobian = jacrev(lambda v: functional_call(model, v, (X,)))(values)
    columns = [jacobian[names[id(p)]].flatten(-p.ndim) for p in params]
    rows = columns[0].shape[:-1].numel()
    return torch.cat([c.reshape(rows, -1) for c in columns], dim=1)


def dense_ggn(model, loss_func, params, X, y):
    """Σ Jᵀ H J with the loss's whole Hessian by its input."""
    z = model(X).detach()
    H = torch.autograd.functional.hessian(lambda out: loss_func(out, y), z)
    J = flat_jacobian(model, params, X)
    return J.T @ H.reshape(z.numel(), z.numel()) @ J


def block_mask(params, groups):
    """Ones where two entries of θ belong to the same group of parameters."""
    owner = torch.cat([torch.full((p.numel(),), groups[i]) for i, p in enumerate(params)])
    return (owner[:, None] == owner[None, :]).to(params[0].dtype)


def convolution_inputs(conv, x):
    """For each group `[N, S, C/B·KH·KW]`, one patch at a time."""
    top = left = bottom = right = 0
    (kh, kw), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
    if conv.padding == "same":
        total_h, total_w = dh * (kh - 1), dw * (kw - 1)
        top, left = total_h // 2, total_w // 2
        bottom, right = total_h - top, total_w - left
    elif conv.padding != "valid":
        (top, left), (bottom, right) = conv.padding, conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, (left, right, top, bottom), mode=mode)
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    per_group = x.shape[1] // conv.groups
    groups = []
    for b in range(conv.groups):
        own = x[:, b * per_group : (b + 1) * per_group]
        patches = [
            own[
                :,
                :,
                i * sh : i * sh + dh * (kh - 1) + 1 : dh,
                j * sw : j * sw + dw * (kw - 1) + 1 : dw,
            ]
            for i in range(height)
            for j in range(width)
        ]
        groups.append(torch.stack([p.flatten(1) for p in patches], dim=1))
    return groups


def recorded_uses(model, layer, X):
    """Inputs of a layer and its outputs, with graph, of one forward pass, and the prediction."""
    inputs, outputs = [], []

    def record(_, args, out):
        inputs.append(args[0].detach())
        outputs.append(out)
        return out.clone()  # an in-place activation behind the layer does not change the record

    handle = layer.register_forward_hook(record)
    z = model(X)
    handle.remove()
    return inputs, outputs, z


def dense_kfac(model, layer, X, vectors, kfac_approx, bias):
    """A and G of a Linear or Conv2d (per group) from vectors `[V, *z.shape]`, by double loops."""
    inputs, outputs, z = recorded_uses(model, layer, X)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    grads = [torch.autograd.grad(z, outputs, v, retain_graph=True) for v in vectors]
    result = []
    for b in range(groups):
        if isinstance(layer, nn.Conv2d):
            a = torch.cat([convolution_inputs(layer, x)[b] for x in inputs], dim=1)
        else:
            a = torch.cat([x.reshape(x.shape[0], -1, x.shape[-1]) for x in inputs], dim=1)
        if bias:
            a = torch.cat([a, torch.ones(*a.shape[:2], 1)], dim=2)
        N, S, _ = a.shape
        A = torch.zeros(a.shape[2], a.shape[2])
        for n in range(N):
            if kfac_approx == "reduce":
                mean = a[n].mean(0)
                A += torch.outer(mean, mean) / N
            else:
                for s in range(S):
                    A += torch.outer(a[n, s], a[n, s]) / (N * S)
        G = 0.0
        for per_use in grads:
            columns = []
            for g in per_use:
                if isinstance(layer, nn.Conv2d):
                    g = g.flatten(2).chunk(groups, dim=1)[b].mT
                else:
                    g = g.reshape(g.shape[0], -1, g.shape[-1])
                columns.append(g)
            g = torch.cat(columns, dim=1)
            for n in range(N):
                if kfac_approx == "reduce":
                    total = g[n].sum(0)
                    G = G + torch.outer(total, total)
                else:
                    for s in range(S):
                        G = G + torch.outer(g[n, s], g[n, s])
        result.append((A, G))
    return result


def hessian_columns(loss_func, z, y):
    """A root of the loss's Hessian, `[V, *z.shape]`, by eigenvectors of each datum's block."""
    size = z[0].numel()
    H = torch.autograd.functional.hessian(lambda out: loss_func(out, y), z)
    H = H.reshape(z.shape[0], size, z.shape[0], size)
    columns = torch.zeros(size, *z.shape)
    for n in range(z.shape[0]):
        values, basis = torch.linalg.eigh(H[n, :, n])
        root = basis * values.clamp(min=0).sqrt()
        columns[:, n] = root.T.reshape(size, *z.shape[1:])
    return columns
