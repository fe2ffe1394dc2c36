"""The equilibrium layer ``z* = σ(W z* + v)``: operators, solvers, gradients, gauge (docs/theory.md)."""

from verideq.equilibrium.activations import ACTIVATIONS, HARD_SIGMOID, RELU, Activation
from verideq.equilibrium.dynamics import DEQ, Dynamics, Path, path
from verideq.equilibrium.feedback import Coupling, Feedback, FeedbackFusion
from verideq.equilibrium.gauge import Gauge, gauge
from verideq.equilibrium.gradients import Gradient, Implicit, Phantom
from verideq.equilibrium.layer import Equilibrium, System, solve
from verideq.equilibrium.monotone import Monotone, MonotoneConvolution, MonotoneDense, MonotoneFusion
from verideq.equilibrium.operators import Convolution, Dense, FactoredFusion, Operator, operator_of
from verideq.equilibrium.solvers import (
    Anderson,
    Auto,
    Broyden,
    ForwardBackward,
    PeacemanRachford,
    Picard,
    Solution,
    Solver,
    fixed_point,
)

__all__ = [
    "ACTIVATIONS",
    "DEQ",
    "HARD_SIGMOID",
    "RELU",
    "Activation",
    "Anderson",
    "Auto",
    "Broyden",
    "Convolution",
    "Coupling",
    "Dense",
    "Dynamics",
    "Equilibrium",
    "FactoredFusion",
    "Feedback",
    "FeedbackFusion",
    "ForwardBackward",
    "Gauge",
    "Gradient",
    "Implicit",
    "Monotone",
    "MonotoneConvolution",
    "MonotoneDense",
    "MonotoneFusion",
    "Operator",
    "Path",
    "PeacemanRachford",
    "Phantom",
    "Picard",
    "Solution",
    "Solver",
    "System",
    "fixed_point",
    "gauge",
    "operator_of",
    "path",
    "solve",
]
