"""kdexp: find the smallest student network that still meets an accuracy bar, by knowledge
distillation.

The map of the package. A folder is a room; imports point down only (tests/test_layers.py holds it
to that).

    cli, screen, as_json parse · print for people · for programs
    api                  the same from Python
    init                 a sweep file to begin with
    completion           what a shell completes
    ui, doctor           MLflow's UI · whether the stores fit what is installed

    search/              a study, from its first proposal to its last trial
      sweep, live          data and teacher once, then the trials, as a stream of events · the
                           study's page meanwhile
      scheduler            decides and records: asks Optuna, hands out jobs, writes the runs, tells
      study, storage, learned
                           Optuna (only these know it): a study · its database · what its search
                           came to
      space                values as Optuna stores them; which recipes are nearly the same
      claims               which command trains which trial
      objective, stopping  what a study aims at · what it can no longer select
      check, sizes         what a sweep would do, and how long · the students that a search holds
      remembered           what Optuna was told of trials, against what their runs record

    select/              what a study comes to
      promote              the selected model: a look at the test split, the registry
      confirm, fresh       its verdict by fresh seeds · trained for it
      export, variants     a run's student as a file · the smaller forms of a student
      predict, benchmark   what a student says of images from anywhere · its forms side by side
      students, listing    which student a command is about · what studies and trials there are
      status               how a study stands: how far, who is at it
      reproduce            a run trained again
      compare, verify      two runs' records · a record against itself and its weights
      report, page         what a study comes to, from its records · as one HTML file
      mistakes             what a student takes for what

    runs/                what is recorded of a training, and where
      tracking, embedded   MLflow (the only file that knows it) · the embedded store's artifacts
      recording, prepare   the MLflow run of one training · data and teacher, ready and on record
      outcome, records     what came of a training · recipe and student of a run
      describe, plots, svg a run in words · in pictures · in pictures inside a page
      views                the pages of MLflow's UI: their addresses, what they show
      served               what answers where a registered model is served
      rehearsed            what recording a training takes here
      schema, bench        which version a database is for · what every command works with

    workers/             who trains; neither servers nor studies are known here
      pool, processes      threads or processes and their inbox · how processes are made
      rehearsal            what the parts of a training take here, timed
      work, preload        from a job to what came of it · imported once for all processes

    distill/             the core: plain PyTorch
      teacher, logits      trained once · the cache of its logits
      weights              out of any checkpoint
      execution            how a training is carried out here: compiled, precision, how many at once
      train, checkpoints   a training, epoch by epoch · what it goes on from
      guard                that what is trained is the network that is stored
      packs, stacked       the step for one trial, lifted to K · networks as plain functions
      optimizers, losses, randomness, evaluate
      compact, deploy      folded without loss · one ONNX file (the only file that knows ONNX)
      models, plain        students and teachers by name · which layers are plain
      datasets, batches    data sets as tensors · mini-batches: views of images, and pixels
      arrays               arrays of one's own, from a file or a function
      folders, images, inspection
                           a folder's images · one file as pixels · each opened once
      inputs               images from anywhere, prepared as in training
      footprint, latency   memory that activations need · time that an image takes

    config, reading      what to run · text to config, or one clear line
    settings             where to run it
    selection, repeats   the selection rule · what repeats of a recipe prove
    intervals            how sure a measured accuracy is
    environment, limits  what a result depends on besides its recipe · cores and memory to use
    own, imported        files with networks of one's own · what they import
    surroundings         what a process cannot choose: locale, closed streams, ~, memory
    patience, deadline   how a server is waited for · when a command must have ended
    files, urls          atomic writes · addresses and their secrets

Importing `kdexp` imports nothing heavy: the names of `kdexp.api` come with their first use.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdexp.api import Model, Study, load_model, load_sweep, open_study, run_sweep

__all__ = [
    "KdexpError",
    "Model",
    "Study",
    "__version__",
    "load_model",
    "load_sweep",
    "open_study",
    "run_sweep",
]

try:
    __version__ = version("kdexp")
except PackageNotFoundError:  # a source tree that nobody installed
    __version__ = "0+source"


class KdexpError(Exception):
    """A failure the user can do something about: one line saying what, where, and what to do."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kdexp' has no attribute '{name}'")
    from kdexp import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
