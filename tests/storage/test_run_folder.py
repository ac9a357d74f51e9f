"""A run's folder that goes away and comes back."""

import threading

import pytest

from clipfh import UserError
from clipfh.storage import run_folder as runs


def test_a_folder_that_is_away_is_waited_for_and_never_made(tmp_path, monkeypatch):
    """As a share that is not mounted for a while: what is written meanwhile would hide what comes back."""
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    (run / runs.EXPERIMENT).touch()
    run.rename(away)
    told = []
    back = threading.Timer(1.5, away.rename, (run,))
    back.start()
    runs.History(str(run), 0).write()  # by the run's worker
    runs.wait_for(run / runs.EXPERIMENT, told.append)  # there: nothing to tell
    assert not told and {file.name for file in run.iterdir()} >= {runs.EXPERIMENT, runs.METRICS}
    monkeypatch.setattr(runs, "AWAY", 0)
    run.rename(away)
    with pytest.raises(UserError, match="away.*--resume"):
        runs.wait_for(run / runs.EXPERIMENT, told.append)
    assert told and not run.exists()
