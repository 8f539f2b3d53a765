"""Repositories of ModelScope, through its SDK: the extra `modelscope`."""

from __future__ import annotations

import glob
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qwenvl_dist.data.storage import TransientError
from qwenvl_dist.download.hub import sorted_out
from qwenvl_dist.download.repository import HubFile
from qwenvl_dist.errors import UserError

Result = TypeVar("Result")


class ModelScopeRepository:
    """A repository at a branch or tag. ModelScope names no commit of these: a snapshot is pinned by its hashes."""

    source = "modelscope"
    commit: str | None = None

    def __init__(self, name: str, kind: str, revision: str | None = None) -> None:
        if name.count("/") != 1 or not all(name.split("/")):
            raise UserError(f"{name}: a ModelScope repository is named owner/name")
        self.name, self._kind, self._revision = name, kind, revision
        self._api: Any = sdk_module("modelscope_hub").HubApi()

    def files(self) -> list[HubFile]:
        """Return all files; ModelScope tells the sha256 of each."""
        listed = self._ask(lambda: self._api.list_repo_files(self.name, self._kind, revision=self._revision))
        return [
            HubFile(entry.path, entry.size, sha256=entry.sha256) for entry in listed if entry.type != "tree"
        ]

    def fetch(self, names: Sequence[str], folder: Path, connections: int) -> None:
        """Bring files into a folder."""
        self._ask(
            lambda: self._api.download_repo(
                self.name,
                self._kind,
                revision=self._revision,
                local_dir=folder,
                allow_patterns=[glob.escape(name) for name in names],
                max_workers=connections,
            )
        )

    def _ask(self, action: Callable[[], Result]) -> Result:
        errors = sdk_module("modelscope_hub.errors")
        try:
            return action()
        except errors.NotExistError:
            wanted = f" at {self._revision}" if self._revision else ""
            raise UserError(
                f"{self.name}: no such {self._kind} on ModelScope{wanted}, or a private one: check the name, "
                "set MODELSCOPE_API_TOKEN"
            ) from None
        except (errors.AuthenticationError, errors.PermissionDeniedError):
            raise UserError(
                f"{self.name}: ModelScope wants a token that may read it: set MODELSCOPE_API_TOKEN"
            ) from None
        except errors.InvalidParameter as error:
            raise UserError(f"{self.name}: {_first_line(error)}") from None
        except errors.HubError as error:
            raise TransientError(f"ModelScope: {_first_line(error)}") from None
        except OSError as error:
            raise sorted_out(error, "ModelScope") from None


def sdk_module(name: str) -> Any:
    """Return a module of ModelScope's SDK. `UserError` when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--source modelscope needs ModelScope's SDK ({error}): pip install 'qwenvl-dist[modelscope]'"
        ) from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
