"""The Hessian of the loss by a feature inside the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfacopt.curvature.linearization import batched_grad
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.curvature.network import CACHE_BYTES, CHUNK_SIZE, NetworkLinearOperator
from kfacopt.data import Batch

IO_TYPES = ("input", "output")
