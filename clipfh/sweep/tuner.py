"""Trials of a sweep under Ray Tune: proposed by Optuna, stopped early, watched and ranked."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from ray import cloudpickle, tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from clipfh import UserError
from clipfh.cluster import resources as cluster
from clipfh.config.sweep_file import SWITCH, SweepFile
from clipfh.storage import run_folder, store
from clipfh.sweep.trial import OBJECTIVE, Trial, last_line
from clipfh.train.run_inputs import Inputs

ZERO_SHOT = "0000"
RETRIES = 2
STUDY = "study.journal"

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep; Tune would call it complete


class Searcher(OptunaSearch):
    """OptunaSearch that proposes no more trials than the cluster holds, as it is now, and tells Optuna of ended ones.

    No pruner listens to reports; and after a kill Optuna's journal may be ahead of Tune, which then reports anew.
    """

    def __init__(self, room: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self.room = room
        self.known = dict[str, bool]()
        """ids of the trials that a search to be resumed has, and whether they are over"""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's settings; None while there is no room for it."""
        live = self._ot_trials.keys() - self._completed_trials
        return super().suggest(trial_id) if trial_id in live or len(live) < self.room() else None

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Nothing."""

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Tell Optuna, but of no trial that a kill has made us forget.

        A journal that can't be written ends the sweep: half a line, with the next one behind it, could not be read.
        """
        if trial_id not in self._ot_trials:
            return
        value = (result or {}).get(OBJECTIVE)
        states = optuna.trial.TrialState
        state = states.COMPLETE if value is not None else states.FAIL if error else states.PRUNED
        study: Any = self._ot_study
        study.tell(self._ot_trials[trial_id], value, state=state, skip_if_finished=True)
        self._completed_trials.add(trial_id)

    def restore(self, checkpoint_path: str) -> None:
        """As it was saved, but with Tune's trials, of which it may have been told less or more before a kill.

        Trials that began just before it are lost to Tune, so to the study; their points, if any, come again.
        """
        known = self.known
        super().restore(checkpoint_path)
        self._ot_trials = {i: trial for i, trial in self._ot_trials.items() if i in known}
        self._completed_trials |= {i for i, over in known.items() if over}
        numbers = {trial.number for trial in self._ot_trials.values()}
        study: Any = self._ot_study
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            if trial.number not in numbers:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                if point := trial.system_attrs.get("fixed_params"):
                    study.enqueue_trial(point)


def number_of(trial: Any) -> str:
    """'0001' for the first trial, also after a resume; 0000 is the zero-shot model."""
    return f"{int(trial.experiment_tag.split('_')[0]):04d}"


class Watch(tune.Callback):
    """Keep the leaderboard up to date, tell how it goes, and free what ended trials leave."""

    def __init__(
        self,
        board: Leaderboard,
        tell: Callable[[str], None],
        count: int,
        each_report: bool = True,
        free: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None,
        ask: Callable[[int], None] = lambda left: None,
    ) -> None:
        """`free`: called with the leaderboard's rows when a trial has ended. `ask`: with how many trials are left."""
        self.ask = ask
        self.board, self.tell, self.count, self.each_report, self.free = board, tell, count, each_report, free
        self.ended: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """What Tune keeps with the search: a terminal can't be kept, and a resumed search gets a Watch of its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("tell", "ask")}

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Before anything is written: while the sweep's folder is away, nothing happens."""
        run_folder.wait_for(self.board.file.with_name(run_folder.SWEEP), self.tell)
        self.ask(self.count - sum(trial.is_finished() for trial in trials))

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        shown = ", ".join(
            f"{name} {_short(value)}" for name, value in trial.config.items() if name in self.board.searched
        )
        self.tell(f"trial {number_of(trial)} starts: {shown}")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if "failed" in result:
            self.tell(f"trial {number_of(trial)} can't be trained: {result['failed']}")
        elif self.each_report:
            best = max(result[OBJECTIVE], *((t.last_result or {}).get(OBJECTIVE, 0.0) for t in trials))
            self.tell(
                f"trial {number_of(trial)}: {result['images']:,} images, val mAP {result['val_mAP']:.3f}, "
                f"best so far {max(best, self.board.zero_shot):.3f}"
            )
        for warning in result.get("warnings", []):
            self.tell(f"trial {number_of(trial)}: warning: {warning}")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.tell(f"trial {number_of(trial)} failed and starts again: {_error_of(trial)}")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trials, trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trials, trial)

    def _ended(self, trials: list, trial: Any) -> None:
        cluster.leave(trial.trial_id)
        cluster.end(trial.trial_id)
        self.ended.add(trial.trial_id)
        rows = self.board.write(trials, self.ended)
        row = next(row for row in rows if row["trial"] == number_of(trial))
        self.free(rows)
        self.tell(f"trial {row['trial']} {row['status']} ({len(self.ended)} of {self.count} trials over)")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Leaderboard:
    """`leaderboard.csv`: zero-shot and every trial, best first."""

    file: Path
    searched: list[str]
    zero_shot: float
    """validation mAP"""

    def row(self, trial: Any, over: bool) -> dict[str, Any]:
        """A trial's line. Tune says that a trial is over before it changes the trial's status."""
        last = trial.last_result or {}
        scored = last.get(OBJECTIVE) is not None and "failed" not in last
        found = {"val_mAP": f"{last[OBJECTIVE]:.6f}"} if scored else {}
        return {
            "trial": number_of(trial),
            "status": _status(trial.status, last, over),
            **found,
            "images": last.get("images", 0),
            "seconds": round(last.get("time_total_s", 0.0), 1),
            **{name: trial.config[name] for name in self.searched if name in trial.config},
            "error": _why(trial, last),
        }

    def write(self, trials: Sequence[Any], over: Container[str] = ()) -> list[dict[str, Any]]:
        """Write the file anew and return its rows. `over`: ids of trials that have ended."""
        first = {
            "trial": ZERO_SHOT,
            "status": "zero-shot",
            "val_mAP": f"{self.zero_shot:.6f}",
            "images": 0,
            "seconds": 0,
        }
        rows = [first, *(self.row(trial, trial.trial_id in over) for trial in trials)]
        rows.sort(key=lambda row: float(row.get("val_mAP", -1)), reverse=True)
        text = io.StringIO()
        columns = ["rank", "trial", "status", "val_mAP", "images", "seconds", *self.searched, "error"]
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"rank": i, **row} for i, row in enumerate(rows, 1))
        store.write(self.file, text.getvalue())
        return rows


def _status(tunes: str, last: Mapping[str, Any], over: bool) -> str:
    if tunes == "ERROR" or "failed" in last:
        return "failed"
    if tunes != "TERMINATED" and not over:
        return "running"
    return "diverged" if "diverged" in last else "done" if last.get("finished") else "stopped"


def _why(trial: Any, last: Mapping[str, Any]) -> str:
    for reason in ("diverged", "failed"):
        if reason in last:
            return str(last[reason])
    if trial.status != "ERROR":
        return ""
    return _error_of(trial)


def _error_of(trial: Any) -> str:
    """What a trial failed of."""
    return last_line(str(trial.get_error() or "unknown"))


def saved_every(trials: int) -> int:
    """Seconds between two writings of the search's state, which grows with the trials.

    So much of it may a kill of the driver cost. The runs keep their own.
    """
    return max(1, trials // 50)


def search(
    sweep: SweepFile,
    inputs: Inputs,
    out: Path,
    resources: cluster.Resources,
    watch: Watch,
    resume: bool,
    retry_failed: bool = False,
) -> list[Any]:
    """Run the trials; returns them as Tune has them."""
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(saved_every(sweep.trials))
    trainable = tune.with_resources(
        tune.with_parameters(Trial, sweep=sweep, inputs=inputs, out=str(out), resources=resources),
        {cluster.HEAD: 0.001},
    )
    run_config = tune.RunConfig(
        name="tune",
        storage_path=str(out),
        storage_filesystem=store.local_store(),
        callbacks=[watch],
        verbose=0,
        failure_config=tune.FailureConfig(max_failures=RETRIES),
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep their own
    )
    if resume and list((out / "tune").glob("experiment_state-*.json")):
        tuner = _as_left(sweep, out, trainable, watch, retry_failed)
    else:
        shutil.rmtree(out / "tune", ignore_errors=True)
        (out / STUDY).unlink(missing_ok=True)
        tune_config = tune.TuneConfig(
            search_alg=_searcher(sweep, out, resources),
            scheduler=_scheduler(sweep),
            num_samples=sweep.trials,
            reuse_actors=True,
            trial_name_creator=number_of,
            trial_dirname_creator=number_of,
        )
        tuner = tune.Tuner(trainable, tune_config=tune_config, run_config=run_config)
    return list(tuner.fit()._experiment_analysis.trials)


def _as_left(sweep: SweepFile, out: Path, trainable: Any, watch: Watch, retry_failed: bool) -> tune.Tuner:
    """The search as it was saved, what a kill has left at odds made one."""
    _require_whole(out)
    _cut_to_whole_lines(out / STUDY)
    known = tune.ExperimentAnalysis(str(out / "tune")).trials or []
    _count_anew(out / "tune", known)
    failed = [number_of(trial) for trial in known if trial.status == "ERROR"]
    if failed and not retry_failed:
        watch.tell(f"failed trials stay failed ({', '.join(failed)}): --resume --retry-failed trains them again")
    tuner = tune.Tuner.restore(
        str(out / "tune"),
        trainable,
        resume_unfinished=True,
        resume_errored=retry_failed,
        storage_filesystem=store.local_store(),
    )
    assert tuner._local_tuner is not None
    parts = tuner._local_tuner._tune_config
    assert isinstance(parts.search_alg, Searcher)
    parts.search_alg.known = {trial.trial_id: trial.is_finished() for trial in known}
    # Tune keeps neither of these
    parts.scheduler = _scheduler_as_left(sweep, out, known)
    tuner._local_tuner._run_config.callbacks = [watch]
    return tuner


def _require_whole(out: Path) -> None:
    """Tune would begin anew with a state that it can't read, and say so only in its log."""
    readers: dict[str, Callable[[bytes], Any]] = {
        "experiment_state-*.json": json.loads,
        "search_gen_state-*.json": cloudpickle.loads,  # whatever its name says
        "searcher-state-*.pkl": cloudpickle.loads,
    }
    for pattern, read in readers.items():
        try:
            read(max((out / "tune").glob(pattern)).read_bytes())
        except Exception as error:  # of pickles almost any
            raise UserError(
                f"--resume: {out}/tune/{pattern} can't be read ({error}): start another sweep whose file has "
                f"`earlier: {out}`, which knows what these trials came to"
            ) from error


def _cut_to_whole_lines(journal: Path) -> None:
    """Without half a line that a full disk or a kill left, to which Optuna would add the next."""
    os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def _count_anew(folder: Path, trials: Sequence[Any]) -> None:
    """Let Tune's count of trials be that of those it has: it writes both, and a kill may come in between.

    With a lower count the next trial would get the number of one there is; with a higher one there would be one less.
    """
    file = max(folder.glob("search_gen_state-*.json"))
    state = cloudpickle.loads(file.read_bytes())
    count = max((int(number_of(trial)) for trial in trials), default=0)
    store.write(file, cloudpickle.dumps({**state, "counter": count}))


def _searcher(sweep: SweepFile, out: Path, resources: cluster.Resources) -> Searcher:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of `group`, which conditional settings need
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    storage = _storage(out / STUDY)
    if sweep.earlier:
        _learn_from(sweep, storage)
    points = [
        {k: v for n, value in p.items() for k, v in sweep.search[n].point(n, value).items()} for p in sweep.points
    ]
    return Searcher(
        functools.partial(cluster.at_once, sweep.placement, resources),
        space=functools.partial(_sampled, sweep),
        metric=OBJECTIVE,
        mode="max",
        points_to_evaluate=points,
        sampler=_sampler(sweep),
        study_name=sweep.name,
        storage=storage,
    )


def _storage(journal: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(JournalFileBackend(str(journal)))


def _sampler(sweep: SweepFile) -> optuna.samplers.BaseSampler:
    """A grid is all points, and none are left to draw. TPE keeps off the trials that run: so Optuna 5 does."""
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(multivariate=True, group=True, seed=sweep.seed, n_startup_trials=8)
    return optuna.samplers.RandomSampler(seed=sweep.seed)


def _learn_from(sweep: SweepFile, storage: optuna.storages.BaseStorage) -> None:
    """Copy what another sweep's study knows of the settings searched here.

    Raises:
        UserError: no study there, or it searched other settings or choices.
    """
    journal = Path(sweep.earlier) / STUDY
    if not journal.is_file():
        raise UserError(f"earlier: {sweep.earlier} holds no study: give the --out of a sweep")
    found = _storage(journal)
    name = optuna.get_all_study_names(found)[0]
    known = optuna.load_study(study_name=name, storage=found).get_trials(states=[optuna.trial.TrialState.COMPLETE])
    study = optuna.create_study(storage=storage, study_name=sweep.name, direction="maximize")
    for trial in known:
        for name, drawn_from in trial.distributions.items():
            _check_same(sweep, name.removesuffix(SWITCH), None if name.endswith(SWITCH) else drawn_from)
        study.add_trial(trial)


def _check_same(sweep: SweepFile, name: str, drawn_from: optuna.distributions.BaseDistribution | None) -> None:
    """Whether a setting is searched here as it was there; the ends of a range may differ."""
    found = sweep.search.get(name)
    if found is None:
        raise UserError(f"earlier: {sweep.earlier} searched {name}, which is not searched here: add it")
    here = found.distribution
    choices = isinstance(here, optuna.distributions.CategoricalDistribution)
    if drawn_from and (type(drawn_from) is not type(here) or (choices and drawn_from != here)):
        raise UserError(f"earlier: {sweep.earlier} drew {name} from {drawn_from}, here it is {here}: give the same")


def _sampled(sweep: SweepFile, trial: optuna.Trial) -> dict[str, Any]:
    """Optuna's view of the space, by its define-by-run interface."""
    return sweep.sampled(trial)


def _scheduler(sweep: SweepFile) -> TrialScheduler:
    if not sweep.halving.first_rung:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="images",
        metric=OBJECTIVE,
        mode="max",
        grace_period=sweep.halving.first_rung,
        reduction_factor=sweep.halving.reduction,
        max_t=10**12,  # trials end by their own budget
    )


def _scheduler_as_left(sweep: SweepFile, out: Path, trials: Sequence[Any]) -> TrialScheduler:
    """The scheduler with its rungs as the trials' own metrics have them."""
    scheduler = _scheduler(sweep)
    if isinstance(scheduler, AsyncHyperBandScheduler):
        for trial in trials:
            lines = run_folder.read_metrics(out / "trials" / number_of(trial))
            for milestone, recorded in scheduler._brackets[0]._rungs:
                reached = next((line[OBJECTIVE] for line in lines if line["images"] >= milestone), None)
                if reached is not None:
                    recorded[trial.trial_id] = reached
    return scheduler
