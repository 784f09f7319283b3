"""Weights & Biases and TensorBoard: started where they can be had, within seconds, and a reason where they cannot."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from vac_ddp.settings import LogSettings

PROBE_S = 4.0  # for an answer of the service, whatever it says
INIT_S = 6.0  # for W&B itself, once something answered
FINISH_S = 120.0  # for the upload of what is left at the end; the files stay on the disk


class Unavailable(Exception):
    """Why a service cannot be used, in one line for people."""


def answers(url: str, seconds: float = PROBE_S, *, data: bytes | None = None) -> bool:
    """Whether anything at `url` answers (to a POST of `data`), by the environment's proxies, within `seconds`.

    In a thread: looking up a name has no time limit of its own.
    """
    good: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, data, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLCertVerificationError):  # it may be known to W&B
                return
        except (OSError, ValueError):
            return
        good.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(good)


def start_wandb(settings: LogSettings, folder: Path, config: dict[str, Any], name: str, run_id: str | None) -> Any:
    """A W&B run (under the id of a resumed one) that keeps its files in `folder`. Raises Unavailable, within seconds.

    W&B prints nothing and asks nothing; its key comes from where `wandb login` left it or from $WANDB_API_KEY.
    """
    try:
        import wandb
    except ImportError:
        raise Unavailable("it is not installed (pip install wandb)") from None
    try:
        if settings.wandb == "online":
            host = wandb.setup().settings.base_url
            if not answers(f"{host.rstrip('/')}/graphql", data=b"{}"):  # what W&B talks to; any answer will do
                raise Unavailable(f"{host} does not answer")
            if not wandb.login(prompt=False):
                raise Unavailable("it has no key here (wandb login, or WANDB_API_KEY)")
        run = wandb.init(
            project=settings.wandb_project,
            name=name,
            id=run_id,
            resume="allow",
            config=config,
            allow_val_change=True,
            dir=str(folder),
            mode=settings.wandb,
            settings=wandb.Settings(
                init_timeout=INIT_S, finish_timeout=FINISH_S, console="off", silent=True, disable_git=True
            ),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        run.define_metric("epoch/val_top1", step_metric="step", summary="max")
    except Unavailable:
        raise
    except Exception as error:  # whatever it is, training does not end for it
        raise Unavailable(" ".join(str(error).split())[:120] or type(error).__name__) from error
    return run


def where_to_look(run: Any, settings: LogSettings) -> str:
    """Where the figures of a W&B run are."""
    if settings.wandb == "online":
        return str(run.url)
    return f"offline, run {run.id}; to upload: wandb sync {Path(run.dir).parent}"


def start_board(folder: Path, step: int) -> Any:
    """A TensorBoard writer; figures of an earlier run behind `step` are hidden. Raises Unavailable."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Unavailable("it is not installed (pip install tensorboard)") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
