"""The files in cluster/, checked as far as that goes without a cloud: by Ray, by schemas, by linters."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from clipfh.cli import commands as cli_commands
from clipfh.cli import options

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent


def autoscaler(text: str) -> None:
    validate_config(prepare_config(yaml.safe_load(text)))


def kubernetes(text: str) -> None:
    job, *others = yaml.safe_load_all(text)
    jsonschema.validate(job, json.loads((ROOT / "tests" / "rayjob.schema.json").read_text()))
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for each in (*({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod} for pod in pods), *others):
        kubernetes_validate.validate(each, "1.37", strict=True)


def linted(*command: str) -> callable:
    def check(text: str) -> None:
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)

    return check


def script(text: str) -> None:
    linted("bash", "-n")(text)
    linted(f"{BIN}/shellcheck", "--exclude=SC1091", "-")(text)


FILES = {
    "aws.yaml": autoscaler,
    "gcp.yaml": autoscaler,
    "onprem.yaml": autoscaler,
    "kuberay.yaml": kubernetes,
    "slurm.sh": script,
    "env.sh": script,
    "Containerfile": linted(f"{BIN}/hadolint", "-"),
}
UNSOUND = (jsonschema.ValidationError, kubernetes_validate.ValidationError, ValueError, click.exceptions.ClickException)
UNSOUND += (subprocess.CalledProcessError, yaml.YAMLError)


def test_every_file_is_checked():
    assert {path.name for path in CLUSTER.iterdir()} == {*FILES, "README.md"}


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_sound(name):
    FILES[name]((CLUSTER / name).read_text())


@pytest.mark.parametrize(
    "name,right,wrong",
    [
        ("aws.yaml", "file_mounts:", "file_mount:"),
        ("aws.yaml", "head_node_type: head", "head_node_type: haed"),
        ("gcp.yaml", "max_workers: 8", "max_workers: eight"),
        ("gcp.yaml", "setup_commands:", "setup_command:"),
        ("onprem.yaml", "worker_ips:", "worker_ip:"),
        ("kuberay.yaml", "authOptions:", "authOption:"),
        ("kuberay.yaml", "mode: token", "mode: tokens"),
        ("kuberay.yaml", "redisAddress:", "redisAdress:"),
        ("kuberay.yaml", "serviceAccountName: clipfh-worker", "serviceAccount_name: clipfh-worker"),
        ("kuberay.yaml", "mountPath:", "mountpath:"),
        ("kuberay.yaml", "requests: {cpu: 100m", "request: {cpu: 100m"),
        ("slurm.sh", "then resume=", "than resume="),
        ("slurm.sh", '"$catalogue"', '"$catalog"'),
        ("env.sh", "PATH=", "PAHT="),
        ("Containerfile", "COPY clipfh", "COPPY clipfh"),
        ("Containerfile", "FROM python:3.12-slim-trixie", "FROM python"),
    ],
)
def test_a_typo_is_found(name, right, wrong):
    text = (CLUSTER / name).read_text()
    assert right in text
    with pytest.raises(UNSOUND):
        FILES[name](text.replace(right, wrong))


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "onprem.yaml"])
def test_ray_starts_behind_a_token_with_its_dashboard_on_loopback(name):
    config = yaml.safe_load((CLUSTER / name).read_text())
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". ~/clipfh/cluster/env.sh; ray ") and "dashboard-host" not in command
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "onprem.yaml"])
def test_what_the_commands_write_here_is_neither_kept_by_git_nor_copied_to_every_node(name):
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    left_out = {each.lstrip("/") for each in yaml.safe_load((CLUSTER / name).read_text())["rsync_exclude"]}
    assert {"catalogue", "runs", "demo", "out", ".env*", "*.pem", "wandb"} <= left_out
    assert {"catalogue", "runs", "demo", "out"} <= ignored


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_every_node_opens_the_bucket_by_a_role_and_its_driver_is_tried_before_ray_starts(name):
    config = yaml.safe_load((CLUSTER / name).read_text())
    roles = [
        kind["node_config"].get("IamInstanceProfile", {}).get("Name")
        or kind["node_config"]["serviceAccounts"][0]["email"].partition("@")[0]
        for kind in config["available_node_types"].values()
    ]
    assert roles == ["clipfh-head", "clipfh-worker"]
    assert [command for command in config["worker_setup_commands"] if "torch.zeros(1).cuda()" in command]


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_needs_a_shared_disk(name):
    lines = (CLUSTER / name).read_text().splitlines()
    assert not [line for line in lines if "/shared" in line and not line.strip().startswith(("#", "volumeMounts:  "))]


def commands() -> list[str]:
    """The clipfh commands of the README's blocks, each on one line."""
    blocks = re.findall(r"```\n(.*?)```", (CLUSTER / "README.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("clipfh ")]


def test_the_readme_quotes_commands():
    """Else the test below would have nothing to fail on."""
    assert {shlex.split(command)[1] for command in commands()} == {"prepare", "audit", "evaluate", "submit", "status"}


@pytest.mark.parametrize("command", commands())
def test_a_quoted_command_is_one(command):
    args = options.parse(shlex.split(command, comments=True)[1:])
    if args.command == "submit":
        cli_commands.check_submission(args.inner, ROOT)


def test_every_pod_has_shared_memory_for_rays_object_store_within_its_limit():
    cluster = next(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == name]
        size, memory = (
            int(text.removesuffix("Gi")) for text in (shm["sizeLimit"], container["resources"]["limits"]["memory"])
        )
        assert shm["medium"] == "Memory" and 0.3 * memory <= size <= memory / 2, "Ray takes 30% of the memory for it"


def test_the_entrypoint_of_the_kubernetes_job_is_a_command():
    job = next(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))
    program, *words = shlex.split(re.sub(r"\$\(.*\)", "--resume", job["spec"]["entrypoint"]))
    args = options.parse(words)
    assert (program, args.command, args.resume) == ("clipfh", "sweep", True)
    assert (args.catalogue, args.out) == ("s3://CHANGE_ME/catalogue", "s3://CHANGE_ME/sweep")
    assert f"clipfh status {args.out} " in job["spec"]["entrypoint"], "a sweep that is there is resumed"


@pytest.mark.parametrize("resumes", [False, True])
def test_the_slurm_script_runs_a_sweep_or_goes_on_with_it(resumes, tmp_path):
    stubs = {"scontrol": "echo localhost; echo other", "srun": 'printf "%s\\n" "$@"'}
    for name, line in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    if resumes:
        (tmp_path / "sweep.yaml").write_text((ROOT / "sweeps" / "demo.yaml").read_text())
    slurm = {"SUBMIT_DIR": str(ROOT), "JOB_NODELIST": "n[1-2]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "16"}
    env = {f"SLURM_{name}": value for name, value in slurm.items()} | {"HOME": str(tmp_path)}
    ran = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", "joint.yaml", "/shared/catalogue", str(tmp_path), "--trials", "8"],
        env={**env, "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = ran.stdout.splitlines()
    assert words[: words.index("--")][:6] == ["ray", "symmetric-run", "--address", "127.0.0.1:6379", "--min-nodes", "2"]
    args = options.parse(words[words.index("--") + 2 :])
    assert (args.command, args.file, args.trials) == ("sweep", "joint.yaml", 8)
    assert (args.out, args.address, args.resume) == (str(tmp_path), "127.0.0.1:6379", resumes)
