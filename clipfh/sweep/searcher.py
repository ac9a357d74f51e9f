"""The memory of a search: an Optuna study, kept in a journal, from which Ray Tune gets its trials.

The study and the run folders are all that a resumed sweep knows. The n-th trial that a sweep has of its own in the
study trains in the folder of that number, '0001' for the first. Trials copied from an earlier sweep have no folder.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from clipfh import UserError
from clipfh.config.search_range import SWITCH
from clipfh.config.sweep_file import MODEL, SweepFile
from clipfh.storage.layout import STUDY
from clipfh.storage.store import Folder
from clipfh.sweep.trial import OBJECTIVE

ROW = "leaderboard"
"""User attribute of a trial that is over: its line of the leaderboard."""

REPEATED = "repeated"
"""User attribute of a draw that repeats settings of another trial: it was not trained, and has no number."""

EARLIER = "earlier"
"""User attribute of a trial copied from an earlier sweep: that sweep's folder."""


def open_study(
    sweep: SweepFile,
    out: str | Path | Folder,
    retry_failed: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> optuna.Study:
    """Open the study of the sweep in `out`, or make it.

    The journal of a resumed sweep is written anew, without half a line that a kill or a full disk left at its end. A
    trial that is over stays as it is. All others wait, in order of their numbers, with the settings that they had:
    trials that ran when the sweep was killed, points that had not begun, and with `retry_failed` failed trials.

    Raises:
        UserError: the study is of an older version, or `earlier` does not fit.
    """
    out = Folder(out)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of `group`, which conditional settings need
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(storage=_storage(Folder(folder)), study_name=sweep.name, direction="maximize")
        if out.exists(STUDY):
            for trial in load_study(out).trials:
                _add_again(study, trial, out, retry_failed)
        else:
            study.add_trials(earlier_trials(sweep, log))
            for point in sweep.points:
                study.enqueue_trial(_parameters(sweep, point))
        out.write(STUDY, (Path(folder) / STUDY).read_bytes())
    return load_study(out)


def _add_again(study: optuna.Study, trial: FrozenTrial, out: Folder, retry_failed: bool) -> None:
    """Copy a trial: as it is if it is over, else as a waiting one with the same settings."""
    if trial.state.is_finished() and not trial.user_attrs.keys() & {ROW, EARLIER, REPEATED}:
        raise UserError(
            f"--resume: {out} was begun by an older version, which kept its trials elsewhere: start another sweep "
            f"whose file has `earlier: {out}`, which knows what these trials came to"
        )
    is_again = retry_failed and trial.user_attrs.get(ROW, {}).get("status") == "failed"
    if trial.state.is_finished() and not is_again:
        study.add_trial(trial)
    elif REPEATED in trial.user_attrs:  # killed just before the study was told that it is over
        trial.state, trial.datetime_complete = TrialState.FAIL, trial.datetime_start
        study.add_trial(trial)
    else:
        study.enqueue_trial({**trial.system_attrs.get("fixed_params", {}), **trial.params})


def own_trials(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The sweep's own trials, also waiting ones, by number ('0001' for the first)."""
    own = [trial for trial in study.get_trials(deepcopy=False) if not {EARLIER, REPEATED} & trial.user_attrs.keys()]
    return {f"{number:04d}": trial for number, trial in enumerate(own, 1)}


def ask(study: optuna.Study, sweep: SweepFile) -> optuna.Trial:
    """The next trial of a study: the first that waits, else a new one.

    A draw depends on the sweep's seed, the trial's place in the study, and the results in the study by then. So a
    resumed search draws what an unbroken one would, and repeats nothing.
    """
    trials = study.get_trials(deepcopy=False)
    place = next((trial.number for trial in trials if trial.state == TrialState.WAITING), len(trials))
    study.sampler = _sampler(sweep, place)
    return study.ask()


DRAWS = 20
"""Draws of tried settings after which an untried point of a small space is taken."""


def propose(study: optuna.Study, sweep: SweepFile) -> tuple[optuna.Trial, dict[str, Any]]:
    """The next trial and its settings. Settings of another trial of the sweep are not drawn again.

    Where every point of the space was tried, any point is proposed.
    """
    own = [trial for trial in own_trials(study).values() if trial.state != TrialState.WAITING]
    attempts = [sweep.suggest(trial) for trial in own if trial.state != TrialState.FAIL or ROW in trial.user_attrs]
    for _ in range(DRAWS):
        is_waiting = any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        trial = ask(study, sweep)
        settings = sweep.suggest(trial)
        if is_waiting or settings not in attempts:
            return trial, settings
        trial.set_user_attr(REPEATED, True)
        study.tell(trial, state=TrialState.FAIL)
    if untried := [point for point in sweep.space() if point not in attempts]:
        study.enqueue_trial(_parameters(sweep, untried[0]))
    trial = ask(study, sweep)
    return trial, sweep.suggest(trial)


def _parameters(sweep: SweepFile, point: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters of a point."""
    return {key: value for name, each in point.items() for key, value in sweep.search[name].point(name, each).items()}


def _sampler(sweep: SweepFile, place: int) -> optuna.samplers.BaseSampler:
    """The sampler of the trial at that place in the study. A grid enqueues all its points, and draws none."""
    seed = int(np.random.SeedSequence([sweep.seed, place]).generate_state(1)[0])
    if sweep.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar keeps trials that run at once apart
    how: dict[str, Any] = {"multivariate": True, "group": True, "n_startup_trials": 8, "constant_liar": True}
    return optuna.samplers.TPESampler(seed=seed, **how)


class StudySearcher(Searcher):
    """Gives Tune the trials of a study, as many at a time as there is room for.

    Tune's config of a trial is {"number": "0001", "settings": {...}}.
    """

    def __init__(self, sweep: SweepFile, study: optuna.Study, room: Callable[[], int]) -> None:
        """`room`: how many trials the cluster holds now."""
        super().__init__(metric=OBJECTIVE, mode="max")
        self.sweep, self.study, self.room = sweep, study, room
        self.trials: dict[str, optuna.Trial] = {}
        """Tune's id of a trial that runs to the study's trial"""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial; None while there is no room for it."""
        if len(self.trials) >= self.room():
            return None
        trial, settings = propose(self.study, self.sweep)
        self.trials[trial_id] = trial
        number = next(name for name, each in own_trials(self.study).items() if each.number == trial.number)
        return {"number": number, "settings": settings}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Do nothing: `finish` tells the study, called by a callback that knows what a trial failed of."""

    def finish(self, trial_id: str, row: Mapping[str, Any], value: float | None) -> None:
        """Tell the study that a trial is over, with its row of the leaderboard.

        The value is for the sampler; None where the trial crashed, which says nothing about its settings.
        """
        trial = self.trials.pop(trial_id)
        trial.set_user_attr(ROW, dict(row))
        self.study.tell(trial, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)


class _WholeJournal(BaseJournalBackend):
    """A study's journal as one object in a bucket, which is written anew with each entry. It has one writer.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self.logs = folder, folder.read_lines(STUDY)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self.logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs += logs
        self.folder.write(STUDY, "".join(f"{json.dumps(each, separators=(',', ':'))}\n" for each in self.logs))


def _storage(sweep: Folder) -> optuna.storages.JournalStorage:
    """A sweep's study, on a disk as Optuna's own tools open it."""
    backend = JournalFileBackend(str(sweep.local_path(STUDY))) if sweep.is_local else _WholeJournal(sweep)
    return optuna.storages.JournalStorage(backend)


def load_study(sweep: Folder) -> optuna.Study:
    """The study of a sweep that has one.

    Raises:
        UserError: it can't be read.
    """
    try:
        return optuna.load_study(study_name=None, storage=_storage(sweep))
    except (ValueError, KeyError) as error:
        raise UserError(f"{sweep}/{STUDY} can't be read ({error}): start another sweep") from error


def earlier_trials(sweep: SweepFile, log: Callable[[str], None] = lambda line: None) -> list[FrozenTrial]:
    """Trials of the sweep that `earlier` names, except trials of models that are not searched here.

    Raises:
        UserError: it has no study, or searched other settings or choices.
    """
    if not sweep.earlier:
        return []
    earlier = Folder(sweep.earlier)
    if not earlier.is_file(STUDY):
        raise UserError(f"earlier: {sweep.earlier} holds no study: give the --out of a sweep")
    trials = load_study(earlier).get_trials(states=[TrialState.COMPLETE])
    for trial in trials:
        for name, drawn_from in trial.distributions.items():
            _check_same(sweep, name.removesuffix(SWITCH), None if name.endswith(SWITCH) else drawn_from)
        trial.user_attrs = {EARLIER: sweep.earlier}
    if MODEL not in sweep.search:
        return trials
    models = sweep.search[MODEL]
    fitting = [trial for trial in trials if trial.params.get(MODEL, models.values[0]) in models.values]
    for trial in fitting:
        if MODEL in trial.params:
            trial.distributions = {**trial.distributions, MODEL: models.distribution}
    if num_dropped := len(trials) - len(fitting):
        log(f"note: {num_dropped} of {len(trials)} trials of {sweep.earlier} are of models that are not searched here")
    return fitting


def _check_same(sweep: SweepFile, name: str, drawn_from: optuna.distributions.BaseDistribution | None) -> None:
    """Refuse a setting that the earlier sweep searched otherwise; only the ends of a range may differ."""
    search_range = sweep.search.get(name)
    if search_range is None:
        raise UserError(f"earlier: {sweep.earlier} searched {name}, which is not searched here: add it")
    if name == MODEL:
        return
    here = search_range.distribution
    is_choice = isinstance(here, optuna.distributions.CategoricalDistribution)
    if drawn_from and (type(drawn_from) is not type(here) or (is_choice and drawn_from != here)):
        raise UserError(f"earlier: {sweep.earlier} drew {name} from {drawn_from}, here it is {here}: give the same")
