"""Jobs: what is told before anything is sent, and how a log is followed. tests/test_clusters.py has real ones."""

import zipfile

import pytest
from ray._private.runtime_env import packaging
from ray.job_submission import JobDetails, JobStatus, JobType

from clipfh import UserError
from clipfh.cli import main
from clipfh.cluster import jobs

NOBODY = "http://127.0.0.1:1"


def refused(capsys, *words):
    assert main.main(["submit", *map(str, words)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("clipfh: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "submit needs a command"),
        (["swep"], "did you mean sweep?"),
        (["sweep", "s.yaml", "/c", "--out", "/o", "--trial", "3"], "did you mean --trials?"),
        (["sweep", "s.yaml", "/c", "--out", "/o", "--optimizer.lr", "x"], "optimizer.lr must be a number"),
        (["sweep", "s.yaml", "/c", "--out", "/o"], "unknown key serch, did you mean search?"),
        (["sweep", "none.yaml", "/c", "--out", "/o"], "no such sweep file"),
        (["sweep", "s.yaml", "/c", "--out", "o"], "o: a job runs in a folder of its own"),
        (["report", "/a", "b"], "b: a job runs in a folder of its own"),
        (["submit", "--address", NOBODY, "--", "status", "/o"], "for this machine, not for a job"),
        (["status", "/o"], "no Ray dashboard answers at --address http://127.0.0.1:1"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_sent(words, message, capsys, tmp_path):
    (tmp_path / "s.yaml").write_text("serch: {}\n")
    assert message in refused(capsys, "--address", NOBODY, "--working-dir", tmp_path, "--", *words)


def test_what_is_wrong_with_where_to_send_it(capsys, tmp_path):
    assert "give the dashboard's" in refused(capsys, "--address", "head:6379", "--", "status", "/o")
    words = ["--address", NOBODY, "--working-dir", tmp_path / "none", "--", "status", "/o"]
    assert "no such folder" in refused(capsys, *words)


class Client:
    """A cluster that tells a job's log in pieces. A piece may be an error: of the connection, or the user's Ctrl-C."""

    def __init__(self, *connections, status=JobStatus.SUCCEEDED, code=0):
        self.connections, self.status, self.code = list(connections), status, code

    async def tail_job_logs(self, job):
        for piece in self.connections.pop(0):
            if not isinstance(piece, str):
                raise piece
            yield piece

    def get_job_info(self, job):
        status = JobStatus.RUNNING if self.connections else self.status
        return JobDetails(
            type=JobType.SUBMISSION, entrypoint="", status=status, message="stopped by hand", driver_exit_code=self.code
        )

    def submit_job(self, entrypoint, runtime_env):
        self.sent, self.environment = entrypoint, runtime_env
        return "job-1"


def test_a_broken_connection_is_taken_up_where_it_was(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    client = Client(["one\ntw", RuntimeError("gone")], ["one\n", "two\n"], ["one\ntwo\nthree\n"], code=2)
    assert jobs.follow(client, "job-1", NOBODY) == 2
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_is_given_up(monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(UserError, match="no longer answers .gone."):
        jobs.follow(Client(*[[RuntimeError("gone")]] * 100), "job-1", NOBODY)


def test_a_job_that_was_stopped_has_no_exit_code(capsys):
    assert jobs.follow(Client(["one\n"], status=JobStatus.STOPPED, code=None), "job-1", NOBODY) == 1
    assert "job-1 stopped: stopped by hand" in capsys.readouterr().out


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    client = Client(["one\n", KeyboardInterrupt()])
    monkeypatch.setattr(jobs, "connect", lambda address: client)
    assert jobs.run(NOBODY, tmp_path, ["sweep", "a b.yaml"]) == 130
    assert client.sent == "python -m clipfh sweep 'a b.yaml'"
    told = capsys.readouterr().out
    assert f"ray job logs --address {NOBODY} --follow job-1" in told
    assert f"ray job stop --address {NOBODY} job-1" in told


def test_secrets_and_what_commands_wrote_stay_here(capsys, monkeypatch, tmp_path):
    secret = [
        ".env",
        ".env.local",
        "keys/server.pem",
        "id.key",
        ".netrc",
        ".aws/credentials",
        ".ssh/id_rsa",
        "id_ed25519",
    ]
    written = [
        "wandb/run",
        "mlruns/0/meta.yaml",
        "mlflow.db",
        "runs/sweep/report.html",
        "catalogue/catalogue.json",
        "demo/x",
    ]
    sent = ["sweep.yaml", "clipfh/catalogue.py", "clipfh/runs.py", "docs/monkey.md", "sweeps/runs/a.yaml"]
    for name in [*secret, *written, *sent]:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).touch()
    client = Client(["one\n"], code=0)
    monkeypatch.setattr(jobs, "connect", lambda address: client)
    jobs.run(NOBODY, tmp_path / "folder", ["status", "/o"])
    excludes = client.environment["excludes"]
    packed = tmp_path / "packed.zip"
    packaging.create_package(str(tmp_path / "folder"), packed, include_gitignore=True, excludes=excludes)
    assert sorted(name for name in zipfile.ZipFile(packed).namelist() if not name.endswith("/")) == sorted(sent)
    told = capsys.readouterr().out
    assert str(tmp_path / "folder") in told and ".env*" in told and "/runs/" in told
