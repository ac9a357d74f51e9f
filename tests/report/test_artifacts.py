import json

from clipfh.report import artifacts


def test_a_catalogue_that_changed_is_not_the_models(small_catalogue):
    account = artifacts.catalogue_account(small_catalogue)
    assert artifacts.open_catalogue_again(account).path == small_catalogue.path
    assert artifacts.open_catalogue_again({**account, "hash": "another"}) is None
    assert artifacts.open_catalogue_again({**account, "path": "/nowhere"}) is None
    assert artifacts.open_catalogue_again({}) is None


def test_the_evidence_for_a_card_is_the_sweeps_or_the_runs(small_catalogue, tmp_path):
    account = artifacts.catalogue_account(small_catalogue)
    start = {"catalogue": account["path"], "hash": account["hash"], "warm_start": None}
    (tmp_path / "run.json").write_text(json.dumps(start))
    weights, metrics = tmp_path / "checkpoints/checkpoint_1", {"val_mAP": 0.5, "start_val_mAP": 0.2, "step": 3}
    of_run = {"warm_start": None, "catalogue": account, "val_mAP": 0.5, "start_val_mAP": 0.2}
    assert artifacts.read_evidence(weights, metrics) == of_run
    scores = {"test": {"mAP": 0.6}, "zero_shot": {"mAP": 0.4}}
    summary = {"catalogue": account, **scores, "final": {"refit": True}, "trials": 3}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert artifacts.read_evidence(tmp_path / "best", {}) == {"catalogue": account, **scores, "refit": True}
    assert artifacts.read_evidence(tmp_path / "some/other/place/best", {}) == {}
