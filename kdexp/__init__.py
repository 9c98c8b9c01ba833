"""kdexp: find the smallest student network that still meets an accuracy bar, by knowledge distillation.

The map of the package (imports point down only; tests/test_layers.py holds it to that):

    cli, screen                      parse and print
    sweep · reproduce                a study from start to end · a run trained again
    promote · confirm, fresh         the selected model · its verdict by fresh seeds, trained for it
    export · variants                a run's student as a file · the smaller forms of a trained student
    compare · verify                 two runs' records side by side · a record held against itself and its weights
    scheduler                        decides and records: asks Optuna, hands out jobs, writes the runs, tells
    remembered                       what Optuna was told of trials, against what their runs record
    study · claims                   Optuna (the only file that knows it) · which command trains which trial
    prepare · runs                   data and teacher, ready and on record · the MLflow run of one training
    pool, preload · work             workers, as threads or processes · one worker: from a job to what came of it
    workers                          how worker processes are made
    describe · outcome · bench       a run in words · what came of a training · what every command works with
    tracking · ui · records          MLflow (the only file that knows it) · its UI · recipe and student of a run
    embedded                         where the embedded store's artifacts are, wherever its folder is by now
    doctor · schema                  whether the stores fit what is installed · which version a database is for
    objective, stopping              what a study aims at · what it can no longer select
    selection, intervals             the selection rule · how sure it is
    plots, environment, imported     pictures · what a result depends on besides its recipe · of one's own modules
    distill.teacher, distill.weights the teacher, trained once, and the cache of its logits · weights out of any checkpoint
    distill.execution                how a training is carried out here: compiled, in which precision, how many at once
    distill.{train, checkpoints}     a training, epoch by epoch · what it goes on from
    distill.guard                    that what is trained is the network that is stored
    distill.{packs, stacked, optimizers, losses, randomness}    the step for one trial, lifted to K; plain PyTorch
    distill.{compact, deploy}        folded without loss · one ONNX file (the only file that knows ONNX)
    distill.{data, models, plain, evaluate}    what it is made of
    distill.{images, folders, inspection} one image file as pixels · a folder's images · each opened once, and what was read
    config, settings, reading, files what to run · where to run it · text to config, or one clear line · atomic writes
    surroundings · own               what a process cannot choose: locale, closed streams, ~, memory · files with own networks
    patience                         how a server that is away is waited for
    urls                             addresses of servers and databases, and the secrets in them

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
