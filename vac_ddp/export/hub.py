"""Upload an exported directory to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.errors import UserError, one_line
from vac_ddp.models.foreign import HUB_ID


def check_push(repo: str) -> None:
    """UserError, before any work is done, where `repo` is not a hub id or there is no token."""
    import huggingface_hub

    if not HUB_ID.fullmatch(repo):
        raise UserError(f"--push {repo}: expected USER/NAME, the hub's id of the model")
    if huggingface_hub.get_token() is None:
        raise UserError("--push needs a token of the hub with write access: `hf auth login`, or HF_TOKEN")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload the files of `folder` as one commit; returns its address.

    The repository is made where there is none, private if asked for. Where there is one, files of the same names are
    replaced in a new commit; older commits stay. Raises UserError where the hub refuses or cannot be reached.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export by vac_ddp")
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = one_line(str(error).strip()) or type(error).__name__
        again = f"vac export --check {folder} --push {repo}"
        raise UserError(f"cannot upload to {repo}: {reason}; {folder} is whole: try again by `{again}`") from error
    return str(commit.commit_url)
