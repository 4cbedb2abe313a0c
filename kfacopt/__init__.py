"""K-FAC for PyTorch: a second-order optimizer whose preconditioner can be checked."""

from kfacopt import experimental
from kfacopt.curvature.empirical_fisher import EFLinearOperator
from kfacopt.curvature.fisher import FisherMCLinearOperator
from kfacopt.curvature.ggn import GGNLinearOperator
from kfacopt.curvature.hessian import HessianLinearOperator
from kfacopt.curvature.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from kfacopt.diagnosis.diagnose import diagnose
from kfacopt.diagnosis.report import Diagnosis
from kfacopt.elementwise_derivatives import register_elementwise_derivatives
from kfacopt.estimators.diagonal import HutchinsonDiagonalEstimator
from kfacopt.estimators.spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from kfacopt.estimators.trace import HutchinsonTraceEstimator, HutchPPTraceEstimator
from kfacopt.kfac.ekfac_operator import EKFACLinearOperator
from kfacopt.kfac.layers import LayerFamily, LinearFamily, register_layer
from kfacopt.kfac.layers import default_kinds as default_layers
from kfacopt.kfac.linear_operator import KFACLinearOperator
from kfacopt.likelihoods import Elementwise, Likelihood, register_likelihood
from kfacopt.linalg.conjugate_gradients import NotPositiveDefiniteError
from kfacopt.linalg.inverses import (
    CGConvergenceWarning,
    CGInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from kfacopt.linalg.neumann_series import NeumannConvergenceWarning
from kfacopt.linalg.structured import IdentityLinearOperator, SubmatrixLinearOperator
from kfacopt.optim.kfac import KFACOptimizer
from kfacopt.optim.messages import KFACWarning
from kfacopt.taylor_mode import input_derivatives

__version__ = "0.1.0"

__all__ = [
    "CGConvergenceWarning",
    "CGInverseLinearOperator",
    "Diagnosis",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "Elementwise",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "HutchPPTraceEstimator",
    "HutchinsonDiagonalEstimator",
    "HutchinsonTraceEstimator",
    "IdentityLinearOperator",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFACOptimizer",
    "KFACWarning",
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "LayerFamily",
    "Likelihood",
    "LinearFamily",
    "NeumannConvergenceWarning",
    "NeumannInverseLinearOperator",
    "NotPositiveDefiniteError",
    "SubmatrixLinearOperator",
    "TransposedJacobianLinearOperator",
    "default_layers",
    "diagnose",
    "experimental",
    "input_derivatives",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
    "register_elementwise_derivatives",
    "register_layer",
    "register_likelihood",
]
