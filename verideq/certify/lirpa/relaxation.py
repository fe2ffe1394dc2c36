"""Linear bounds of one equilibrium, with gradients: the mathematics of the nodes, without auto_LiRPA.

With every row solved for its own unknown, ``z = relu(P)``, ``P = W̃ z + ṽ`` (docs/theory.md). Let ``P`` be in
``[l, h]`` and ``z`` in a box ``Z``; ``a >= h / (h - l)`` where ``l < 0 < h``, and 1 elsewhere. The relu lies between
two lines,

    z >= P,        z <= a (P - l)  where l < 0,        z = P  where l >= 0,

and so for *every* ``g``

    q · z  >=  g · ṽ  +  min over Z of (q + W̃ᵀ g - g') · z  -  Σ_{g < 0, l < 0} g l,

with ``g' = g / a`` in the places of that sum and ``g`` elsewhere. CROWN's ``g`` is the fixed point ``D (q + W̃ᵀ g)``,
``D`` the slope of the lower line where the bracket is positive and of the upper one where it is not; it contracts under
the gauge. A solver that stops early makes the bound looser, never wrong. The same lines push linear bounds forwards:
started from the box, every step of that recursion is a bound.

Everything is float64, whatever the model is, and the box is rounded outward; the lines are not, as nothing is in
auto_LiRPA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.box import Box
from verideq.certify.enclosure import enclose, pre_activations
from verideq.certify.lirpa.snapshot import NARROW, TIGHT, Snapshot, Step, carry
from verideq.equilibrium import Picard, System, fixed_point
from verideq.errors import InputError

ELEMENTS = 2**18
"""Coefficients that are solved for at a time: what stays in the cache."""


@dataclass(frozen=True)
class Relaxation:
    """The lines of one equilibrium over a batch of boxes.

    Args:
        snapshot: of ``W``.
        pre: ``[l, h]``, (batch, *state).
        z: ``Z``.
    """

    snapshot: Snapshot
    pre: Box
    z: Box

    @staticmethod
    def over(snapshot: Snapshot, v: Box) -> Relaxation:
        """What is known of ``z`` and ``P`` for every injection of a box.

        Args:
            snapshot: of ``W``.
            v: of any dtype, (batch, *features); ends that crossed by rounding are taken the other way round.

        Raises:
            InputError: NaN or infinity in the box.
        """
        ends = torch.stack((v.lower, v.upper)).to(torch.float64)
        if not bool(ends.isfinite().all()):
            # auto_LiRPA would go on with it, and replaces a NaN among its biases by zero.
            raise InputError(
                "the bounds of what is injected into an equilibrium hold NaN or infinity; lower eps, or look for the "
                "layer before it that overflows"
            )
        lower, upper = ends.amin(0), ends.amax(0)
        box = Box(lower.detach(), upper.detach())
        z = enclose(snapshot.layer, snapshot.gauge, box, TIGHT if snapshot.exact else NARROW).box
        pre = pre_activations(snapshot.layer, box, z)
        if not bool((z.sound() & pre.sound()).all()):
            raise InputError("the box of an equilibrium overflowed; lower eps, or scale its weights down")
        center, radius = (lower + upper) / 2, (upper - lower) / 2
        system = System(snapshot.operator, torch.stack((center, radius))).solved()
        middle, half = snapshot.attach(
            torch.stack((z.center, z.width / 2)), system.stepper(), system.map(Tensor.detach).stepper()
        )
        solved, factor = snapshot.solved
        p, q = solved.apply(middle) + center * factor, solved.absolute().apply(half) + radius * factor
        z = Box(carry(z.lower, middle - half), carry(z.upper, middle + half))
        return Relaxation(snapshot, Box(carry(pre.lower, p - q), carry(pre.upper, p + q)), z).tidied()

    def tidied(self) -> Relaxation:
        """The same with ``Z`` cut to what ``[l, h]`` says of it."""
        lower, upper = self.pre.lower.clamp(min=0), self.pre.upper.clamp(min=0)
        return Relaxation(self.snapshot, self.pre, _within(self.z, Box(lower, upper)))

    def narrowed(self, pre: Box) -> Relaxation:
        """The same with pre-activations that somebody else bounded as well."""
        known = Box(pre.lower.to(self.pre.lower), pre.upper.to(self.pre.upper))
        return Relaxation(self.snapshot, _within(self.pre, known), self.z).tidied()

    @property
    def unstable(self) -> Tensor:
        """Where ``P`` may have either sign."""
        return (self.pre.lower < 0) & (self.pre.upper > 0)

    @property
    def slope(self) -> Tensor:
        """``a``; 1 where ``P`` has one sign."""
        width = torch.where(self.unstable, self.pre.width, 1.0)
        return torch.where(self.unstable, self.pre.upper / width * (1 + 2.0**-50), 1.0)

    @property
    def adaptive(self) -> Tensor:
        """The usual slope of the lower line: 0 or 1, whichever leaves less room."""
        return (self.pre.upper > -self.pre.lower).to(self.pre.upper)

    def lines(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slopes of the lower and the upper line.

        Args:
            alpha: of the lower line of unstable units, in [0, 1], shaped to broadcast over (batch, *state); ``None``:
                `adaptive`.
        """
        on = (self.pre.lower >= 0).to(self.slope)
        chosen = self.adaptive if alpha is None else alpha.to(self.slope).clamp(0, 1)
        return torch.where(self.unstable, chosen, on), torch.where(self.unstable, self.slope, on)

    def detached(self, dtype: torch.dtype = torch.float64) -> Relaxation:
        """The same, cut off from autograd."""

        def change(t: Tensor) -> Tensor:
            return t.detach().to(dtype)

        pre, z = (Box(change(box.lower), change(box.upper)) for box in (self.pre, self.z))
        return Relaxation(self.snapshot.map(change), pre, z)

    def least(self, A: Tensor, alpha: Tensor | None, dtype: torch.dtype, *, pre: bool = False) -> tuple[Tensor, Tensor]:
        """Rows on ``v`` and constants with ``A · z >= rows · v + constants``, or for ``P`` in place of ``z``.

        Args:
            A: (rows, batch, *state).
            alpha: see `lines`; (rows or 1, batch, *state), or ``None``.
            dtype: of the result. Rows are rounded to it first, and the constants are right for the rounded ones.
            pre: ``A`` stands before ``P``.

        Returns:
            (rows, batch, *state) and (rows, batch).

        Raises:
            InputError: NaN or infinity among them: auto_LiRPA would take a NaN for zero.
        """
        size = max(1, ELEMENTS // max(1, A[0].numel()))
        each = None if alpha is None or len(alpha) != len(A) else torch.split(alpha, size)
        parts = [
            self._least(part.to(torch.float64), alpha if each is None else each[i], dtype, pre)
            for i, part in enumerate(torch.split(A, size))
        ]
        rows, constants = (torch.cat(sides) for sides in zip(*parts, strict=True))
        if not bool(constants.isfinite().all()):
            raise InputError(
                "the linear bounds that reach an equilibrium hold NaN or infinity; lower eps, or look for the layer "
                "after it that overflows"
            )
        return rows, constants.to(dtype)

    def _least(self, A: Tensor, alpha: Tensor | None, dtype: torch.dtype, pre: bool) -> tuple[Tensor, Tensor]:
        solved, factor = self.snapshot.solved
        transposed = solved.transpose()

        def back(g: Tensor) -> Tensor:
            return transposed.apply(g.flatten(0, 1)).view_as(g)

        direct = A if pre else torch.zeros_like(A)
        q = back(A) if pre else A
        rows = ((self.respond(q, alpha) + direct) * factor).to(dtype)
        g = rows.to(torch.float64) / factor - direct
        charged = torch.where((g < 0) & (self.pre.lower < 0), g, 0.0)
        rest = q + back(g) - (g - charged + charged / self.slope)
        least = rest.clamp(min=0) * self.z.lower + rest.clamp(max=0) * self.z.upper
        return rows, (least - charged * self.pre.lower).flatten(2).sum(2)

    def respond(self, q: Tensor, alpha: Tensor | None) -> Tensor:
        """CROWN's multipliers for rows on ``z``, both (rows, batch, *state)."""
        fixed, start = None if alpha is None else alpha.detach(), torch.zeros_like(q).flatten(0, 1)[None]
        dtype = torch.float64 if self.snapshot.exact else torch.float32
        with torch.no_grad():
            step = self.detached(dtype)._response(q.to(dtype), fixed)
            value = fixed_point(step, start.to(dtype), self.snapshot.solver).value
        # Any multipliers are sound, but for NaN.
        value = value.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
        frozen = self.detached()._response(q.detach(), fixed)
        return self.snapshot.attach(value, self._response(q, alpha), frozen)[0].view_as(q)

    def _response(self, q: Tensor, alpha: Tensor | None) -> Step:
        transposed = self.snapshot.solved[0].transpose()
        low, high = self.lines(alpha)

        def step(g: Tensor) -> Tensor:
            pulled = q + transposed.apply(g[0]).view_as(q)
            return (torch.where(pulled > 0, low, high) * pulled).flatten(0, 1)[None]

        return step

    def forward(self, lower: Tensor, upper: Tensor, *, pre: bool = False) -> tuple[Tensor, Tensor]:
        """Linear bounds of ``z``, or of ``P``, from linear bounds of ``v``: their coefficients and, last, constants.

        Args:
            lower: (batch, terms, *state).
            upper: likewise.
            pre: bounds of ``P``.
        """
        v = torch.stack((lower, upper)).to(torch.float64).flatten(1, 2)
        step, frozen = self._push(v), self.detached()._push(v.detach())
        ends = torch.zeros_like(v).view(2, *lower.shape)
        ends[:, :, -1] = torch.stack((self.z.lower, self.z.upper)).detach()
        # Plain steps: each of them takes bounds to bounds.
        plain = Picard(self.snapshot.solver.tol, self.snapshot.solver.max_steps)
        with torch.no_grad():
            value = fixed_point(frozen, ends.flatten(1, 2), plain).value
        found = self.snapshot.attach(value, step, frozen)
        result = self._spread(found, v) if pre else found
        below, above = result.view(2, *lower.shape)
        return below, above

    def _spread(self, z: Tensor, v: Tensor) -> Tensor:
        """Bounds of ``P`` from bounds of ``z`` and ``v``, each (2, batch * terms, *state)."""
        solved, factor = self.snapshot.solved
        center, radius = solved.apply((z[0] + z[1]) / 2), solved.absolute().apply((z[1] - z[0]) / 2)
        return torch.stack((center - radius, center + radius)) + v * factor

    def _push(self, v: Tensor) -> Step:
        return lambda z: self.through(self._spread(z, v))

    def through(self, p: Tensor) -> Tensor:
        """Bounds of ``relu(P)`` from those of ``P``: (2, batch * terms, *state), the constants of a sample last."""
        low, high = self.lines(None)
        batch, state = len(low), low.shape[1:]
        below, above = p.view(2, batch, -1, *state)
        intercept = torch.where(self.unstable, -self.slope * self.pre.lower, 0.0)
        raised = high[:, None] * above
        raised = torch.cat((raised[:, :-1], raised[:, -1:] + intercept[:, None]), 1)
        return torch.stack((low[:, None] * below, raised)).view_as(p)


def _within(box: Box, other: Box) -> Box:
    """The common part; the first where rounding has made the two miss each other."""
    part = box.intersect(other)
    missed = part.lower > part.upper
    return Box(torch.where(missed, box.lower, part.lower), torch.where(missed, box.upper, part.upper))
