"""An adapter from the Hub, through its cache; and what goes wrong with the Hub, as a part of one sentence.

huggingface_hub is imported when it is needed: who loads from a folder does not pay for it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

from checkpoints.manifest import CARD_FILE, CONFIG_FILE, TENSORS_FILE, AdapterError, one_sentence

REPORT_FILE = "report.json"
FETCHED = [CONFIG_FILE, TENSORS_FILE, CARD_FILE, REPORT_FILE]

_COMMIT = re.compile(r"[0-9a-f]{40}")
ANSWER_S = 10.0
"""A server that says nothing for so long leaves a load to the cache."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def fetch(repo: str, revision: str | None = None) -> Path:
    """The folder of the Hub's cache that holds an adapter, whole and as it was published.

    A commit that is cached is taken as it is.  Of a branch or tag the server says the commit; if no server answers
    (offline mode, no connection, time-out, 429, 5xx) the cached one is taken, with a warning unless HF_HUB_OFFLINE
    asked for it.  What the server refuses is refused, cached or not.

    Raises:
        AdapterError: not to be had, not whole, or not with the content that its hash says.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    silence = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    try:
        if not silence and not _COMMIT.fullmatch(revision or ""):
            try:
                HfApi().model_info(repo, revision=revision, timeout=ANSWER_S)
            except Exception as error:
                if not _unanswered(error):
                    raise
                silence = because(error, repo)
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=FETCHED, local_files_only=bool(silence))
        )
        _check_snapshot(folder, repo)
    except errors.LocalEntryNotFoundError as error:
        part = "only a part" if hasattr(error, "snapshot_path") else "nothing"
        at, reason = f" at {revision}" if revision else "", silence or because(error, repo)
        raise AdapterError(
            f"there is no folder {repo}, and {part} of the Hub's {repo}{at} is cached ({reason}); "
            "load it once with a connection"
        ) from error
    except AdapterError:
        raise
    except Exception as error:  # the client lets through what its HTTP library raises, too
        raise AdapterError(
            f"there is no folder {repo}, and from the Hub it cannot be fetched: {because(error, repo)}"
        ) from error
    if silence and not constants.HF_HUB_OFFLINE:
        warnings.warn(f"the cached {repo} at commit {folder.name} is used: {silence}", stacklevel=2)
    return folder


def _check_snapshot(folder: Path, repo: str) -> None:
    """Both files of an adapter are there, each with the content whose hash the cache stores it under."""
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"the Hub's {repo} at commit {folder.name} is no adapter of this library: no {name}")
        stored = (folder / name).resolve()
        if stored.parent.name == "blobs" and (stored.name not in hashes(stored.read_bytes())):
            raise AdapterError(
                f"{folder / name} does not have the content that the Hub's hash says, so the download is damaged; "
                f"remove it with `hf cache rm model/{repo}` and load it again"
            )


def hashes(content: bytes) -> tuple[str, str]:
    """What the Hub calls a file by: git's hash of a small one, SHA-256 of a large one."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def because(error: BaseException, repo: str) -> str:
    """Why the Hub did not do what was asked of `repo`, and what helps."""
    from huggingface_hub import constants, errors

    found = _root(error)
    if isinstance(found, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(found, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(found, errors.HfHubHTTPError):
        return _answer(found, repo)
    if isinstance(found, json.JSONDecodeError):
        return f"what answers at {constants.ENDPOINT} is no Hub, or one that failed; check HF_ENDPOINT and any proxy"
    transport = _transport()
    if isinstance(found, transport.TimeoutException):
        return f"{constants.ENDPOINT} does not answer in time; try again later"
    if isinstance(found, transport.ConnectError):
        return f"{constants.ENDPOINT} cannot be reached; check the network and HF_ENDPOINT"
    if isinstance(found, transport.TransportError):
        return f"the connection to {constants.ENDPOINT} was lost; try again"
    if "xet-write-token" in str(found):  # the xet client's own error has no other mark
        return f"{constants.ENDPOINT} has no xet storage; leave HF_HUB_DISABLE_XET unset, or set it to 1"
    return one_sentence(str(found).partition("\n")[0])


def _answer(error: Any, repo: str) -> str:
    """What an HTTP error of the Hub means."""
    from huggingface_hub import errors, get_token

    code, said = int(error.response.status_code), one_sentence(error.server_message or "")
    told = f"{code}: {said}" if said else str(code)
    if code == 401:
        return (
            f"the server does not take this token ({told}); {LOG_IN}"
            if get_token()
            else (f"it is not public, or not there, and nobody is logged in ({code}); check the name, or {LOG_IN}")
        )
    if isinstance(error, errors.GatedRepoError):
        return f"its owner grants access one by one ({told}); ask for it on the page of {repo}"
    if code == 403:
        return f"this token has no right to do that in {repo} ({told}); use one that has, or a namespace of your own"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision ({code}); name a commit, tag or branch of {repo}"
    if code == 404:
        return f"there is no {repo}, or not for this token ({told}); check namespace and name"
    if code in (409, 412):
        return f"somebody else changed {repo} meanwhile ({told}); look at it, then repeat"
    if code == 429:
        return f"the server wants to be asked less often ({told}); wait some minutes, then repeat"
    if code >= 500:
        return f"the server failed ({told}); try again later"
    return f"the server refuses it ({told})"


def _unanswered(error: BaseException) -> bool:
    """No connection, no answer in time, or one that says "not now"."""
    from huggingface_hub import errors

    found = _root(error)
    if isinstance(found, errors.HfHubHTTPError):
        return found.response.status_code in (408, 429) or found.response.status_code >= 500
    return isinstance(found, _transport().TransportError | errors.OfflineModeIsEnabled)


def _root(error: BaseException) -> BaseException:
    """The HTTP answer or the broken connection under the client's own wrappers, else the error itself."""
    from huggingface_hub import errors

    kinds = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, _transport().TransportError, json.JSONDecodeError)
    link: BaseException | None = error
    while link is not None and not isinstance(link, kinds):
        link = link.__cause__
    return link or error


def _transport() -> Any:
    """The HTTP library under huggingface_hub: httpx, or its successor since 2.0."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return importlib.import_module(base.__module__.partition(".")[0])
