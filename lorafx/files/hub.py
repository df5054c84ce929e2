"""The Hugging Face Hub: download an adapter's files or a model's, upload a folder; all through `huggingface_hub`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo, errors

from ..errors import CheckpointError, ConfigError

# What an error of huggingface_hub means to the caller; the first class that fits counts.
_MEANINGS: tuple[tuple[type[Exception], str], ...] = (
    (errors.HFValidationError, "that is no id of a repository on the Hub either"),
    (errors.GatedRepoError, "the repository is gated; ask for access on its page, then pass `token` or log in"),
    (errors.RevisionNotFoundError, "the repository has no such revision"),
    (errors.RepositoryNotFoundError, "there is no such repository, or it is private and needs a `token`"),
    (errors.OfflineModeIsEnabled, "the Hub cannot be used, HF_HUB_OFFLINE is set"),
    (errors.LocalEntryNotFoundError, "it is not in the cache, and the Hub is switched off or out of reach"),
    (errors.RemoteEntryNotFoundError, "the repository has no such file"),
)


@dataclass(frozen=True)
class Source:
    """Where an adapter is: a folder on this machine, or the id of a repository on the Hub.

    `subfolder` is a folder in either. The other fields are `huggingface_hub`'s and mean nothing to a local folder.
    """

    place: str
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False

    @classmethod
    def of(cls, place: str | os.PathLike[str], **options: Any) -> Source:
        """The source at a place, with these options.

        Raises `ConfigError` for one that there is not, and for a `subfolder` that is not within the place.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.name != "place"]
        unknown = ", ".join(name for name in options if name not in known)
        if unknown:
            raise ConfigError(f"there is no option {unknown} for loading an adapter; for where, {', '.join(known)}")
        source = cls(os.fspath(place), **options)
        within = source.subfolder
        if within is not None and not (isinstance(within, (str, os.PathLike)) and _stays_inside(os.fspath(within))):
            raise ConfigError(f"subfolder={within!r} is not a folder within {source.place}: give its path from there")
        return source

    def folder(self, *wanted: Sequence[str]) -> Path:
        """The adapter's folder. `wanted` are groups of file names; of each, the first in the repository is fetched.

        All files are of one commit. Raises `CheckpointError`. The files of a local folder are not looked at.
        """
        if Path(self.place).is_dir():
            return Path(self.place) / (self.subfolder or "")
        self.refuse_paths()
        self.refuse_misspelt()
        revision = self.revision
        for names in wanted:
            file = self._first(names, revision)
            revision = file.parents[len(PurePosixPath(self.subfolder or "").parts)].name  # …/snapshots/<commit>/…
        return file.parent

    def refuse_paths(self) -> None:
        """Raise `CheckpointError` for what can only be meant as a path here, and is none of a folder."""
        path = Path(self.place)
        if path.is_file():
            raise CheckpointError(f"{path} is a file; pass its folder, {path.parent}")
        named = self.place.replace(os.sep, "/")
        if path.is_absolute() or named.startswith((".", "~")) or named.endswith("/") or named.count("/") > 1:
            home = "; ~ is not expanded, write the whole path" if named.startswith("~") else ""
            raise CheckpointError(f"{self.place} is no folder here, and no id of a repository on the Hub either{home}")

    def refuse_misspelt(self) -> None:
        """Raise `CheckpointError` if there are folders here that somebody may have meant, and nobody named a revision.

        To ask the Hub for a name that is mistyped may take it many seconds to say no.
        """
        parent, separator, name = self.place.replace(os.sep, "/").rpartition("/")
        if self.revision is not None or not Path(parent or ".").is_dir():
            return
        folders = sorted(each.name for each in Path(parent or ".").iterdir() if each.is_dir())
        near = difflib.get_close_matches(name, folders, cutoff=0.7)
        holds = f"{parent}/ holds {', '.join(folders[:3]) or 'no folder'}"
        there = f"nearest: {parent}{separator}{near[0]}" if near else holds if parent else "an id is owner/name"
        raise CheckpointError(
            f"{self.place} is no folder here; {there}. If a repository on the Hub is meant, give its `revision`, "
            'as "main"'
        )

    def _first(self, names: Sequence[str], revision: str | None) -> Path:
        what = f"{self.place} is no folder here, and of the repository {self._named} {' or '.join(names)} cannot be had"
        with _explained(what):
            missing: list[errors.EntryNotFoundError] = []
            for name in names:
                # If the Hub was out of reach for one name, only the cache is asked for the next.
                offline = any(isinstance(error, errors.LocalEntryNotFoundError) for error in missing)
                try:
                    return self._file(name, revision, self.local_files_only or offline)
                except errors.EntryNotFoundError as error:
                    missing.append(error)
            raise missing[0]

    def _file(self, name: str, revision: str | None, local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                self.place,
                name,
                subfolder=self.subfolder,
                revision=revision,
                token=self.token,
                cache_dir=self.cache_dir,
                force_download=self.force_download,
                local_files_only=local_files_only,
            )
        )

    @property
    def _named(self) -> str:
        at = f", revision {self.revision}" if self.revision else ""
        return f"{self.place}{at}{f', subfolder {self.subfolder}' if self.subfolder else ''}:"


def snapshot(
    repo_id: str, leave_out: Sequence[str], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """A repository's files in the cache, downloaded if need be, but for those of these patterns; `CheckpointError`."""
    Source(repo_id).refuse_paths()
    with _explained(f"{repo_id} is no folder here, and cannot be had from the Hub"):
        found = huggingface_hub.snapshot_download(
            repo_id, revision=revision, token=token, ignore_patterns=list(leave_out)
        )
        return Path(found)


def _stays_inside(subfolder: str) -> bool:
    """Whether a path, by the rules of any system, is relative and never goes up."""
    return all(
        not path(subfolder).anchor and ".." not in path(subfolder).parts for path in (PurePosixPath, PureWindowsPath)
    )


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    keep: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **commit: str | bool | None,
) -> CommitInfo:
    """Put a folder's files into a repository, making it and the branch `revision` if need be; returns the commit.

    Files named in `keep` are not uploaded if the repository has them. Raises `CheckpointError`.
    """
    with _explained(f"{repo_id} cannot be written"):
        repo = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            huggingface_hub.create_branch(repo, branch=revision, token=token, exist_ok=True)
        there = [f for f in keep if huggingface_hub.file_exists(repo, f, revision=revision, token=token)]
        return huggingface_hub.upload_folder(  # type: ignore[call-overload]
            repo_id=repo, folder_path=folder, token=token, revision=revision, ignore_patterns=there, **commit
        )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever goes wrong on the way to the Hub into one `CheckpointError`."""
    try:
        yield
    except Exception as error:  # huggingface_hub's, its HTTP client's, the system's
        meaning = next((meaning for kind, meaning in _MEANINGS if isinstance(error, kind)), None)
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        details = cause or error
        reason = str(details).strip().splitlines() or [type(details).__name__]
        raise CheckpointError(f"{what}: {meaning or type(error).__name__} ({reason[0]})") from error
