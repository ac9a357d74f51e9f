"""Models of the Hugging Face hub: their files in its cache, downloaded where they are not there yet."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipfh import UserError
from clipfh.storage import layout

PREFIX = "hf-hub:"
"""Begins the name of a model of the hub, as open_clip writes it: hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"""


def download(name: str, with_weights: bool) -> Path:
    """The folder in the hub's cache that has a repository's `open_clip_config.json` and, where asked, its weights.

    Args:
        name: hf-hub:ORG/NAME, with @REVISION (branch, tag or commit) for another than the newest.
        with_weights: download the weights too.

    Raises:
        UserError: the hub has no such repository or revision, it is not made for open_clip, or the hub can't be
            reached and the cache does not have it.
    """
    from huggingface_hub import errors, hf_hub_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    use_cache_without_network()
    try:
        with plain_errors():
            config = Path(hf_hub_download(repository, layout.OPEN_CLIP_CONFIG, revision=revision or None))
            if with_weights:
                from open_clip.pretrained import download_pretrained_from_hf

                download_pretrained_from_hf(repository, revision=config.parent.name)  # of the commit of the config
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"--model.name {name}: the hub can't be reached, and its cache does not have the model: check the network, "
            "HTTPS_PROXY or HF_ENDPOINT, or take a download by local-dir:FOLDER"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"--model.name {name}: the repository has no {layout.OPEN_CLIP_CONFIG}, so it is not made for open_clip: "
            "take one that is"
        ) from error
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors, those of names ValueErrors
        raise UserError(
            f"--model.name {name}: can't be had from the hub ({' '.join(str(error).split())[:160]}): check name and "
            "revision; a private or gated one needs HF_TOKEN"
        ) from error
    return config.parent


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the HTTP library's errors, of a network or a proxy that refuses, into a ConnectionError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # of whichever library it takes
        if isinstance(error, OSError):  # an answer of the hub
            raise
        raise ConnectionError(str(error)) from error


def use_cache_without_network() -> None:
    """Where the hub does not answer, use what was downloaded before: the hub's client would retry for a minute."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT)
    if _goes_by_proxy(host.scheme, host.hostname or ""):
        return
    try:
        port = host.port or (80 if host.scheme == "http" else 443)
        socket.create_connection((host.hostname or "", port), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _goes_by_proxy(scheme: str, host: str) -> bool:
    """Whether the environment has a proxy for the host, which then need not be reached directly."""
    return bool({scheme, "all"} & set(urllib.request.getproxies())) and not urllib.request.proxy_bypass(host)
