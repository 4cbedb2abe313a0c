"""A run that goes on from its saved state, which is the run that was not interrupted."""

import copy

import torch

from kfacopt import KFACOptimizer


def assert_goes_on(model, options, train):
    """Train, save, load into a copy, train both on, and compare them bit by bit.

    Args:
        model: The model.
        options: The optimizer's arguments.
        train: Makes some steps with a model and an optimizer.

    Returns:
        The optimizer that was not interrupted.
    """
    optimizer = KFACOptimizer(model.parameters(), **options)
    train(model, optimizer, 5)
    other = copy.deepcopy(model)
    resumed = KFACOptimizer(other.parameters(), **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (other, resumed)):
        train(*pair, 5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    return optimizer
