"""kdexp: find the smallest student network that still meets an accuracy bar, by knowledge distillation.

The map of the package (imports point down only; tests/test_layers.py holds it to that):

    cli, screen                      parse and print
    sweep · reproduce · promote      an Optuna study · a run trained again · the selected model
    runner                           one trial, from recipe to finished MLflow run
    tracking                         MLflow (the only file that knows it)
    selection, plots, environment    pure helpers of the shell
    distill.{data, models, losses, train, evaluate, teacher}    plain PyTorch
    config, settings                 what to run · where to run it

Importing `kdexp` imports nothing heavy.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["KdexpError", "__version__"]

try:
    __version__ = version("kdexp")
except PackageNotFoundError:  # a source tree that nobody installed
    __version__ = "0+source"


class KdexpError(Exception):
    """A failure the user can do something about: one line saying what, where, and what to do."""
