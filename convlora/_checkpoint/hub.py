"""Adapters on the Hugging Face Hub: fetched from a repository file by file, and sent to one in one commit.

The only file that knows huggingface_hub, which is imported when it is first needed. Its errors, of many kinds and from
release to release of other families, become one CheckpointError that says what was tried and what to do.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

from .._version import __version__
from ..errors import CheckpointError, few
from .card import CARD, is_replaceable
from .manifest import CONFIG, TENSORS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Token = str | bool | None

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LOG_IN = "give a token= of an account that may, or log in once with `hf auth login`"


def local_directory(source: str | os.PathLike[str], revision: str | None, token: Token) -> Path:
    """Where an adapter's files are: the path itself, or the cache's copy of a repository on the hub.

    Of the repository come adapter_model.safetensors and, where it is there, adapter_config.json, both of one commit.
    What is in the cache already is not downloaded again, and serves without a network.

    Args:
        source: a path; a string of the form ``user/repo`` at which nothing is here means the hub.
        revision: branch, tag or commit on the hub.
        token: as huggingface_hub takes it.

    Raises:
        CheckpointError: neither is there, or the hub cannot be reached, or it asks for a token.
    """
    path = Path(source)
    if isinstance(source, str) and is_repository(source) and not path.exists():
        return _fetched(source, revision, token)
    if revision is not None:
        raise CheckpointError(
            f"revision={revision!r} is for a repository on the hub, and {path} is a path here. Nothing was changed."
        )
    return path


def is_repository(name: str) -> bool:
    """Whether it has the form of a repository's name."""
    return _REPOSITORY.fullmatch(name) is not None


def _fetched(repo_id: str, revision: str | None, token: Token) -> Path:
    api = _api(f"{repo_id} is no path here; to look for it on the Hugging Face Hub")
    from huggingface_hub.errors import EntryNotFoundError

    with _fetching(api, repo_id, revision, token):
        tensors = Path(api.hf_hub_download(repo_id, TENSORS, revision=revision, token=token))
        commit = tensors.parent.name  # the cache has a directory for each
        with suppress(EntryNotFoundError):  # the tensors' file is whole in itself
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

    at = f"{repo_id} is no path here, and on the Hugging Face Hub ({api.endpoint})"

    def fail_to_read(cause: BaseException) -> NoReturn:
        _fail(f"{at} it cannot be read ({_reason(cause)}). If it is private, {_LOG_IN}.", cause)

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
            fail_to_read(cause)
        _fail(
            f"{repo_id} is no path here and not in the cache, and the Hugging Face Hub ({api.endpoint}) cannot be "
            f"reached ({_reason(cause)}). Where there is a network, run `hf download {repo_id} {TENSORS} {CONFIG} "
            "--local-dir adapter`, and give convlora.load_adapter that directory.",
            cause,
        )
    except errors.EntryNotFoundError as cause:
        _fail(f"{at} it holds no {TENSORS}{_what_is_there(api, repo_id, revision, token)}.", cause)
    except _network_errors() as cause:
        fail_to_read(cause)


def _fail(message: str, cause: BaseException) -> NoReturn:
    raise CheckpointError(f"{message} Nothing was changed.") from cause


def _network_errors() -> tuple[type[BaseException], ...]:
    """What else huggingface_hub raises: OSError, ValueError, and the kinds of the HTTP client that it is built on."""
    from huggingface_hub import errors

    families = [cls for cls in errors.HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError"]
    return (OSError, ValueError, *families)


def _status(cause: BaseException | None) -> int | None:
    """The HTTP status that is behind an error, if the hub answered at all."""
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
        cause = cause.__cause__
    return None


def _reason(cause: BaseException) -> str:
    """The first line of what the hub answered, or else of the error at the bottom."""
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
    """Send every file of a directory to a repository, which is made where missing, in one commit.

    A card there that convlora did not write, or that was edited since, is left as it is, with a warning that names
    the caller's caller's line.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: the hub cannot be reached or refuses; or the repository is public where ``private`` is True.
    """
    api = _api("to push")
    from huggingface_hub import CommitOperationAdd

    with _sending(api, repo_id):
        api.create_repo(repo_id, private=private, token=token, exist_ok=True)
        if private and not api.model_info(repo_id, token=token).private:
            raise CheckpointError(
                f"{repo_id} is there already and public, which private=True does not change. Make it private in its "
                "settings, or push to another name. Nothing was uploaded."
            )
        files = {file.name: file for file in sorted(directory.iterdir())}
        if not _has_replaceable_card(api, repo_id, token):
            del files[CARD]
            warnings.warn(
                f"{CARD} of {repo_id} was edited, or not written by convlora, and is left as it is: it may not "
                "describe this adapter. Delete it there to have a new one.",
                stacklevel=3,
            )
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, token=token)
    return str(commit.commit_url)


def _has_replaceable_card(api: HfApi, repo_id: str, token: Token) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with TemporaryDirectory() as folder:  # not the cache, which could answer with an older one
        try:
            return is_replaceable(Path(api.hf_hub_download(repo_id, CARD, local_dir=folder, token=token)))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return True


@contextmanager
def _sending(api: HfApi, repo_id: str) -> Iterator[None]:
    at = f"{repo_id} on the Hugging Face Hub ({api.endpoint})"

    def fail(message: str, cause: BaseException) -> NoReturn:
        raise CheckpointError(f"{message} Nothing was uploaded.") from cause

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
            f"directory), and run `hf upload {repo_id} directory` where there is a network.",
            cause,
        )
