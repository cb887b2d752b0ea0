"""What every test runs under: no hub, one thread, fixed seeds."""

import os

# Before torch, transformers or datasets are imported; processes that a test starts inherit these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny forwards: threads that wait for each other are slower than one, ten times so on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
