"""Video files to folders of JPEG frames, in the same tree: <class>/<video>/0001.jpg."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vac_ddp.data.video_reader import QUALITY, SUFFIXES, DamagedVideo, VideoFile, need_av, write_frames
from vac_ddp.errors import UserError
from vac_ddp.files import sweep_folders, whole_folder, write_json
from vac_ddp.schema import read_json

RECORD = ".extract.json"  # what OUT was extracted with
FAULTS = ".faults.txt"  # in a folder of frames: what is wrong with its file


@dataclass(frozen=True, kw_only=True)
class Options:
    """How frames are written; the same for all videos of a folder."""

    rate: float | None = None  # frames per second; None: all frames
    short_side: int | None = None  # pixels; smaller videos keep their size
    quality: int = QUALITY  # of the JPEGs
    audio: bool = False  # write audio.wav as well
    keep_damaged: bool = False  # write the frames that decode of a damaged file, instead of refusing it

    @property
    def record(self) -> dict[str, Any]:
        """What all folders of one OUT have in common; damaged files may be added to it later."""
        return {name: value for name, value in asdict(self).items() if name != "keep_damaged"}


Job = tuple[Path, Path, Path, Options]  # folder of the videos, file in it, folder to write, options


@dataclass(kw_only=True)
class Outcome:
    """What became of one video file."""

    name: str
    frames: int = 0
    problem: str | None = None  # why there is no folder of frames
    faults: list[str] = field(default_factory=list)  # why some frames may be missing


@dataclass(kw_only=True)
class Summary:
    """What became of all of them."""

    extracted: int = 0
    frames: int = 0
    there: int = 0  # folders of an earlier call
    damaged: list[Outcome] = field(default_factory=list)  # without a folder
    faulty: list[Outcome] = field(default_factory=list)  # with the frames that decode, of this call or an earlier one
    other: list[str] = field(default_factory=list)  # files that are no videos by their name


def extract(videos: Path, out: Path, options: Options, *, workers: int = 0, progress: bool = False) -> Summary:
    """Extract every video below `videos` that has no folder in `out` yet.

    A folder appears when all of its frames are on the disk. Raises UserError where there is nothing to extract, two
    files would become one folder, or `out` was extracted with other options.
    """
    need_av()
    found, other, unread = find_videos(videos)
    summary = Summary(other=other, damaged=unread)
    todo = []
    for source, folder in sorted(found.items()):
        if (out / folder).is_dir():
            summary.there += 1
            summary.faulty += _known_faults(source, out / folder)
        else:
            todo.append((videos.parent if videos.is_file() else videos, source, out / folder, options))
    _remember(out, options)
    sweep(out)
    for outcome in _run(todo, workers=workers, progress=progress):
        if outcome.problem is not None:
            summary.damaged.append(outcome)
            continue
        summary.extracted += 1
        summary.frames += outcome.frames
        if outcome.faults:
            summary.faulty.append(outcome)
    sweep(out)  # what a crash left
    summary.damaged.sort(key=lambda outcome: outcome.name)
    summary.faulty.sort(key=lambda outcome: outcome.name)
    return summary


def _known_faults(source: Path, folder: Path) -> list[Outcome]:
    """What an earlier call noted about a file whose folder is there."""
    note = folder / FAULTS
    if not note.exists():
        return []
    frames = len(list(folder.glob("*.jpg")))
    return [Outcome(name=str(source), frames=frames, faults=note.read_text(encoding="utf-8").splitlines())]


def find_videos(videos: Path) -> tuple[dict[Path, Path], list[str], list[Outcome]]:
    """Find video files by their names' endings, links followed.

    Returns the files with the folder of each below OUT, the other files' names, and folders that cannot be read.
    """
    if videos.is_file():
        return {Path(videos.name): Path(videos.stem)}, [], []
    if not videos.is_dir():
        raise UserError(f"{videos}: no such file or folder; give a video file or a folder of them")
    found: dict[Path, Path] = {}
    takes: dict[Path, Path] = {}
    files, other, unread = _walk(videos)
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            other.append(str(path))
            continue
        folder = path.with_suffix("")
        if folder in takes:
            raise UserError(f"{videos}: {takes[folder]} and {path} would become one folder; rename one of them")
        takes[folder] = path
        found[path] = folder
    if not found and not unread:
        raise UserError(f"{videos}: no video files in it (looked for {', '.join(SUFFIXES)})")
    return found, other, unread


def _walk(top: Path) -> tuple[list[Path], list[str], list[Outcome]]:
    """The files below a folder, relative to it, hidden ones left out; links that lead back up; unreadable folders."""
    files: list[Path] = []
    loops: list[str] = []
    unread: list[Outcome] = []

    def enter(folder: Path, above: frozenset[tuple[int, int]]) -> None:
        try:
            status = (top / folder).stat()
            found = sorted(
                (path.name, path.is_dir()) for path in (top / folder).iterdir() if not path.name.startswith(".")
            )
        except OSError as error:
            unread.append(Outcome(name=str(folder), problem=error.strerror or str(error)))
            return
        here = (status.st_dev, status.st_ino)
        if here in above:
            loops.append(f"{folder} (a link to a folder above it)")
            return
        for name, is_folder in found:
            if is_folder:
                enter(folder / name, above | {here})
            else:
                files.append(folder / name)

    enter(Path(), frozenset())
    return files, loops, unread


def _remember(out: Path, options: Options) -> None:
    """Note what `out` is extracted with; one folder never mixes two rates or sizes."""
    record = out / RECORD
    if record.exists():
        before = read_json(record, dict[str, Any], remedy="use another OUT")
        if before != options.record:
            now = _spell(options.record)
            raise UserError(f"{out} was extracted with {_spell(before)}, now it is {now}: use another OUT")
        return
    try:
        write_json(record, options.record)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


def _spell(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def sweep(out: Path) -> list[Path]:
    """Remove what killed processes of this machine left half done below `out`."""
    return [path for root, _, _ in os.walk(out) for path in sweep_folders(Path(root))]


def _run(todo: list[Job], *, workers: int, progress: bool) -> Iterator[Outcome]:
    from tqdm import tqdm

    with tqdm(total=len(todo), desc="extract", unit="video", disable=not progress) as bar:
        for outcome in outcomes(todo, workers=min(workers, len(todo))):
            yield outcome
            bar.update()


def outcomes(todo: list[Job], *, workers: int, work: Callable[..., Outcome] | None = None) -> Iterator[Outcome]:
    """Do `work` (extract_one) for every job in so many processes (0: in this one), in the order in which they end.

    A file on which FFmpeg crashes takes its process along. What was not done then is done one by one, each in a
    process of its own, and the file that crashes again is damaged.
    """
    work = work or extract_one
    if workers < 1:
        yield from (work(*job) for job in todo)
        return
    left = dict(enumerate(todo))
    with contextlib.suppress(BrokenProcessPool):
        for number, outcome in _in_processes(left, workers, work):
            del left[number]
            yield outcome
    for number, job in left.items():
        try:
            yield from (outcome for _, outcome in _in_processes({number: job}, 1, work))
        except BrokenProcessPool:
            yield Outcome(name=str(job[1]), problem="FFmpeg crashes on it")


def _in_processes(jobs: dict[int, Job], workers: int, work: Callable[..., Outcome]) -> Iterator[tuple[int, Outcome]]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(work, *job): number for number, job in jobs.items()}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def extract_one(root: Path, source: Path, folder: Path, options: Options) -> Outcome:
    """Extract the file root/source to `folder`, which appears whole or not at all.

    Whatever is wrong with one file is its outcome. Raises UserError where nothing can be written any more.
    """
    outcome = Outcome(name=str(source))
    try:
        _extract(VideoFile(path=root / source), folder, options, outcome)
    except DamagedVideo as error:
        outcome.problem = str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        outcome.problem = f"cannot be extracted to {folder}: {error.strerror or error}"
    except Exception as error:  # an error of ours or of a library ends this file, not the others
        outcome.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if outcome.problem is not None:
        with contextlib.suppress(OSError):  # a class folder that we made for it
            folder.parent.rmdir()
    return outcome


def _extract(video: VideoFile, folder: Path, options: Options, outcome: Outcome) -> None:
    """Raises DamagedVideo where there are no frames, or faults and damaged files are not to be kept."""
    with whole_folder(folder) as partial:
        frames = write_frames(
            video,
            partial,
            rate=options.rate,
            short_side=options.short_side,
            quality=options.quality,
        )
        if options.audio:
            video.write_sound(partial / "audio.wav")
        if video.faults and not options.keep_damaged:
            rate = "" if options.rate is None else f" at {options.rate:g} a second"
            remedy = f"{frames} frames decode{rate}, --keep-damaged writes them"
            raise DamagedVideo("; ".join([*video.faults, remedy]))
        if video.faults:
            (partial / FAULTS).write_text("\n".join(video.faults), encoding="utf-8")
    outcome.frames, outcome.faults = frames, video.faults
