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


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small model, trained here in two seconds: nine of ten digits are right, most certified at 0.02."""
    from verideq.training import Trainer
    from verideq.training.recipe import make_recipe

    settings = {"eps": "0.05", "epochs": 5, "natural_epochs": 1, "ramp_epochs": 3, "learning_rate": 2e-2}
    recipe = make_recipe({"architecture": "linear-deq", "options": {"width": 24}, **settings})
    return Trainer(recipe, tmp_path_factory.mktemp("digits"), torch.device("cpu")).run()
