"""Repositories of the Hugging Face Hub, or of what speaks its file API at HF_ENDPOINT."""

from __future__ import annotations

import errno
import glob
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qwenvl_dist.data.storage import StorageError, TransientError
from qwenvl_dist.download.repository import HubFile
from qwenvl_dist.errors import UserError

Result = TypeVar("Result")
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)


class HubRepository:
    """A repository at one commit: what `revision` points to when this is made."""

    source = "hf"

    def __init__(self, name: str, kind: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise UserError(
                "HF_HUB_OFFLINE is set, which forbids every request to the Hub: unset it for a download"
            )
        self.name, self._kind = name, kind
        self._endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self._api = HfApi(endpoint=self._endpoint)
        info = self._ask(lambda: self._api.repo_info(name, repo_type=kind, revision=revision), revision)
        self.commit: str | None = info.sha

    def files(self) -> list[HubFile]:
        """Return all files, with the sha256 of the large ones and the git hash of the small ones."""
        from huggingface_hub.hf_api import RepoFile

        listed = self._ask(
            lambda: list(
                self._api.list_repo_tree(
                    self.name, repo_type=self._kind, revision=self.commit, recursive=True
                )
            )
        )
        return [
            HubFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
            if entry.lfs is not None
            else HubFile(entry.path, entry.size, git_sha1=entry.blob_id)
            for entry in listed
            if isinstance(entry, RepoFile)
        ]

    def fetch(self, names: Sequence[str], folder: Path, connections: int) -> None:
        """Bring files into a folder; half of one, left by a kill, is gone on with."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        self._ask(
            lambda: snapshot_download(
                self.name,
                repo_type=self._kind,
                revision=self.commit,
                local_dir=folder,
                allow_patterns=[glob.escape(name) for name in names],
                max_workers=connections,
                endpoint=self._endpoint,
            )
        )

    def _ask(self, action: Callable[[], Result], revision: str | None = None) -> Result:
        from huggingface_hub import errors

        try:
            return action()
        except errors.LocalEntryNotFoundError as error:  # says only that; what went wrong is its cause
            cause = error.__cause__ or error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if status in (404, 410):
                raise StorageError(f"{self._endpoint} answers {status} for a file that it lists") from None
            if status is not None:
                raise TransientError(f"{self._endpoint} answers {status} for a file") from None
            raise TransientError(f"{self._endpoint}: {_first_line(cause)}") from None
        except errors.GatedRepoError:
            raise UserError(
                f"{self.name}: its owner wants terms accepted: do so on {self._endpoint}, then set HF_TOKEN"
            ) from None
        except errors.RevisionNotFoundError:
            raise UserError(
                f"{self.name}: has no revision {revision!r}; name a branch, a tag or a commit of it"
            ) from None
        except errors.RepositoryNotFoundError:
            raise UserError(
                f"{self.name}: no such {self._kind} on {self._endpoint}, or a private one: check the name, set HF_TOKEN"
            ) from None
        except errors.HFValidationError as error:
            raise UserError(f"{self.name}: {_first_line(error)}") from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise UserError(
                    f"{self.name}: {self._endpoint} answers {status}: set HF_TOKEN to one that may read it"
                ) from None
            raise TransientError(f"{self._endpoint} answers {status}") from None
        except UserError:
            raise
        except OSError as error:
            raise sorted_out(error, self._endpoint) from None
        except Exception as error:  # of the http client, which is not ours to name
            if type(error).__module__.partition(".")[0] not in (
                "httpx",
                "httpx2",
                "httpcore",
                "huggingface_hub",
                "requests",
            ):
                raise
            raise TransientError(f"{self._endpoint}: {_first_line(error)}") from None


def sorted_out(error: OSError, endpoint: str) -> Exception:
    """Return what an OSError of an SDK is: the local disk's fault, or for a while the network's."""
    if isinstance(error, StorageError):
        return error
    if error.errno in DISK_ERRORS or (error.errno is not None and error.filename is not None):
        return UserError(
            f"{error.filename or '--out'}: cannot be written ({error.strerror}); free some room or choose another --out"
        )
    return TransientError(f"{endpoint}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    text: Any = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text or type(error).__name__
