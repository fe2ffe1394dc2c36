"""What bounds take: predictions of bytes, by counting the tensors that live at the same time.

The numbers of copies were measured on dense and convolutional networks (``benchmarks/memory.py``), and rounded up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verideq.certify.method import Prepared
from verideq.equilibrium import Equilibrium, FeedbackFusion
from verideq.errors import NotEnoughMemory
from verideq.memory import fitting

FORWARD = 16
"""Copies of a value and its successor while boxes go forwards: a pair, its rounding, and the solver's memory."""
BACKWARD = 10
"""Copies of a row's coefficients on a value and its successor while the row goes backwards."""
CLIMB = 3
"""And how many times as many with what gradients need."""
CHECK = 16
"""Copies of a multiplier in the checker: intervals, and their products with signs apart."""
ROUNDS = 3
"""Tightenings of one node, at most, after a first of few units."""
WORK = 2**24
"""Coefficients of the rows that a round of tightening has of one sample, at most."""
NUMBER = 8
"""Bytes of a float64."""
PLAIN = ("interval", "adjoint")
"""Methods that tighten nothing."""


@dataclass(frozen=True)
class Footprint:
    """The sizes of a network, in numbers.

    Args:
        plain: of the largest value together with its successor.
        columns: of the largest convolution multiplied out, as its float64 product is.
        relaxed: of all values that are relaxed.
        values: of all values.
        rows: that are to be bounded of a sample.
        inputs: of a sample.
        device: where.
        monotone: a layer of the network has no gauge.
    """

    plain: int
    columns: int
    relaxed: int
    values: int
    rows: int
    inputs: int
    device: torch.device
    monotone: bool

    @staticmethod
    def of(prepared: Prepared, x: Tensor, rows: int) -> Footprint:
        """Of a model and inputs, (batch, *features)."""
        shapes = {name: math.prod(shape) for name, shape in prepared.graph.shapes(x).items()}
        pairs, columns, relaxed = [0], [0], 0
        for node in prepared.graph.nodes:
            pairs.append(sum(shapes[name] for name in (*node.inputs, node.name)))
            if node.operation.kind in ("relu", "equilibrium"):
                relaxed += shapes[node.name]
            layer = node.module.fusion if isinstance(node.module, Equilibrium) else node.module
            if isinstance(layer, FeedbackFusion):
                for coupling in (own for own in layer.raw() if own.weight.dim() == 4):
                    pixels = max(math.prod(coupling.above[1:]), math.prod(coupling.below[1:]))
                    columns.append(pixels * coupling.weight[0].numel())
            if isinstance(layer, nn.Conv2d):
                pixels = max(shapes[node.name] // layer.out_channels, shapes[node.inputs[0]] // layer.in_channels)
                columns.append(pixels * layer.in_channels * math.prod(layer.kernel_size))
        inputs = x[0].numel()
        total, monotone = sum(shapes.values()), bool(prepared.monotone)
        return Footprint(max(pairs), max(columns), relaxed, total, rows, inputs, prepared.device, monotone)

    @property
    def sample(self) -> int:
        """Bytes of one sample on its way forwards."""
        return NUMBER * (FORWARD * self.plain + 2 * self.columns + 4 * self.values)

    @property
    def row(self) -> int:
        """Bytes of one row on its way backwards."""
        return NUMBER * (BACKWARD * self.plain + self.columns)

    @property
    def climb(self) -> int:
        """Bytes of one row whose multipliers climb: it is a sample of its own."""
        return CLIMB * self.row + 12 * NUMBER * (self.relaxed + self.values)

    @property
    def tightened(self) -> int:
        """Numbers in the multipliers of one round of tightening of one sample, at most."""
        return min(2 * self.relaxed**2, WORK)

    @property
    def steps(self) -> int:
        """Bytes of a sample's tightenings, in float32, as they are and as a record has them."""
        return (ROUNDS + 1) * self.tightened * 2 * 4

    def samples_at_once(self, method: str) -> int:
        """How many samples a method can take at a time, one or more.

        Raises:
            NotEnoughMemory: not even one row of one sample fits.
        """
        if self.rows_at_once(method) < self.rows:
            return 1
        fixed, each, base = self._parts(method)
        return fitting(fixed + self.rows * each, self.device, f"{method} of one sample", base)

    def rows_at_once(self, method: str) -> int:
        """How many rows of one sample it can take at a time.

        Raises:
            NotEnoughMemory: not even one.
        """
        fixed, each, base = self._parts(method)
        return min(self.rows, fitting(each, self.device, f"{method} of one sample and row", base + fixed))

    def attacks_at_once(self) -> int:
        """How many samples an attack can take at a time: two restarts of each, with what gradients need."""
        try:
            return fitting(2 * CLIMB * self.sample, self.device, "an attack on one sample")
        except NotEnoughMemory:
            return 1  # less than its bound takes, which says so

    def _parts(self, method: str) -> tuple[int, int, int]:
        """Bytes of a sample, of a row of it, and of what is there once."""
        if method == "interval":
            return self.sample, NUMBER * 2 * self.plain, 0
        if method == "quadratic" or (self.monotone and method in ("branch-and-bound", "auto")):
            return self.sample + 3 * NUMBER * self.relaxed * self.inputs, self.square, 0
        # Its multipliers are kept, as they are and as a record has them.
        row = self.row + self.relaxed * (2 * NUMBER + 2 * 4)
        if method in PLAIN or not self.relaxed:
            return self.sample, row, 0
        return self.sample + self.steps, row, max(self.row, CHECK * NUMBER * self.tightened)

    @property
    def square(self) -> int:
        """Bytes of one row of the quadratic bound: its matrices, and the inputs' part in them."""
        return NUMBER * (10 * self.relaxed**2 + 4 * self.relaxed * self.inputs)
