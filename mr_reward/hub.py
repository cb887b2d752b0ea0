"""Whether what is named as a model or a data set is there: on this machine, or on a hub that answers.

Asked once, with a short wait, before transformers or datasets are: those ask an unreachable hub for each file, and
again and again for minutes, also about a folder with a slip in its name.
"""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the library that the hub's client asks with: httpx until its version 2, then httpx2
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)

_SECONDS = 5.0  # for the one answer
# Hub ids may end like these, but who writes one means a file.
_FILE_SUFFIXES = {".json", ".jsonl", ".gz", ".parquet", ".csv", ".arrow", ".safetensors", ".bin", ".pt"}
_IS_NONE = {
    "model": "is no folder, and no hub within reach has it",
    "dataset": "is no file, no folder and no hub id within reach",
}
_ADVICE = {
    "model": "give the folder that pretrain_rm.py or save_pretrained wrote, or a hub id",
    "dataset": "give a file, a folder or a hub id",
}
_COMMON_FILES = {"model": "config.json", "dataset": "README.md"}


def why_missing(
    name: str | Path,
    *,
    kind: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> str | None:
    """Why nothing of this name can be read, as the end of a sentence that begins with it; None if something may be.

    `kind` is `model` or `dataset`. For what can only be a path no hub is asked. What is in the cache is enough where
    the hub does not answer, which is said.
    """
    name, path = str(name), Path(name)
    if path.exists():
        return f"is a file, expected a folder; {_ADVICE[kind]}" if kind == "model" and path.is_file() else None
    text = f"{_IS_NONE[kind]}; {_ADVICE[kind]}{near_name(path)}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return text
    if path.suffix in _FILE_SUFFIXES:
        return text
    cached = _is_cached(name, kind, cache_dir)
    if is_offline_mode():
        return None if cached else f"{text}. HF_HUB_OFFLINE is set: only the cache was asked"
    try:
        url = hf_hub_url(name, _COMMON_FILES[kind], repo_type=kind, revision=revision)
        get_hf_file_metadata(url, token=token, timeout=_SECONDS)
    except GatedRepoError:
        return None  # the loading says what to accept
    except RepositoryNotFoundError:
        return text
    except HfHubHTTPError:
        return None  # it is there without this file, or the hub has a trouble that the loading will meet too
    except (HTTPError, OSError) as error:
        if not cached:
            return f"{text}. The hub does not answer ({type(error).__name__}: {error})"
        logger.warning("%s: the hub does not answer (%s); HF_HUB_OFFLINE=1 reads the cache at once", name, error)
    return None


def _is_cached(name: str, kind: str, cache_dir: str | Path | None) -> bool:
    folder = Path(cache_dir or constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}", "snapshots")
    if any(folder.glob("*/*")):
        return True
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    return kind == "dataset" and (prepared / name.replace("/", "___")).is_dir()


def near_name(path: Path) -> str:
    """What stands beside a missing file or folder under nearly the same name, in brackets; or nothing."""
    parent = path.parent
    if not parent.is_dir() or not os.access(parent, os.R_OK):
        return ""
    found = difflib.get_close_matches(path.name, os.listdir(parent), n=1, cutoff=0.5)
    return f" (there is {parent / found[0]})" if found else ""
