"""auto_LiRPA for the tests: 0.3, of 2022, with the names that newer NumPy and torch took away; a newer one as it is.

As a program it runs another with auto_LiRPA imported: ``python auto_lirpa_shims.py SCRIPT ARGUMENTS...``.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import types
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pytest
import torch

REQUIRED = "VERIDEQ_REQUIRE_AUTO_LIRPA"
"""Set where a missing auto_LiRPA is a failure and no reason to skip."""


def installed() -> str | None:
    """The version of auto_LiRPA, or ``None``."""
    try:
        return version("auto_LiRPA")
    except PackageNotFoundError:
        return None


def auto_lirpa() -> Any:
    """auto_LiRPA, or the test, or the whole file of tests, is skipped."""
    if installed() is None:
        if os.environ.get(REQUIRED):
            raise RuntimeError(f"{REQUIRED} is set, and auto_LiRPA is not installed: see .ci/run")
        pytest.skip("auto_LiRPA is not installed (docs/auto-lirpa.md)", allow_module_level=True)
    depth = sys.getrecursionlimit()
    with warnings.catch_warnings(record=True):  # of its own, and it changes the filters
        if str(installed()).startswith("0.3"):
            _mend()
        module = importlib.import_module("auto_LiRPA")
    sys.setrecursionlimit(depth)  # it lifts that to a million
    return module


def _mend() -> None:
    # `from numpy.lib.arraysetops import isin`, which it does not use.
    stub: Any = types.ModuleType("numpy.lib.arraysetops")
    stub.isin = np.isin
    sys.modules.setdefault("numpy.lib.arraysetops", stub)

    # Set before the trace becomes an ONNX graph.
    exporter: Any = importlib.import_module("torch.onnx._internal.torchscript_exporter._globals")

    def set_opset_version(opset: int) -> None:
        exporter.GLOBALS.export_onnx_opset_version = opset

    helper: Any = importlib.import_module("torch.onnx.symbolic_helper")
    helper._set_opset_version = set_opset_version

    # Attributes of a node were its items.
    node: Any = torch._C.Node
    node.__getitem__ = helper._node_get

    # An override that lacks an argument which torch now passes.
    module: Any = importlib.import_module("auto_LiRPA.bound_general").BoundedModule
    original = module._named_members
    if "remove_duplicate" not in original.__code__.co_varnames:
        module._named_members = lambda self, members, prefix="", recurse=True, remove_duplicate=True: original(
            self, members, prefix, recurse
        )


if __name__ == "__main__":
    auto_lirpa()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
