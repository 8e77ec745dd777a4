"""Where a repository goes: a folder, or a place on the Hugging Face hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart import __version__
from pixart.publishing.folder import is_published

# What the hub takes for an owner and a name; its own client checks the rest.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
DEFAULT_FOLDER = "published"


@dataclass(frozen=True)
class Target:
    """folder: where the files are written. repository: OWNER/NAME on the hub, None for a folder alone."""

    folder: Path
    repository: str | None

    @property
    def name(self) -> str:
        """For people, and for `from_pretrained`; without the folders of whoever publishes."""
        is_near = not self.folder.is_absolute() and ".." not in self.folder.parts
        return self.repository or (str(self.folder) if is_near else self.folder.name)


def find_target(text: str, folder: Path | None) -> Target:
    """OWNER/NAME stands for the hub unless there is a folder OWNER here. ValueError for a folder of
    something else, and for --folder beside a folder."""
    is_repository = bool(_REPOSITORY.fullmatch(text)) and not Path(text).parent.is_dir()
    if not is_repository and folder is not None:
        raise ValueError(
            f"--folder must be left out beside the folder {text}; name OWNER/NAME, which must not begin with "
            "a folder that is here, to publish on the hub"
        )
    own = Path(DEFAULT_FOLDER) / text.rpartition("/")[2] if is_repository else Path(text)
    place = folder or own
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place}: must be a folder or not there yet, got a file")
    if place.is_dir() and any(place.iterdir()) and not is_published(place):
        raise ValueError(
            f"{place}: holds something that was not published from here; name another folder"
        )
    return Target(place, text if is_repository else None)


def check_options(target: Target, *, push: bool, private: bool) -> None:
    """ValueError for options that would do nothing."""
    if target.repository is None and (push or private):
        name = "--push" if push else "--private"
        raise ValueError(
            f"{name} must be given with OWNER/NAME of the hub, got the folder {target.folder}"
        )


def find_token() -> str:
    """The hub's token, of the environment (HF_TOKEN) or a login. ValueError if there is none."""
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ValueError(
            "--push needs a token of the hub that may write; set HF_TOKEN, or log in with `hf auth login`"
        )
    return token


def push(target: Target, token: str, *, private: bool) -> str:
    """Upload the folder, and make the repository if there is none. Returns its address. RuntimeError, on one
    line and without the token, for what the hub refuses; ValueError for --private where it is public."""
    from huggingface_hub import HfApi

    assert target.repository is not None
    api = HfApi(token=token)
    with _told(target.repository, token):
        _make(api, target.repository, private)
        api.upload_folder(
            repo_id=target.repository,
            folder_path=target.folder,
            repo_type="model",
            commit_message=f"Publish with pixart-fast {__version__}",
        )
    return f"https://huggingface.co/{target.repository}"


def _make(api: Any, repository: str, private: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(repository, repo_type="model")
    except RepositoryNotFoundError:
        api.create_repo(repository, repo_type="model", private=private)
        return
    if private and not found.private:
        raise ValueError(
            f"--private must be left out for {repository}, which is there and public; change that on the "
            "hub, or name another repository"
        )


@contextmanager
def _told(repository: str, token: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of several HTTP clients, in several versions
        reason = " ".join(str(error).split()).replace(token, "***") or type(error).__name__
        raise RuntimeError(f"{repository}: the hub did not take it ({reason[:500]})") from None
