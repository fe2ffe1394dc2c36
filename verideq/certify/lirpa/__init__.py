"""Equilibrium layers inside auto_LiRPA: `register` once, and a `BoundedModule` bounds them by every method it knows.

auto_LiRPA (Xu et al., "Automatic perturbation analysis for scalable certified robustness and beyond", NeurIPS 2020)
traces a model into nodes and bounds node after node. Here an equilibrium becomes one node, or two: in the *split* form
its pre-activations are a node of their own, which auto_LiRPA then bounds over the real input instead of over the box of
the injection (docs/auto-lirpa.md). Nothing of auto_LiRPA is imported before it is asked for.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from verideq.certify.lirpa.recording import PRE, RELU, WHOLE, record
from verideq.equilibrium import Equilibrium

__all__ = ["custom_ops", "register"]

INSTALL = (
    "install what it imports, pip install 'verideq[lirpa]', and then auto_LiRPA itself from its repository without its "
    "own requirements, pip install --no-deps git+https://github.com/Verified-Intelligence/auto_LiRPA"
)


def register(*, split: bool = True) -> None:
    """Let every `BoundedModule` that is made from now on bound equilibrium layers; again and again does no harm.

    Args:
        split: see `custom_ops`.

    Raises:
        ImportError: auto_LiRPA cannot be imported; the message says how to install it.
    """
    ops = custom_ops(split=split)
    register_custom_op = import_module("auto_LiRPA.bound_op_map").register_custom_op
    for name, node in ops.items():
        register_custom_op(name, node)


def custom_ops(*, split: bool = True) -> dict[str, type[Any]]:
    """The nodes by name of operation, for ``BoundedModule(model, x, custom_ops=custom_ops())`` instead of `register`.

    Like `register` it decides how models are traced from now on, in this process.

    Args:
        split: the pre-activations of an equilibrium are a node of their own: tighter, at the price of a bound a unit.
            False: one node an equilibrium.

    Raises:
        ImportError: auto_LiRPA cannot be imported; the message says how to install it.
    """
    try:
        import_module("auto_LiRPA")
    except ImportError as error:
        raise ImportError(f"auto_LiRPA cannot be imported ({error}): {INSTALL}") from error
    nodes = import_module("verideq.certify.lirpa.nodes")
    Equilibrium.recorder = partial(record, split=split)
    return {WHOLE: nodes.BoundEquilibrium, PRE: nodes.BoundEquilibriumPre, RELU: nodes.BoundEquilibriumRelu}
