"""Operators whose interface may still change, by name; their code is in `curvature`."""

from kfacopt.curvature.activation_hessian import ActivationHessianLinearOperator

__all__ = ["ActivationHessianLinearOperator"]
