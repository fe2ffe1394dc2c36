"""The adjoint bounds through the suite that every method has to pass, and what is particular to them."""

from __future__ import annotations

from verideq.testing.conformance import BoundMethodSuite


class TestAdjoint(BoundMethodSuite):
    method = "adjoint"


class TestAdjointRefined(BoundMethodSuite):
    method = "adjoint-refined"
