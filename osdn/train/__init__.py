"""Training: recipes, the loop, checkpoints that survive a kill, logs."""

from osdn.train.log.run_log import TrainResult
from osdn.train.loop import train
from osdn.train.recipe import Recipe, load_recipe

__all__ = ["Recipe", "TrainResult", "load_recipe", "train"]
