"""K-FAC for PyTorch: a second-order optimizer whose preconditioner can be checked."""

from kfacopt.curvature.ggn import GGNLinearOperator
from kfacopt.kfac.linear_operator import KFACLinearOperator
from kfacopt.optim.kfac import KFACOptimizer, KFACWarning

__version__ = "0.1.0.dev0"

__all__ = ["GGNLinearOperator", "KFACLinearOperator", "KFACOptimizer", "KFACWarning"]
