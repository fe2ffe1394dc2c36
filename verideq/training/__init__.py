"""Certified training: the interval loss with elided margins, recipes, runs that can be taken up again."""

from verideq.training.recipe import Recipe, read_recipe
from verideq.training.train import Trainer

__all__ = ["Recipe", "Trainer", "read_recipe"]
