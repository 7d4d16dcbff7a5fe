"""Training: recipes, the loop, checkpoints that survive a kill, logs."""

from osdn.train.config import Recipe, load_recipe
from osdn.train.logs import TrainResult
from osdn.train.loop import train

__all__ = ["Recipe", "TrainResult", "load_recipe", "train"]
