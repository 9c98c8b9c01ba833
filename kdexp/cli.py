"""The command line: parse, one call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import atexit
import gc
import inspect
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, get_type_hints

import typer

from kdexp import KdexpError, __version__, completion
from kdexp.deadline import Deadline
from kdexp.files import check_output, settle, write_output
from kdexp.settings import Settings, checked, deaf, in_one_line, without_credentials
from kdexp.surroundings import (
    expanded,
    expanded_url,
    homeless,
    open_streams,
    speak_utf8,
    working_folder,
)

if TYPE_CHECKING:
    from rich.console import Console

    from kdexp.config import Sweep
    from kdexp.runs.tracking import RunRecord, Tracking

app = typer.Typer(
    name="kdexp",
    help=(
        "Find the smallest student network that still meets an accuracy bar, by knowledge"
        " distillation."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep file.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=completion.set_keys,
        help="Override a value of the file, such as training.epochs=10. Repeatable.",
    ),
]
Trials = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="How many trials the study has in all."),
]
Stores = Annotated[
    Path,
    typer.Option(envvar="KDEXP_STORES", help="Folder of the embedded stores and teacher caches."),
]
Storage = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        envvar="KDEXP_STORAGE",
        metavar="URL",
        help="Optuna storage, such as postgresql://…; default: embedded.",
    ),
]
TrackingUri = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        envvar="KDEXP_TRACKING_URI",
        metavar="URL",
        help="MLflow server, such as http://…; default: embedded.",
    ),
]
DataDir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        envvar="KDEXP_DATA_DIR",
        help="Folder of the datasets; default: ./data, then the system's, then download.",
    ),
]
Device = Annotated[str, typer.Option(envvar="KDEXP_DEVICE", help="cpu, cuda, cuda:1, … or auto.")]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        envvar="KDEXP_THREADS",
        min=1,
        help="CPU threads of each process; default: torch's own, or the run's.",
    ),
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        envvar="KDEXP_WORKERS",
        min=1,
        help="Trials side by side; default: one per core, on a GPU one.",
    ),
]
Pack = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        envvar="KDEXP_PACK",
        min=1,
        help="Trials that a process trains as one batch; default: on a GPU the fastest.",
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="The study's name (the sweep file's name).",
        autocompletion=completion.studies,
    ),
]
Bar = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0, max=1, help="Accuracy bar on validation; default: the sweep's."),
]
SizeUnit = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="parameters, multiply_adds, bytes or activation_bytes."),
]
Limit = Annotated[Optional[int], typer.Option(min=1, help="No model larger than this.")]  # noqa: UP045
Confidence = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        metavar="LEVEL",
        help="How sure it must be that the bar is met, such as 0.95; default: the sweep's.",
    ),
]
MostAccurate = Annotated[
    bool, typer.Option("--most-accurate", help="The most accurate within the limit instead.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the answer as JSON, and all else on standard error.")
]
Student = Annotated[
    str,
    typer.Argument(
        metavar="RUN_ID",
        help="The MLflow run of the student, or a registered model: models:/NAME@ALIAS.",
        autocompletion=completion.runs,
    ),
]
COMMON: dict[str, tuple[Any, Any]] = {
    "stores": (Stores, Path("mlruns")),
    "storage": (Storage, None),
    "tracking_uri": (TrackingUri, None),
    "data_dir": (DataDir, None),
    "device": (Device, "auto"),
    "threads": (Threads, None),
    "workers": (Workers, None),
    "pack": (Pack, None),
}
"""Options that several commands share, with their defaults: together they are the settings."""
SWEEPING = (
    "workers",
    "pack",
    "stores",
    "storage",
    "tracking_uri",
    "data_dir",
    "device",
    "threads",
)
"""Those of a whole sweep, in the order of its help."""
RULE: dict[str, tuple[Any, Any]] = {
    "bar": (Bar, None),
    "size": (SizeUnit, None),
    "limit": (Limit, None),
    "confidence": (Confidence, None),
    "most_accurate": (MostAccurate, False),
}
"""Options that change a study's own selection rule."""
STOPPED = 130  # the exit code of what was interrupted
TIME_UP = 75  # of what has to be gone on with: EX_TEMPFAIL of sysexits.h


class Stopped(KdexpError):
    """Ended before its time by a person or the system, with nothing lost."""


class TimeUp(KdexpError):
    """Ended because it was not to last longer, with nothing lost."""


def command(*options: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that takes these common options as its `settings`, and those of RULE, if it asks
    for it, as its `rule`. Its help ends with the example.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function).parameters
        types = get_type_hints(function, include_extras=True)
        groups = {"settings": {name: COMMON[name] for name in options}, "rule": RULE}
        shared = {name: group for name, group in groups.items() if name in own}

        @wraps(function)
        def run(**given: Any) -> None:
            made = {name: {key: given.pop(key) for key in group} for name, group in shared.items()}
            settings = _settings(**made["settings"])
            try:
                function(**given, **made | {"settings": settings})
            finally:
                for name in ("mlflow.db", "optuna.db"):
                    settle(settings.stores / name)

        parameters = [parameter for name, parameter in own.items() if name not in shared]
        typed = [parameter.replace(annotation=types[parameter.name]) for parameter in parameters]
        for group in reversed(shared.values()):
            typed += [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
                )
                for name, (annotation, default) in group.items()
            ]
        typed.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        run.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in typed}
        app.command(function.__name__.rstrip("_"), epilog=f"Example: {example}")(run)
        return run

    return register


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """The options of kdexp itself; without a command, its help."""


@command(
    *SWEEPING,
    example="kdexp sweep digits.yaml --workers 2",
)
def sweep(
    file: SweepFile,
    settings: Settings,
    trials: Trials = None,
    overrides: Overrides = None,
    until: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TIME",
            help="Stop after so long, such as 3h50m, with exit code 75; default: a minute before"
            " its SLURM job ends, if it is one.",
        ),
    ] = None,
) -> None:
    """Run a study, or continue it, and select its smallest model over the bar."""
    deadline = Deadline.of(until)
    config = _load(file, _with_trials(overrides, trials))
    from kdexp.workers.processes import warm_up

    if settings.workers != 1:
        warm_up()  # before this process begins its own imports
    console = _console()
    from kdexp.environment import configure
    from kdexp.runs.tracking import Tracking, TrackingAway
    from kdexp.screen import Screen
    from kdexp.search.scheduler import NoMore, WorkersGone
    from kdexp.search.storage import StudyAway
    from kdexp.search.sweep import run_sweep

    tracking, chosen = Tracking(settings), configure(settings.device, settings.threads)
    try:
        events = run_sweep(config, settings, tracking, chosen, deadline)
        screen = Screen(console, config.study.trials, config.selection, config.repeats)
        with screen, closing(events), deadline.kept():
            others = yield_all(events, screen)
    except KeyboardInterrupt:
        up = deadline.left <= 0
        raise (TimeUp if up else Stopped)(
            f"{'The time is up' if up else 'Stopped'}; finished trials are kept, those under way go"
            f" on from their last checkpoint. Continue with the same command: {_again()}"
        ) from None
    except NoMore as error:
        raise (TimeUp if error.late else Stopped)(
            f"Stopped: {error} Continue with the same command: {_again()}"
        ) from None
    except (WorkersGone, TrackingAway, StudyAway) as error:
        raise KdexpError(
            f"{error} Nothing measured is lost. Continue with the same command: {_again()}"
        ) from error
    if others:
        console.print(
            f"{others} trials are still being trained by other processes; the last one to finish"
            " selects the model."
        )
        return
    _select(config.name, config.selection, settings, tracking, chosen, console, sure=True)


@command(
    *SWEEPING,
    example="kdexp check digits.yaml --workers 2",
)
def check(
    file: SweepFile,
    settings: Settings,
    trials: Trials = None,
    overrides: Overrides = None,
) -> None:
    """Show what a sweep would do and how long it takes here, by a few timed steps; record
    nothing.
    """
    begun = time.perf_counter()
    config = _load(file, _with_trials(overrides, trials))
    from kdexp.workers.processes import warm_up

    if settings.workers != 1:
        warm_up()
    console = _console()
    from kdexp.environment import configure
    from kdexp.screen import Screen, show_check
    from kdexp.search.check import check as checked_by

    chosen = configure(settings.device, settings.threads)
    events = checked_by(config, settings, chosen, time.perf_counter() - begun)
    with Screen(console) as screen, closing(events):
        done = yield_all(events, screen)
    show_check(console, done)
    console.print(f"\nNext:     kdexp sweep {_same_options('check')}", markup=False)


@command(
    "stores",
    "tracking_uri",
    "data_dir",
    "device",
    "threads",
    example="kdexp train digits.yaml --set training.epochs=5",
)
def train(
    file: SweepFile,
    settings: Settings,
    overrides: Overrides = None,
) -> None:
    """Train one student at the file's own values."""
    config = _load(file, overrides)
    console = _console()
    from kdexp.environment import configure
    from kdexp.runs.bench import Bench
    from kdexp.runs.prepare import prepare
    from kdexp.runs.recording import Entry, recorded
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import Screen, interval, percent, teacher_line

    tracking, chosen = Tracking(settings), configure(settings.device, settings.threads)
    bench = Bench(settings, tracking, chosen, tracking.experiment(config.name))
    with Screen(console) as screen:
        prepared = yield_all(prepare(config.recipe, bench, training=config.training), screen)
        console.print(teacher_line(prepared.teacher))
        entry = Entry("train", f"train {config.name}")
        with recorded(config.recipe, prepared, bench, entry) as recording:
            for report in recording.epochs():
                screen.show(report)
    result = recording.outcome
    assert result is not None
    if result.state == "diverged":
        raise KdexpError(
            f"The training diverged in epoch {result.epochs}: lower training.learning_rate (run"
            f" {result.run_id})."
        )
    console.print(
        f"{result.size.parameters:,} parameters, val accuracy {percent(result.val_accuracy)}"
        f" (95 % interval {interval(result.val_interval)}), weights of epoch {result.kept_epoch}\n"
        f"Run ID:   {result.run_id}\n\n"
        f"Next:     kdexp ui\n          kdexp reproduce {result.run_id}"
    )


@command(
    "stores", "tracking_uri", "data_dir", "device", "threads", example="kdexp teacher digits.yaml"
)
def teacher(
    file: SweepFile,
    settings: Settings,
    overrides: Overrides = None,
) -> None:
    """Train the teacher, or check the one there is, and fill its cache."""
    config = _load(file, overrides)
    console = _console()
    from kdexp.environment import configure
    from kdexp.runs.bench import Bench
    from kdexp.runs.prepare import prepare
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import Screen, interval, teacher_line

    tracking, chosen = Tracking(settings), configure(settings.device, settings.threads)
    bench = Bench(settings, tracking, chosen, tracking.experiment(config.name))
    with Screen(console) as screen:
        shared = config.shared_training
        prepared = yield_all(prepare(config.recipe, bench, training=shared), screen)
    console.print(teacher_line(prepared.teacher))
    console.print(
        f"          95 % interval {interval(prepared.teacher.val_interval)};"
        f" weights {prepared.teacher.weights}\n"
        f"Run ID:   {prepared.teacher_run}\n\n"
        f"Next:     kdexp sweep {file}"
    )


@command(
    "stores",
    "storage",
    "tracking_uri",
    "data_dir",
    "device",
    example="kdexp select digits --bar 0.97",
)
def select(
    study: StudyName,
    settings: Settings,
    rule: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Select the smallest model of a study that meets the bar, and look at the test set once for
    it.
    """
    from kdexp.environment import configure
    from kdexp.runs.tracking import Tracking

    tracking = Tracking(settings, make=False)
    _select(
        study,
        _rule(study, tracking, rule),
        settings,
        tracking,
        configure(settings.device, None),
        _console(as_json),
        as_json=as_json,
    )


@command(
    "stores",
    "storage",
    "tracking_uri",
    "data_dir",
    "device",
    "threads",
    example="kdexp confirm digits --seeds 20",
)
def confirm(
    study: StudyName,
    settings: Settings,
    rule: dict[str, Any],
    seeds: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="How many fresh seeds each candidate is trained with."
        ),
    ] = 3,
    train_and_validation: Annotated[
        bool,
        typer.Option(
            "--train-and-validation",
            help="Train the confirmed model on both, and look at that on test.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the selected model again with fresh seeds; if they miss the bar, the next one; look at
    test for the confirmed.
    """
    console = _console(as_json)
    from kdexp.environment import configure
    from kdexp.runs.tracking import Tracking, TrackingAway
    from kdexp.screen import Screen, show_confirmation
    from kdexp.select.confirm import confirm as with_fresh_seeds

    tracking = Tracking(settings, make=False)
    chosen, parent = configure(settings.device, settings.threads), tracking.study(study)
    try:
        events = with_fresh_seeds(
            parent,
            _rule(study, tracking, rule),
            seeds,
            train_and_validation,
            settings,
            tracking,
            chosen,
        )
        with Screen(console) as screen, closing(events):
            done = yield_all(events, screen)
    except KeyboardInterrupt:
        raise Stopped(
            f"Stopped; what is trained is kept. Continue with the same command: {_again()}"
        ) from None
    except TrackingAway as error:
        raise KdexpError(
            f"{error} Nothing measured is lost. Continue with the same command: {_again()}"
        ) from error
    if as_json:
        _print_json(done)
    else:
        show_confirmation(console, done, settings.tracking_shown)
    _report(parent, done.verdict.rule, settings, tracking, console)


@command(
    "stores",
    "tracking_uri",
    "data_dir",
    "device",
    "threads",
    example="kdexp reproduce 5f31205e083946b19c1115d763c0761a",
)
def reproduce(
    run_id: Annotated[
        str,
        typer.Argument(
            metavar="RUN_ID",
            help="The MLflow run to train again.",
            autocompletion=completion.runs,
        ),
    ],
    settings: Settings,
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0, help="On another machine: let losses and accuracies differ by so much."
        ),
    ] = None,
) -> None:
    """Train a run again from its own record, compare, and say identical or what differs."""
    console = _console()
    from kdexp.environment import configure
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import Screen, show_comparison
    from kdexp.select.reproduce import reproduce as again

    tracking, chosen = Tracking(settings, make=False), configure(settings.device, settings.threads)
    with Screen(console) as screen, closing(again(run_id, settings, tracking, chosen)) as events:
        comparison = yield_all(events, screen)
    show_comparison(console, comparison, tolerance)
    if not (comparison.identical or comparison.within(tolerance)):
        raise KdexpError(comparison.failure)


@command(
    "stores",
    "tracking_uri",
    "data_dir",
    example="kdexp export 5f31205e083946b19c1115d763c0761a --precision int8",
)
def export(
    run_id: Annotated[
        str,
        typer.Argument(
            metavar="RUN_ID",
            help="The MLflow run whose student to export.",
            autocompletion=completion.runs,
        ),
    ],
    settings: Settings,
    precision: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="How the weights are stored: float32, float16 or int8."),
    ] = "float32",
    output: Annotated[
        Path | None, typer.Option(help="The file to write; default: RUN_ID-PRECISION.onnx here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's student as an ONNX file that takes pixels, folded, and measure it on validation
    by running it.
    """
    from kdexp.environment import configure
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import show_export
    from kdexp.select.export import export as written

    configure(settings.device, None)
    output = expanded(output) if output else None
    done = written(run_id, precision, output, settings, Tracking(settings, make=False))
    if as_json:
        _print_json(done)
    else:
        show_export(_console(), done)


@command(
    "stores",
    "tracking_uri",
    "data_dir",
    "device",
    "threads",
    example="kdexp predict models:/digits@smallest photos --out predictions.csv",
)
def predict(
    run_id: Student,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATHS...", help="Image files, and folders that hold images."),
    ],
    settings: Settings,
    out: Annotated[
        Path | None, typer.Option(help="Write a CSV file with a row for each image.")
    ] = None,
) -> None:
    """Name the two likeliest classes of images of any size, and how probable they are, by a run's
    student.
    """
    from kdexp.distill.images import shown
    from kdexp.select.predict import write_csv

    out = expanded(out) if out else None
    if out:
        check_output("--out", out, "predictions.csv", shown)
    console = _console()
    from kdexp.environment import configure
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import Screen, show_predictions
    from kdexp.select.predict import predict as answers

    tracking, chosen = Tracking(settings, make=False), configure(settings.device, settings.threads)
    events = answers(run_id, [expanded(path) for path in paths], settings, tracking, chosen)
    with Screen(console) as screen, closing(events):
        done = yield_all(events, screen)
    if out:
        write_csv(done, out)
    show_predictions(console, done, out)


@command(
    "stores",
    "tracking_uri",
    "data_dir",
    "threads",
    example="kdexp benchmark models:/digits@smallest --floor 0.96",
)
def benchmark(
    run_id: Student,
    settings: Settings,
    floor: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0,
            max=1,
            metavar="ACCURACY",
            help="Fail where the chosen form is less accurate on validation, such as 0.92.",
        ),
    ] = None,
    form: Annotated[
        Optional[Literal["as-trained", "float32", "float16", "int8"]],  # noqa: UP045
        typer.Option(
            help="The chosen form; default: the registered one of models:/…, else the most"
            " accurate."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a student's forms side by side: size, memory, accuracy on validation, speed."""
    from kdexp.environment import configure
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import show_benchmark
    from kdexp.select.benchmark import below
    from kdexp.select.benchmark import benchmark as measured
    from kdexp.selection import AS_TRAINED

    configure(settings.device, settings.threads)
    asked = AS_TRAINED if form == "as-trained" else form
    done = measured(run_id, asked, settings, Tracking(settings, make=False))
    if as_json:
        _print_json(done)
    else:
        show_benchmark(_console(), done)
    if floor is not None and (failure := below(done, floor)):
        raise KdexpError(failure)


@command("stores", "tracking_uri", example="kdexp list digits")
def list_(
    settings: Settings,
    study: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="STUDY",
            help="A study's name; default: every study.",
            autocompletion=completion.studies,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the studies of the store, or the trials of one, smallest first."""
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import show_studies, show_trials
    from kdexp.select.listing import studies_there, trials_of

    tracking = Tracking(settings, make=False)
    if study:
        trials = trials_of(tracking.study(study), tracking)
        _print_json(trials) if as_json else show_trials(_console(), trials)
    else:
        studies = studies_there(tracking)
        _print_json(studies) if as_json else show_studies(_console(), studies)


@command("stores", "storage", "tracking_uri", example="kdexp stop digits")
def stop(study: StudyName, settings: Settings) -> None:
    """Let every sweep of a study end what it trains and begin nothing more; the same sweep goes on
    later.
    """
    from kdexp.runs.tracking import Tracking
    from kdexp.select.status import stop as asked

    tracking = Tracking(settings, make=False)
    busy = asked(tracking.study(study), settings, tracking)
    trials = "1 trial" if busy == 1 else f"{busy} trials"
    print(
        f"Study {study} begins nothing more; {trials} under way {'is' if busy == 1 else 'are'}"
        " trained to the end. kdexp sweep goes on with it."
        if busy
        else f"Nobody is at study {study}. kdexp sweep goes on with it."
    )


@command("stores", "storage", "tracking_uri", example="kdexp status digits --watch")
def status(
    settings: Settings,
    study: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="STUDY",
            help="A study's name; default: every study that is not finished.",
            autocompletion=completion.studies,
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds, until it is finished.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how a study stands: how far it is, who is at it, what is sure so far, how long it takes
    yet.
    """
    from kdexp.runs.tracking import Tracking
    from kdexp.screen import show_status, watch_status
    from kdexp.select.status import status as looked
    from kdexp.select.status import unfinished

    if watch and as_json:
        raise typer.BadParameter("--watch shows it again and again, --json prints it once")
    tracking = Tracking(settings, make=False)

    def look() -> list[Any]:
        studies = [tracking.study(study)] if study else unfinished(tracking)
        return [looked(each, settings, tracking) for each in studies]

    if watch:
        watch_status(_console(), look)
    elif as_json:
        _print_json(look())
    else:
        show_status(_console(), look())


@command("stores", "storage", "tracking_uri", example="kdexp report digits --open")
def report(
    study: StudyName,
    settings: Settings,
    rule: dict[str, Any],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; default: STUDY-report.html here.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write what a study came to as one HTML file that needs no network: the answer, how sure it
    is, the frontier.
    """
    from kdexp.runs.tracking import Tracking
    from kdexp.runs.views import REPORT
    from kdexp.select import page

    output = expanded(output) if output else None
    if output:
        check_output("--output", output, REPORT)
    tracking = Tracking(settings, make=False)
    parent = tracking.study(study)
    text = page.made(parent, _rule(study, tracking, rule), settings, tracking)
    file = output or Path(f"{parent.tags['kdexp.study'].replace('/', '-')}-report.html")
    write_output("--output", file, lambda path: path.write_text(text, "utf-8"))
    print(f"Written:  {file}")
    try:
        page.keep(text, parent, tracking)
    except KdexpError as error:  # a store that this person may only read
        print(f"          not kept with the study's run: {without_credentials(str(error))}")
    if show:
        import webbrowser

        if not webbrowser.open(file.resolve().as_uri()):
            print("          no browser is known here: open it by hand")


@command("stores", "tracking_uri", example="kdexp ui --port 5001")
def ui(
    settings: Settings,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Serve the MLflow UI on 127.0.0.1 and print the address of each study's page."""
    from kdexp.runs.tracking import Tracking
    from kdexp.ui import serve

    serve(Tracking(settings, make=False), port, _console())


@app.command(epilog="Example: kdexp init photos --output photos.yaml")
def init(
    what: Annotated[
        str,
        typer.Argument(
            metavar="digits|fashion-mnist|FOLDER",
            help="A data set by name, or a folder with a sub-folder of images for each class.",
        ),
    ] = "digits",
    output: Annotated[
        Path | None, typer.Option(help="The file to write; default: named as what it is for, here.")
    ] = None,
) -> None:
    """Write a commented sweep file to begin with, and the schema that editors check it by."""
    from kdexp.init import begin

    begun = begin(what, expanded(output) if output else None)
    for line in begun.said:
        print(line)
    print(f"Written:  {begun.file}, {begun.schema}\n\nNext:     kdexp sweep {begun.file}")


@app.command(epilog="Example: kdexp schema > sweep.schema.json")
def schema() -> None:
    """Print the JSON schema of a sweep file: every key, what it may be, its default."""
    import json

    from kdexp.config import Sweep

    print(json.dumps(Sweep.model_json_schema(), indent=1))


@command("stores", "storage", "tracking_uri", example="kdexp doctor --upgrade")
def doctor(
    settings: Settings,
    upgrade: Annotated[
        bool,
        typer.Option(
            "--upgrade", help="Take databases of older versions along, each copied first."
        ),
    ] = False,
) -> None:
    """Say which versions are here, and whether the stores fit them; change nothing unless asked
    to.
    """
    from kdexp.doctor import examine

    if not examine(settings, upgrade, lambda line: print(without_credentials(line))):
        sys.exit(1)


def main() -> None:
    """The console script: every failure in one line on stderr, exit code not 0; --debug shows the
    traceback.
    """
    speak_utf8()
    open_streams()
    homeless()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    arguments = arguments or ["--help"]
    if arguments == ["--version"]:
        print(f"kdexp {__version__}")
        return
    for kind in ("SIGTERM", "SIGHUP"):
        # as under nohup
        if hasattr(signal, kind) and signal.getsignal(getattr(signal, kind)) != signal.SIG_IGN:
            signal.signal(getattr(signal, kind), _interrupt)
    # at its end Python would look through all that the libraries made: 3 s
    atexit.register(gc.freeze)
    try:
        if "--help" not in arguments:
            # where architecture: package.module:callable is looked for
            sys.path.append(str(working_folder()))
        code = app(arguments, prog_name="kdexp", standalone_mode=False) or 0
        if code == STOPPED:  # typer makes that of a Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort) as stop:
        # typer takes it for Ctrl-D; but nobody is asked anything here. A Ctrl-C is one, whatever
        # was being handled as it came.
        if isinstance(stop, typer.Abort) and isinstance(stop.__context__, EOFError):
            _fail(
                "A process that this one had started is gone. Give the same command again; --debug"
                " shows more.",
                1,
            )
        _fail(f"Stopped. To start again: {_again()}", STOPPED)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a missing argument, an unknown option
            _fail(f"{error.format_message()} See kdexp --help.", getattr(error, "exit_code", 2))
        if debug:
            print(without_credentials(traceback.format_exc()), end="", file=sys.stderr)
            sys.exit(1)
        code = STOPPED if _stopped(error) else 1
        _fail(in_one_line(error), TIME_UP if isinstance(error, TimeUp) else code)


def _stopped(error: BaseException | None) -> bool:
    """Whether a Ctrl-C led to an error: it says so, or came up on the way out after one."""
    while error is not None:
        if isinstance(error, Stopped | KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def yield_all(events: Any, screen: Any) -> Any:
    """Show every event of a generator; its return value."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        screen.show(event)


def _select(
    name: str,
    rule: Any,
    settings: Settings,
    tracking: Tracking,
    device: Any,
    console: Console,
    sure: bool = False,
    as_json: bool = False,
) -> None:
    from kdexp.screen import show_promotion, trials_table
    from kdexp.select.promote import candidates, promote, under
    from kdexp.selection import NothingPasses

    study = tracking.study(name)
    try:
        promotion = promote(study, rule, settings, tracking, device, sure)
    except NothingPasses:
        if trials := under(rule, candidates(study, tracking), study, tracking):
            console.print(trials_table(trials, rule, None))
        _report(study, rule, settings, tracking, console)
        raise
    if as_json:
        _print_json(promotion)
    else:
        show_promotion(console, promotion, settings.tracking_shown)
    _report(study, rule, settings, tracking, console)


def _report(
    study: RunRecord, rule: Any, settings: Settings, tracking: Tracking, console: Console
) -> None:
    """Leave the study's report with its run; say so only where that fails."""
    from kdexp.select.page import kept

    if failure := kept(study, rule, settings, tracking):
        console.print(failure, style="yellow", markup=False)


def _rule(study: str, tracking: Tracking, given: dict[str, Any]) -> Any:
    """The study's own selection rule with what the command line changes in it."""
    from kdexp.config import select_rule
    from kdexp.select.promote import sweep_of

    changed = {
        "accuracy_bar": given["bar"],
        "size": given["size"],
        "limit": given["limit"],
        "confidence": given["confidence"],
        "goal": "most_accurate" if given["most_accurate"] else None,
    }
    rule = sweep_of(tracking.study(study), tracking).selection
    if given["size"] not in (None, rule.size):
        rule = rule.model_copy(update={"limit": None})  # it counts in the former unit
    return select_rule(rule, {key: value for key, value in changed.items() if value is not None})


def _load(file: Path, overrides: list[str] | None) -> Sweep:
    from kdexp.config import load

    config, folder = load(expanded(file), overrides), str(expanded(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # where networks of one's own are looked for, too
    return config


def _with_trials(overrides: list[str] | None, trials: int | None) -> list[str]:
    return [*(overrides or []), *([f"study.trials={trials}"] if trials else [])]


def _settings(
    stores: Path,
    storage: str | None = None,
    tracking_uri: str | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    workers: int | None = 1,
    pack: int | None = 1,
) -> Settings:
    deaf()
    storage, tracking_uri = (expanded_url(url) if url else None for url in (storage, tracking_uri))
    data_dir = expanded(data_dir) if data_dir else None
    return checked(
        Settings(expanded(stores), storage, tracking_uri, data_dir, device, threads, workers, pack)
    )


def _print_json(answer: Any) -> None:
    from kdexp.as_json import text

    print(text(answer))


def _console(aside: bool = False) -> Console:
    """Where a command speaks; `aside` on standard error, where its answer is for a program."""
    from rich.console import Console

    class Heard(Console):
        """Where nobody reads any more (| head), the command ends as if it had been interrupted."""

        def on_broken_pipe(self) -> None:
            _to_nowhere(sys.stdout)
            raise Stopped(
                "Stopped: nobody reads the output any more. Continue with the same command:"
                f" {_again()}"
            )

    return Heard(highlight=False, soft_wrap=True, stderr=aside)


def _again() -> str:
    return shlex.join(["kdexp", *sys.argv[1:]])


def _same_options(command: str) -> str:
    """What followed the command's name."""
    given = [argument for argument in sys.argv[1:] if argument != "--debug"]
    return shlex.join(given[given.index(command) + 1 :]) if command in given else "SWEEP.yaml"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    with suppress(OSError):  # nobody may be there to read it
        # whatever a library put into its message
        print(f"kdexp: {without_credentials(message)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)
    if any(thread.name.startswith("kdexp worker") for thread in threading.enumerate()):
        os._exit(code)  # after a second Ctrl-C: a worker is at something that cannot be broken off
    sys.exit(code)


def _to_nowhere(stream: Any) -> None:
    """From here on, what is printed is not written: Python would try it again at its end, and
    complain.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
