"""The study's page in MLflow while its trials are trained: how far it is, what it has found, how
long it will take.

A thread of its own writes it, at most once a minute. So training never waits for it; where the
server is away the page stays as it was, and the next minute tries again.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from kdexp.config import Sweep
from kdexp.runs import describe
from kdexp.runs.outcome import Outcome
from kdexp.runs.plots import frontier, save
from kdexp.runs.records import LONGEST_NOTE, NOTE, REPEATS, answer_of
from kdexp.runs.tracking import Tracking
from kdexp.search.scheduler import TrialFinished
from kdexp.selection import Candidate, of_one, passes, size_of

__all__ = ["LivePage"]

EVERY = 60.0  # seconds
LAST_SECONDS = 5.0  # that the end of a sweep waits for what is being written
PICTURE = "progress.png"
"""Not the answer's frontier.png: that one is on record with its sum."""
log = logging.getLogger("kdexp")


class LivePage:
    """The description of one study's run, as long as this command is at it."""

    def __init__(
        self,
        sweep: Sweep,
        run_id: str,
        experiment_id: str,
        done: int,
        sure: Iterable[int],
        tracking: Tracking,
    ) -> None:
        """So many trials are `done`, and of those with repeats these are `sure`."""
        self.sweep, self.run_id, self.experiment_id = sweep, run_id, experiment_id
        self.done, self.before, self.sure = done, done, set(sure)
        self.tracking = tracking.aside()
        self.begun = time.monotonic()
        self.due, self.shown = self.begun + EVERY, ""
        self.writer: threading.Thread | None = None
        self.over = False

    def trial_ended(self, event: TrialFinished) -> None:
        """Let the page say so, if it is time. Returns at once."""
        self.done = max(self.done, event.done)
        if event.repeats is not None and event.sureness and event.sureness.state == "sure":
            self.sure.add(event.repeats)
        if time.monotonic() >= self.due and not (self.writer and self.writer.is_alive()):
            self.due = time.monotonic() + EVERY
            self._start(stopped=False)

    def stop(self, finished: bool) -> None:
        """Write no more. A sweep that did not finish says so at last, if the server answers soon;
        of one that did, the answer is written by whoever selects.
        """
        self._wait()
        self.over = True
        if not finished:
            self._start(stopped=True)
            self._wait()

    def _start(self, stopped: bool) -> None:
        self.writer = threading.Thread(target=self._write, args=(stopped,), daemon=True)
        self.writer.start()

    def _wait(self) -> None:
        if self.writer:
            self.writer.join(LAST_SECONDS)

    def _write(self, stopped: bool) -> None:
        try:
            trials = self._first_trainings()
            if trials and not stopped:
                self._draw(trials)
            if stopped or not self.over:
                self._say(trials, stopped)
        except Exception as error:  # a page that is a minute old, or a sweep that ends: the page
            log.debug("the study's page was not written: %s", error)

    def _first_trainings(self) -> list[Candidate]:
        """Every trial that has ended, by whichever command, without repeats."""
        runs = self.tracking.find("trial", {"mlflow.parentRunId": self.run_id}, self.experiment_id)
        return [
            Outcome.recorded(run).candidate(int(run.tags["kdexp.trial"]))
            for run in runs
            if run.status == "FINISHED" and "val_accuracy" in run.metrics
            if REPEATS not in run.tags
        ]

    def _smallest(self, trials: Sequence[Candidate]) -> Candidate | None:
        """That is sure, or where nothing is repeated, over the bar."""
        rule, repeats, sure = of_one(self.sweep), self.sweep.repeats, frozenset(self.sure)
        found = [c for c in trials if (c.trial in sure if repeats else passes(c, rule))]
        return min(found, key=lambda c: (size_of(c, rule.size), c.trial), default=None)

    def _draw(self, trials: Sequence[Candidate]) -> None:
        marked = f"smallest{' sure' if self.sweep.repeats else ''} so far"
        figure = frontier(trials, of_one(self.sweep), self._smallest(trials), marked)
        with tempfile.TemporaryDirectory() as folder:
            save(figure, Path(folder) / PICTURE)
            self.tracking.log_files(self.run_id, Path(folder))
        self.shown = PICTURE

    def _say(self, trials: Sequence[Candidate], stopped: bool) -> None:
        smallest = self._smallest(trials)
        found = describe.Progress(
            done=self.done,
            smallest=size_of(smallest, self.sweep.selection.size) if smallest else None,
            best=max((c.val_accuracy for c in trials), default=None),
            seconds_left=None if stopped else self._seconds_left(),
            at=f"{datetime.now(UTC):%H:%M} UTC",
            stopped=stopped,
        )
        place = self.experiment_id, self.run_id
        before = answer_of(self.tracking.read(self.run_id).tags)  # of fewer trials
        text = describe.under_way(self.sweep, found, *place, self.shown, before)
        self.tracking.tag(self.run_id, {NOTE: text[:LONGEST_NOTE]})

    def _seconds_left(self) -> float | None:
        here, left = self.done - self.before, self.sweep.study.trials - self.done
        return left * (time.monotonic() - self.begun) / here if here > 0 else None
