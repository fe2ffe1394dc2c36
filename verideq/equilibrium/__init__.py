"""The equilibrium layer ``z* = relu(W z* + v)``: operators, solvers, gradients, gauge (docs/theory.md)."""

from verideq.equilibrium.gauge import Gauge, gauge
from verideq.equilibrium.gradients import Gradient, Implicit, Phantom
from verideq.equilibrium.layer import Equilibrium, System, solve
from verideq.equilibrium.operators import Convolution, Dense, Operator, operator_of
from verideq.equilibrium.solvers import Anderson, Auto, ForwardBackward, Picard, Solution, Solver, fixed_point

__all__ = [
    "Anderson",
    "Auto",
    "Convolution",
    "Dense",
    "Equilibrium",
    "ForwardBackward",
    "Gauge",
    "Gradient",
    "Implicit",
    "Operator",
    "Phantom",
    "Picard",
    "Solution",
    "Solver",
    "System",
    "fixed_point",
    "gauge",
    "operator_of",
    "solve",
]
