import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a model or data set that is not found is an error at once, not after retries
sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py and tiny_runs.py

from ppo_steps import gradients  # noqa: F401
from tiny_runs import lean_runs, tiny_models  # noqa: F401
