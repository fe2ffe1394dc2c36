"""The nodes that auto_LiRPA bounds equilibria by; 0.3 and 0.7.1 call them a little differently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from auto_LiRPA.bound_ops import BoundOptimizableActivation
from auto_LiRPA.linear_bound import LinearBound
from torch import Tensor

from verideq.box import Box
from verideq.certify.lirpa.coefficients import before, dense, refuse_balls
from verideq.certify.lirpa.recording import layer_of, pre_activation
from verideq.certify.lirpa.relaxation import Relaxation
from verideq.certify.lirpa.snapshot import Snapshot, carry
from verideq.equilibrium import Operator
from verideq.errors import UnsupportedOperation

Sides = tuple[Tensor | None, Tensor | None]

OLD = hasattr(BoundOptimizableActivation, "clip_alpha_")
"""0.3."""


class _Equilibrium(BoundOptimizableActivation):
    """What the three nodes share: the layer, its relaxation, and alpha, the slopes that ``alpha-CROWN`` optimises.

    Inputs are the injection (after the pre-activations, in `BoundEquilibriumRelu`) and the free tensors of ``W``.
    """

    first = 0
    """The place of the injection among the inputs."""
    is_pre = False
    """Whether the node's value is ``P`` and not ``z``."""

    def __init__(
        self,
        attr: dict[str, Any] | None = None,
        inputs: list[Any] | None = None,
        output_index: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.recorded = layer_of(self.attr["layer"])
        self.use_default_ibp = False
        self.splittable = False
        self.requires_input_bounds = list(range(self.first + 1))
        self.alpha_batch_dim = 2
        if OLD:
            # It lays out the slopes of ReLUs for some rows of a linear layer, and asks for all rows if no ReLU follows.
            for node in before(self):
                node.use_sparse_spec_alpha = False

    # --- values

    def operator(self, free: Iterable[Tensor]) -> Operator:
        """``W`` from its free tensors."""
        return self.recorded.operator(tuple(free))

    def forward(self, *x: Tensor) -> Tensor:
        v, free = x[self.first], x[self.first + 1 :]
        return self.recorded.equilibrate(v, free)

    def snapshot(self) -> Snapshot:
        """``W`` as it is now.

        Raises:
            UnsupportedOperation: its free tensors are perturbed.
            NoGaugeError: there are no bounds of this layer.
        """
        free = self.inputs[self.first + 1 :]
        if any(node.perturbed for node in free):
            raise UnsupportedOperation(
                "the weights W of an equilibrium are perturbed, and only what is injected into it can be; perturb the "
                "weights of the injection, or nothing but the input"
            )
        return Snapshot.of(self.operator(map(_value, free)), throw=self.recorded.layer.throw)

    # --- bounds

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        refuse_balls(self.inputs[self.first], interval=True)
        lower, upper = v[self.first]
        known = Relaxation.over(self.snapshot(), Box(lower, upper))
        return _ends(known.pre if self.is_pre else known.z, lower)

    def known(self) -> Relaxation:
        """The relaxation over the bounds that the injection has by now."""
        v = self.inputs[self.first]
        refuse_balls(v, interval=False)
        return Relaxation.over(self.snapshot(), Box(v.lower, v.upper))

    def bound_backward(
        self, last_lA: Any, last_uA: Any, *x: Any, start_node: Any = None, unstable_idx: Any = None, **options: Any
    ) -> tuple[list[Sides], Tensor | int, Tensor | int]:
        known, dtype = self.known(), x[self.first].lower.dtype
        state = tuple(known.pre.lower.shape[1:])
        sides: list[Tensor | None] = []
        constants: list[Tensor | int] = []
        for side, (last, sign) in enumerate(((last_lA, 1), (last_uA, -1))):
            A = dense(last, state)
            if A is None:
                sides.append(None)
                constants.append(0)
                continue
            if getattr(start_node, "mode", None) == "patches" and not OLD:
                # From patches, which may be a matrix by now, it takes the number of slopes; 0.3 asks a ReLU only.
                channels, height, width = start_node.output_shape[1:]
                self.patch_size[start_node.name] = (channels, A.shape[1], height, width, *state)
            places = getattr(last, "unstable_idx", None) if unstable_idx is None else unstable_idx
            alpha = self.chosen(side, A, start_node, places)
            rows, constant = known.least(sign * A, alpha, dtype, pre=self.is_pre)
            sides.append(sign * rows)
            constants.append(sign * constant)
        result: list[Sides] = [(None, None)] * len(x)
        result[self.first] = (sides[0], sides[1])
        return result, constants[0], constants[1]

    def bound_forward(self, dim_in: int, *x: Any) -> Any:
        v = x[self.first]
        lower, upper = (torch.cat((w, b[:, None]), 1) for w, b in ((v.lw, v.lb), (v.uw, v.ub)))
        return _lines(*self.known().forward(lower, upper, pre=self.is_pre), like=v.lb)

    # --- alpha

    def init_opt_parameters(self, start_nodes: Iterable[Any]) -> None:
        slopes = self.known().adaptive.detach().to(self.inputs[self.first].lower.dtype)
        self.alpha: dict[str, Tensor] = OrderedDict()
        for name, size, *_ in start_nodes:
            rows = int(size) if isinstance(size, int) else prod(size)
            self.alpha[name] = slopes.expand(2, rows, *slopes.shape).clone()

    def clip_alpha(self) -> None:
        """Back into [0, 1], after a step of the optimiser."""
        for alpha in self.alpha.values():
            alpha.data.clamp_(0, 1)

    clip_alpha_ = clip_alpha  # its name in 0.3

    def chosen(self, side: int, A: Tensor, start: Any, places: Any) -> Tensor | None:
        """The slopes for these rows, where there are any: (rows or 1, batch, *state).

        Args:
            side: 0 for lower bounds, 1 for upper ones.
            A: (rows, batch, *state).
            start: the node whose bounds are asked for.
            places: which of its units the rows belong to; ``None``: all of them in order, or not said.
        """
        alpha = self.alpha.get(getattr(start, "name", ""))
        if self.opt_stage not in ("opt", "reuse") or alpha is None:
            return None
        own: Tensor = alpha[side]
        mask = getattr(self, "alpha_beta_update_mask", getattr(self, "preserve_mask", None))
        if own.shape[1] != A.shape[1] and mask is not None:
            own = own[:, mask]
        if len(own) not in (1, len(A)) and places is not None:
            # With many units to choose for, 0.7.1 shares the slopes among the positions of a channel.
            own = own.repeat_interleave(max(1, prod(start.output_shape[1:]) // len(own)), 0)
            own = own[_flat(places, start)]
        # Rows of an unknown order take the usual slopes: any are sound.
        return own if len(own) in (1, len(A)) and own.shape[1] == A.shape[1] else None


class BoundEquilibrium(_Equilibrium):
    """``z = relu(W z + v)`` as one node."""


class BoundEquilibriumPre(_Equilibrium):
    """The pre-activations ``P`` of an equilibrium (split form)."""

    is_pre = True

    def forward(self, *x: Tensor) -> Tensor:
        v, *free = x
        return pre_activation(self.operator(free), v, super().forward(*x))


class BoundEquilibriumRelu(_Equilibrium):
    """``z = relu(P)`` (split form).

    Rows go to the injection at once, by the equilibrium of their multipliers; what is known of ``P`` makes the lines.
    """

    first = 1

    def forward(self, *x: Tensor) -> Tensor:
        return x[0].relu()

    def known(self) -> Relaxation:
        pre = self.inputs[0]
        return super().known().narrowed(Box(pre.lower, pre.upper))

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        lower, upper = v[0]
        return lower.relu(), upper.relu()

    def bound_forward(self, dim_in: int, *x: Any) -> Any:
        # The bounds of P came from those of z already: one step leads back.
        pre = x[0]
        known = self.known()
        ends = torch.stack([torch.cat((w, b[:, None]), 1) for w, b in ((pre.lw, pre.lb), (pre.uw, pre.ub))])
        below, above = known.through(ends.to(torch.float64).flatten(1, 2)).view_as(ends)
        return _lines(below, above, like=pre.lb)


def _value(node: Any) -> Tensor:
    """The value of a node that is not perturbed; 0.3 may not have it at hand."""
    value: Tensor = node.forward(*map(_value, node.inputs))
    return value


def _ends(box: Box, like: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 box in another dtype, rounded outward."""
    lower, upper = box.lower.to(like), box.upper.to(like)
    infinity = torch.full((), torch.inf, dtype=lower.dtype, device=lower.device)
    below = torch.where(lower > box.lower, lower.nextafter(-infinity), lower)
    above = torch.where(upper < box.upper, upper.nextafter(infinity), upper)
    return carry(below, lower), carry(above, upper)


def _lines(lower: Tensor, upper: Tensor, like: Tensor) -> Any:
    """auto_LiRPA's linear bounds from coefficients with the constants last."""
    lower, upper = lower.to(like), upper.to(like)
    return LinearBound(lower[:, :-1], lower[:, -1], upper[:, :-1], upper[:, -1])


def _flat(places: Any, start: Any) -> Tensor:
    """Units by number from units by number, or by (channel, row, column)."""
    if isinstance(places, Tensor):
        return places
    _, height, width = start.output_shape[1:]
    channel, row, column = places
    flat: Tensor = (channel * height + row) * width + column
    return flat
