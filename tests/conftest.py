"""What every test stands on: one torch thread, the same hypothesis examples each time, the image data if there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The order of a sum, and so its last bit, depends on the number of threads.
torch.set_num_threads(1)

# A test that fails must fail again tomorrow, and a slow machine is no failure.
settings.register_profile("verideq", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("verideq")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of ``VERIDEQ_DATA``, which holds ``mnist/``; without the variable the test is skipped."""
    folder = os.environ.get("VERIDEQ_DATA")
    if not folder:
        pytest.skip("VERIDEQ_DATA is not set; it names a folder that holds mnist/ as .npy files")
    return Path(folder)
