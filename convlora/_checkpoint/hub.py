"""Adapters on the Hugging Face Hub: downloads single files, and uploads all files in one commit.

Only this file uses huggingface_hub, and imports it when it is first needed. Its errors, whose classes change between
releases, are raised as CheckpointErrors that say what was tried and what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

from .._version import __version__
from ..errors import CheckpointError, few, warn
from .card import CARD, is_replaceable
from .manifest import CONFIG, TENSORS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Token = str | bool | None

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LOG_IN = "give token= of an account that has access, or log in once with `hf auth login`"


def local_directory(source: str | os.PathLike[str], revision: str | None, token: Token) -> Path:
    """Return the path of an adapter's files: ``source`` itself, or the cached download of a repository on the hub.

    adapter_model.safetensors is downloaded and, if the repository has it, adapter_config.json of the same commit.
    Files in the cache are not downloaded again, so they also load without a network.

    Args:
        source: a path; or ``user/repo`` on the hub, if no such path exists.
        revision: a branch, tag or commit on the hub.
        token: the hub's token, as huggingface_hub takes it.

    Raises:
        CheckpointError: the path and the repository do not exist, the hub cannot be reached, or it asks for a token.
    """
    path = Path(source)
    if isinstance(source, str) and is_repository(source) and not path.exists():
        return _fetched(source, revision, token)
    if revision is not None:
        raise CheckpointError(
            f"revision={revision!r} is for a repository on the hub, and {path} is a local path. Nothing was changed."
        )
    return path


def is_repository(name: str) -> bool:
    """Return whether this has the form of a repository's name, ``user/repo``."""
    return _REPOSITORY.fullmatch(name) is not None


def _fetched(repo_id: str, revision: str | None, token: Token) -> Path:
    api = _api(f"{repo_id} is not a local path; to look for it on the Hugging Face Hub")
    from huggingface_hub.errors import EntryNotFoundError

    with _fetching(api, repo_id, revision, token):
        tensors = Path(api.hf_hub_download(repo_id, TENSORS, revision=revision, token=token))
        commit = tensors.parent.name  # the cache has a directory for each
        with suppress(EntryNotFoundError):  # convlora's tensors' file needs no configuration
            api.hf_hub_download(repo_id, CONFIG, revision=commit, token=token)
    return tensors.parent


def _api(purpose: str) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as cause:
        raise CheckpointError(
            f"{purpose}, huggingface_hub is needed: pip install 'convlora[hub]'. Nothing was changed."
        ) from cause
    return HfApi(library_name="convlora", library_version=__version__)


@contextmanager
def _fetching(api: HfApi, repo_id: str, revision: str | None, token: Token) -> Iterator[None]:
    from huggingface_hub import errors

    at = f"{repo_id} is not a local path, and on the Hugging Face Hub ({api.endpoint})"

    try:
        yield
    except errors.GatedRepoError as cause:
        _fail(f"{at} it is gated: ask for access on its page, then {_LOG_IN}.", cause)
    except errors.RepositoryNotFoundError as cause:
        _fail(f"{at} there is no such repository, or it is private: check the name, or {_LOG_IN}.", cause)
    except errors.RevisionNotFoundError as cause:
        _fail(f"{at} it has no revision {revision!r}.", cause)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as cause:
        if _status(cause) in (401, 403):
            _fail(f"{at} {_refused(cause)}", cause)
        _fail(
            f"{repo_id} is not a local path and not in the cache, and the Hugging Face Hub ({api.endpoint}) cannot be "
            f"reached ({_reason(cause)}). On a machine with a network, run `hf download {repo_id} {TENSORS} {CONFIG} "
            "--local-dir adapter`, and give convlora.load_adapter that directory.",
            cause,
        )
    except errors.EntryNotFoundError as cause:
        _fail(f"{at} it holds no {TENSORS}{_what_is_there(api, repo_id, revision, token)}.", cause)
    except _network_errors() as cause:
        _fail(f"{at} {_refused(cause)}", cause)


def _fail(message: str, cause: BaseException, end: str = "Nothing was changed.") -> NoReturn:
    raise CheckpointError(f"{message} {end}") from cause


def _refused(cause: BaseException) -> str:
    return f"it cannot be read ({_reason(cause)}). If it is private, {_LOG_IN}."


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return the other classes that huggingface_hub raises: OSError, ValueError, and those of its HTTP client."""
    from huggingface_hub import errors

    families = [cls for cls in errors.HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError"]
    return (OSError, ValueError, *families)


def _status(cause: BaseException | None) -> int | None:
    """Return the HTTP status of the response that caused an error; None if the hub did not answer."""
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
        cause = cause.__cause__
    return None


def _reason(cause: BaseException) -> str:
    """Return the first line of the hub's answer, or else of the first error in the chain."""
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    lines = str(cause).split("\n")
    return next((line.strip().rstrip(".") for line in lines if line.strip()), type(cause).__name__)


def _what_is_there(api: HfApi, repo_id: str, revision: str | None, token: Token) -> str:
    try:
        names = sorted(api.list_repo_files(repo_id, revision=revision, token=token))
    except _network_errors():
        return ""
    return f"; there is {', '.join(few(names, '{} more'))}" if names else "; it is empty"


def send(directory: Path, repo_id: str, *, private: bool | None, token: Token, commit_message: str) -> str:
    """Upload every file of a directory to a repository in one commit; the repository is made if it is missing.

    If the repository's card was edited, or not written by convlora, it is kept, with a warning.

    Args:
        directory: the directory whose files are uploaded.
        repo_id: ``user/repo``.
        private: whether the repository must be private; None for the account's default.
        token: the hub's token, as huggingface_hub takes it.
        commit_message: the message of the commit.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: the hub cannot be reached or refuses; or ``private`` is True and the repository is public.
    """
    api = _api("to push")
    from huggingface_hub import CommitOperationAdd

    with _sending(api, repo_id):
        api.create_repo(repo_id, private=private, token=token, exist_ok=True)
        if private and not api.model_info(repo_id, token=token).private:
            raise CheckpointError(
                f"{repo_id} exists already and is public, which private=True does not change. Make it private in its "
                "settings, or push to another name. Nothing was uploaded."
            )
        files = {file.name: file for file in sorted(directory.iterdir())}
        if not _has_replaceable_card(api, repo_id, token):
            del files[CARD]
            warn(
                f"{CARD} of {repo_id} was edited, or not written by convlora, and is kept: it may not describe this "
                "adapter. Delete it on the hub to get a new one.",
            )
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, token=token)
    return str(commit.commit_url)


def _has_replaceable_card(api: HfApi, repo_id: str, token: Token) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with TemporaryDirectory() as folder:  # not the cache, which may hold an older card
        try:
            return is_replaceable(Path(api.hf_hub_download(repo_id, CARD, local_dir=folder, token=token)))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return True


@contextmanager
def _sending(api: HfApi, repo_id: str) -> Iterator[None]:
    at, fail = f"{repo_id} on the Hugging Face Hub ({api.endpoint})", partial(_fail, end="Nothing was uploaded.")
    try:
        yield
    except CheckpointError:
        raise
    except _network_errors() as cause:
        status = _status(cause)
        if status in (401, 403):
            fail(f"{at} may not be written ({_reason(cause)}): {_LOG_IN}.", cause)
        if status is not None or isinstance(cause, ValueError):
            fail(f"{at} was refused ({_reason(cause)}).", cause)
        fail(
            f"{at} cannot be reached ({_reason(cause)}). Write the adapter with convlora.save_adapter(model, "
            f"directory), and run `hf upload {repo_id} directory` on a machine with a network.",
            cause,
        )
