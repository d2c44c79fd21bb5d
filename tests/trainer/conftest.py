import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py and tiny_runs.py

from tiny_runs import tiny_models  # noqa: F401

torch.set_num_threads(1)  # models this small gain nothing from a second one
