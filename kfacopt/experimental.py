"""Operators whose interface may still change."""

from kfacopt.curvature.activation_hessian import ActivationHessianLinearOperator

__all__ = ["ActivationHessianLinearOperator"]
