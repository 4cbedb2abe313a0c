"""Fixtures of the tests of the exact operators' behaviour, a plugin of pytest."""

import pytest
from curvature_cases import RISK_OPERATORS, make_data, make_model
from torch import nn


@pytest.fixture(params=RISK_OPERATORS, ids=lambda c: c.__name__)
def risk_operator(request):
    return request.param


@pytest.fixture
def problem():
    """Return a model, its loss and a data set of two unequal batches."""
    return make_model("mlp"), nn.CrossEntropyLoss(), make_data("mlp", "ce", (4, 3))
