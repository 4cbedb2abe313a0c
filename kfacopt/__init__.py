"""K-FAC for PyTorch: a second-order optimizer whose preconditioner can be checked."""

from kfacopt import experimental
from kfacopt.curvature.empirical_fisher import EFLinearOperator
from kfacopt.curvature.fisher import FisherMCLinearOperator
from kfacopt.curvature.ggn import GGNLinearOperator
from kfacopt.curvature.hessian import HessianLinearOperator
from kfacopt.curvature.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from kfacopt.kfac.linear_operator import KFACLinearOperator
from kfacopt.optim.kfac import KFACOptimizer, KFACWarning

__version__ = "0.1.0.dev0"

__all__ = [
    "EFLinearOperator",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFACOptimizer",
    "KFACWarning",
    "TransposedJacobianLinearOperator",
    "experimental",
]
