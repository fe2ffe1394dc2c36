"""What tests stand on: exact arithmetic, strategies, and suites that a new method or parametrization inherits.

Needs pytest and hypothesis (``pip install verideq[test]``). Nothing else in the package imports it.
"""
