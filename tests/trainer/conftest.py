import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a model or data set that is not found is an error at once, not after retries
sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py and tiny_runs.py

import torch
from tiny_runs import no_plots, tiny_models  # noqa: F401

torch.set_num_threads(1)  # models this small gain nothing from a second one
