"""Bounds, verdicts, and runs over a data set (docs/theory.md)."""

from verideq.certify.bound import METHODS, bound, margin_rows
from verideq.certify.budget import Budget
from verideq.certify.constants import lipschitz_constants
from verideq.certify.decide import certify
from verideq.certify.method import Prepared, prepare
from verideq.certify.verdict import Verdict

__all__ = [
    "METHODS",
    "Budget",
    "Prepared",
    "Verdict",
    "bound",
    "certify",
    "lipschitz_constants",
    "margin_rows",
    "prepare",
]
