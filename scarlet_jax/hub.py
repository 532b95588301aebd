"""`owner/repo[:QUANT]` where a path is expected: the model is fetched from the Hugging Face hub, once.

The fetching is all huggingface_hub's: the cache, progress bars, resuming after a lost connection, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE. What is added here is which files of a repository are meant, and plain words for
what goes wrong.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from pathlib import Path, PurePosixPath

# The package loads its parts when they are first used. Nothing but a download may make it: half a second.
import huggingface_hub

from scarlet_jax import data
from scarlet_jax.errors import BadInput

# What a bare `owner/repo` means, by preference: the usual compromise, then the best that is there.
DEFAULT_QUANTS = ("Q4_K_M", "Q8_0", "BF16", "F16", "F32")

_REPO = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(:[\w.-]+)?")
_MODEL_FILE = re.compile(r"(?P<name>.+?)(-\d{5}-of-(?P<count>\d{5}))?\.gguf")
_NOT_A_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # vision towers and quantisation statistics
_TIMEOUT_S = 10  # for the list of files; downloads have the library's own


def resolve(model: str | Path | None) -> Path:
    """The file that `model` names: a path, or `owner/repo[:QUANT]` on the hub, downloaded if need be.

    None is the model in the box.

    QUANT is the last part of a file's name ("Q4_K_M", "UD-Q4_K_XL", or all of it), in either case. Of a split
    set every part is downloaded and the first is returned. Raises BadInput if there is no such file, if QUANT
    fits none or several of the repository's models, or if the download fails.
    """
    if model is None:
        return data.model_path()
    path = Path(model)
    if os.path.exists(model):  # unlike Path's, false too for what can be no path at all
        return path
    if not _REPO.fullmatch(str(model)) or path.suffix.lower() == ".gguf":
        raise BadInput(f"{model}: no such file (a model on the hub is called owner/repo or owner/repo:QUANT)")
    repo, _, quant = str(model).partition(":")
    listing = _list(repo)
    parts = [_download(repo, listing.commit, name) for name in _choose(repo, quant, listing.files)]
    return parts[0]


# --- Which files --------------------------------------------------------------------------------------------


def _choose(repo: str, quant: str, files: list[str]) -> list[str]:
    """The files of the one model that is meant, in order."""
    models = _group(files)
    for tag in [quant] if quant else DEFAULT_QUANTS:
        fitting = _fitting(models, tag)
        if len(fitting) > 1:
            raise BadInput(f"{repo}: {tag} fits several models, expected one of {', '.join(sorted(fitting))}")
        if fitting:
            return _complete(repo, models[fitting[0]])
    if not quant and len(models) == 1:
        return _complete(repo, *models.values())
    wanted = quant or " or ".join(DEFAULT_QUANTS)
    there = f"expected one of {_tags(models)}" if models else "nor any other GGUF model"
    raise BadInput(f"{repo}: has no {wanted}, {there}")


def _group(files: list[str]) -> dict[str, list[str]]:
    """Model name (a path without part number and suffix) -> its files in order."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        match = _MODEL_FILE.fullmatch(file)
        if match and not _NOT_A_MODEL.search(PurePosixPath(file).name):
            models.setdefault(match["name"], []).append(file)
    return models


def _fitting(models: dict[str, list[str]], tag: str) -> list[str]:
    """The models whose name is `tag`, else those whose name ends in it."""
    ends_in_tag = re.compile(rf"(?:.*[-._/])?{re.escape(tag)}", re.IGNORECASE)
    fitting = [model for model in models if ends_in_tag.fullmatch(model)]
    named = [model for model in fitting if PurePosixPath(model).name.lower() == tag.lower()]
    return named or fitting


def _complete(repo: str, files: list[str]) -> list[str]:
    match = _MODEL_FILE.fullmatch(files[0])
    count = int(match["count"] or 1) if match else 1
    if len(files) != count:
        raise BadInput(f"{repo}: {files[0]} is one of {count} parts, {len(files)} are there")
    return files


def _tags(models: dict[str, list[str]]) -> str:
    """What to write after the colon for each: the last word of its name, or all of it if words recur."""
    names = [PurePosixPath(model).name for model in models]
    last_words = [re.split(r"[-.]", name)[-1] for name in names]
    return ", ".join(last_words if len(set(last_words)) == len(names) else names)


# --- The hub ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Listing:
    """What a repository holds at one commit: a set of files is never put together from two."""

    commit: str
    files: list[str]


def _list(repo: str) -> _Listing:
    """The hub's list, or where the hub cannot be reached that of the newest copy in the cache."""
    try:
        info = huggingface_hub.HfApi().model_info(repo, timeout=_TIMEOUT_S)
        return _Listing(info.sha or "main", [file.rfilename for file in info.siblings or []])
    except Exception as error:
        if _is_refusal(error):
            raise BadInput(f"{repo}: {_explain(error)}") from error
        if cached := _list_cached(repo):
            return cached
        raise BadInput(f"{repo}: not in the cache, and no list from the hub: {_explain(error)}") from error


def _list_cached(repo: str) -> _Listing | None:
    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.CacheNotFound:
        return None
    copies = [copy for cached in repos if cached.repo_id == repo for copy in cached.revisions]
    if not copies:
        return None
    newest = max(copies, key=lambda copy: copy.last_modified)
    files = [file.file_path.relative_to(newest.snapshot_path).as_posix() for file in newest.files]
    return _Listing(newest.commit_hash, files)


def _download(repo: str, commit: str, name: str) -> Path:
    try:
        with warnings.catch_warnings():
            # The library warns, and then fills the disk; this is the moment to say so.
            warnings.filterwarnings("error", message="Not enough free disk space")
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=commit))
    except Exception as error:
        raise BadInput(f"{repo}: {name}: {_explain(error)}") from error


def _is_refusal(error: Exception) -> bool:
    """Whether the repository is out of reach for good, by the hub's word or by its name, cached or not."""
    from huggingface_hub import errors

    refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403, 404)
    return refused or isinstance(error, errors.HFValidationError)


def _explain(error: Exception) -> str:
    """In one line, what went wrong between the hub and the disk: whatever the library or its parts raise."""
    from huggingface_hub import errors

    token = "HF_TOKEN" if huggingface_hub.get_token() else "HF_TOKEN (not set)"
    if isinstance(error, errors.GatedRepoError):
        return f"access to this repository must be granted on its page first, to the account of {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such file, and no such repository on the hub, unless it is private: then check {token}"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"the hub does not accept {token}"
    if isinstance(error, errors.HfHubHTTPError):
        reason = error.server_message or error.response.reason_phrase
        return f"the hub answers {error.response.status_code} {' '.join(reason.split())}"
    return " ".join(f"{type(error).__name__}: {error}".split())
