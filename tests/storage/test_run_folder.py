"""A run's folder that goes away and comes back."""

import threading

import pytest

from clipfh import UserError
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder


def test_a_folder_that_is_away_is_waited_for_and_never_made(tmp_path, monkeypatch):
    """As a share that is not mounted for a while: what is written meanwhile would hide what comes back."""
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    (run / layout.EXPERIMENT).touch()
    run.rename(away)
    told = []
    back = threading.Timer(1.5, away.rename, (run,))
    back.start()
    run_folder.History(str(run), 0).write()  # by the run's worker
    run_folder.wait_for(Folder(run) / layout.EXPERIMENT, told.append)  # there: nothing to tell
    assert not told and {file.name for file in run.iterdir()} >= {layout.EXPERIMENT, layout.REPORTS}
    monkeypatch.setattr(run_folder, "AWAY", 0)
    run.rename(away)
    with pytest.raises(UserError, match="away.*--resume"):
        run_folder.wait_for(Folder(run) / layout.EXPERIMENT, told.append)
    assert told and not run.exists()
