"""What a cluster is connected to with."""

import pytest
import ray

from clipfh import UserError
from clipfh.cluster import connect


def test_an_address_of_rays_client_is_refused(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match="ray://head:10001 is that of Ray's client.*HOST:6379.*clipfh submit"):
        connect.connect("ray://head:10001")


@pytest.mark.parametrize(
    "version,is_refused", [("2.60.0", False), ("2.60.3", False), ("2.61.0", True), ("3.60.0", True)]
)
def test_another_minor_version_of_ray_is_refused_in_a_line(monkeypatch, version, is_refused):
    monkeypatch.setattr("ray.__version__", version)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    try:
        connect.connect()
        assert not is_refused
    except UserError as error:
        assert is_refused
        assert str(error) == f'clipfh needs Ray 2.60, here is {version}: pip install "ray>=2.60,<2.61"'


def test_a_cluster_of_our_own_says_so_and_where_its_logs_are(ray_cluster):
    assert connect.is_own() and connect.logs().startswith("/tmp/clipfh-tests/ray/session_")


def test_a_cluster_that_this_process_only_joined_is_not_its_own(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(connect, "_is_own", False)
    monkeypatch.setattr(connect, "_check_reachable", lambda address: None)
    monkeypatch.setattr(ray, "init", lambda address, **options: monkeypatch.setattr("ray.is_initialized", lambda: True))
    connect.connect("head:6379")
    assert not connect.is_own()
