"""MLflow's pages of a study: their addresses, and the saved views that kdexp puts there. Pure.

A view is a tag of the experiment, opened by its key: which runs, which columns, which charts. The
format is the UI's own, as MLflow 3.17 and 3.18 read it, and promised by nobody: tests/browser hold
it to what a browser shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from kdexp.config import Size, Sweep

__all__ = [
    "METRIC",
    "REPEATED",
    "TRIALS",
    "VIEW_TAG",
    "WHY",
    "artifact_page",
    "model_page",
    "of_answer",
    "of_sweep",
    "picture",
    "run_page",
    "view_page",
]

TRIALS, WHY, REPEATED = "kdexp", "kdexp-why", "kdexp-repeats"
"""The keys of the views."""
VIEW_TAG = "mlflow.sharedViewState."
TRAINING = "workflowType=machine_learning"
"""Without it a browser that was never there opens MLflow's pages for GenAI, without accuracies."""
METRIC: Mapping[Size, str] = {
    "parameters": "parameters",
    "multiply_adds": "multiply_adds",
    "bytes": "model_bytes",
    "activation_bytes": "activation_bytes",
}
"""The metric that holds a size."""
RUNS = 100  # that a chart shows at most
FOLDED = ("epoch", "int8", "float16", "float32", "Model metrics", "System metrics")
"""Sections that MLflow makes of all other metrics."""


REPORT = "report.html"
"""The artifact of a study's run that says what it came to."""


# --- addresses, to be put behind a server's own ------------------------------------------------


def run_page(experiment_id: str, run_id: str) -> str:
    """A run's page."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{TRAINING}"


def artifact_page(experiment_id: str, run_id: str, place: str) -> str:
    """A run's page, with one of its artifacts open."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(place)}?{TRAINING}"


def view_page(experiment_id: str, key: str = "") -> str:
    """An experiment's runs by the view of that key; without one, as MLflow shows them."""
    shown = f"&viewStateShareKey={key}&compareRunsMode=CHART" if key else ""
    return f"#/experiments/{experiment_id}/runs?{TRAINING}{shown}"


def model_page(name: str) -> str:
    """A registered model's page."""
    return f"#/models/{quote(name, safe='')}?{TRAINING}"


def picture(run_id: str, place: str) -> str:
    """An image among a run's artifacts, for its description."""
    return f"![](get-artifact?path={quote(place)}&run_uuid={run_id})"


# --- views -------------------------------------------------------------------------------------


def of_sweep(sweep: Sweep, now_ms: int) -> dict[str, str]:
    """The views of a study's trials, and of its repeats where it has some, as the experiment's
    tags.
    """
    first, columns = "tags.`kdexp.kind` = 'trial'", _columns(sweep)
    if not sweep.repeats:
        return _tag(TRIALS, "kdexp: trials", _state(first, columns, _charts(sweep)), now_ms)
    once = _state(f"{first} and tags.`kdexp.repeats` IS NULL", columns, _charts(sweep))
    repeated = _state(
        f"{first} and tags.`kdexp.repeats` IS NOT NULL",
        ["tags.`kdexp.repeats`", "tags.`kdexp.repeat`", "params.`data.fold`", *columns],
        [*_scatters(sweep), _curve("epoch/val_accuracy")],
    )
    return _tag(TRIALS, "kdexp: trials", once, now_ms) | _tag(
        REPEATED, "kdexp: repeats of trials", repeated, now_ms
    )


def of_answer(sweep: Sweep, run_ids: Sequence[str], now_ms: int) -> dict[str, str]:
    """The view of some runs side by side, the first as what the others are compared with."""
    these = ", ".join(f"'{run_id}'" for run_id in run_ids)
    charts = [
        {
            "type": "DIFFERENCE",
            "chartName": "What differs",
            "compareGroups": ["Parameters", "Model metrics"],
            "showChangeFromBaseline": True,
            "showDifferencesOnly": True,
            "baselineColumnUuid": run_ids[0] if run_ids else "",
        },
        _curve("epoch/val_accuracy"),
        *_scatters(sweep),
    ]
    found = _state(f"attributes.run_id IN ({these})", _columns(sweep), charts)
    name = "kdexp: defaults, labels only, selected"
    return _tag(WHY, name, found, now_ms)


def _columns(sweep: Sweep) -> list[str]:
    """What the table shows of a trial: the answer first, then what was searched."""
    sizes = dict.fromkeys(["parameters", METRIC[sweep.selection.size]])
    return [
        *(f"metrics.`{name}`" for name in (*sizes, "val_accuracy")),
        "tags.`kdexp.selected_trial`",
        *(f"params.`{path}`" for path in sweep.search),
    ]


def _charts(sweep: Sweep) -> list[dict[str, Any]]:
    size, *others = _scatters(sweep)
    curves = [_curve("epoch/val_accuracy"), _curve("epoch/loss")]
    return [size, *_parallel(sweep), curves[0], *others, curves[1]]


def _scatters(sweep: Sweep) -> list[dict[str, Any]]:
    """Validation accuracy over the size that the rule counts, and over multiply-adds."""
    sizes = dict.fromkeys([METRIC[sweep.selection.size], "multiply_adds"])
    return [
        {
            "type": "SCATTER",
            "xaxis": {"key": size, "type": "METRIC"},
            "yaxis": {"key": "val_accuracy", "type": "METRIC"},
        }
        for size in sizes
    ]


def _parallel(sweep: Sweep) -> list[dict[str, Any]]:
    """What was searched, with what came of it last; nothing where nothing was."""
    chart = {
        "type": "PARALLEL",
        "selectedParams": list(sweep.search),
        "selectedMetrics": [METRIC[sweep.selection.size], "val_accuracy"],
        "showAllRuns": True,
    }
    return [chart] if sweep.search else []


def _curve(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "useGlobalXaxisKey": False,
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
    }


def _state(
    runs: str, columns: Sequence[str], charts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a view consists of: a filter of runs, and how they are shown, smallest first."""
    # one column: beside the runs and MLflow's assistant there is no room for two
    own = {"uuid": "kdexp", "name": "kdexp", "columns": 1, "cardHeight": 400}
    others = [{"uuid": f"kdexp-{name}", "name": name, "display": False} for name in FOLDED]
    return {
        "searchFilter": runs,
        "orderByKey": "metrics.`parameters`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": None,
        "compareRunSections": [
            {"isReordered": True, **section} for section in ({**own, "display": True}, *others)
        ],
        "compareRunCharts": [
            {
                "uuid": f"kdexp-{number}",
                "metricSectionId": "kdexp",
                "deleted": False,
                "isGenerated": False,
                "runsCountToCompare": RUNS,
                **chart,
            }
            for number, chart in enumerate(charts)
        ],
        "isAccordionReordered": True,
    }


def _tag(key: str, name: str, state: Mapping[str, Any], now_ms: int) -> dict[str, str]:
    # the state is text within the text: the UI reads it only once it is opened
    view = {"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": json.dumps(state)}
    return {f"{VIEW_TAG}{key}": json.dumps(view)}
