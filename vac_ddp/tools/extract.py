"""`vac extract VIDEOS OUT`: video files to folders of JPEG frames, in the same tree: <class>/<video>/0001.jpg."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import simplejpeg

from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.files import PARTIAL, flush_directory, read_json, write_json
from vac_ddp.tools.video import DamagedVideo, read_frames, write_audio

SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
RECORD = ".extract.json"  # what OUT was extracted with
NAMED = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """How frames are written; the same for all videos of a folder."""

    rate: float | None = None  # frames per second; None: all frames
    short_side: int | None = None  # pixels; smaller videos keep their size
    quality: int = 90  # of the JPEGs
    audio: bool = False  # write audio.wav as well


Job = tuple[Path, Path, Path, Options]  # folder of the videos, file in it, folder to write, options


@dataclass(kw_only=True)
class Outcome:
    """What became of one video file."""

    name: str
    frames: int = 0
    problem: str | None = None  # why there is no folder of frames


@dataclass(kw_only=True)
class Summary:
    """What became of all of them."""

    extracted: int = 0
    frames: int = 0
    there: int = 0  # folders of an earlier call
    damaged: list[Outcome] = field(default_factory=list)
    other: list[str] = field(default_factory=list)  # files that are no videos by their name


def main(argv: list[str]) -> int:
    """The command. Returns the exit status: 0, or 3 where files were damaged."""
    parser = argparse.ArgumentParser(
        prog="vac extract",
        description="Cut video files into folders of JPEG frames. Folders that are there are not made again.",
    )
    parser.add_argument("videos", type=Path, help="a video file, or a folder of them, in class folders or not")
    parser.add_argument("out", type=Path, help="where <class>/<video>/0001.jpg go")
    parser.add_argument("--rate", type=float, help="frames per second (default: every frame of the file)")
    parser.add_argument("--short-side", type=int, help="shrink frames whose short side is larger, in pixels")
    parser.add_argument("--quality", type=int, default=Options.quality, help="JPEG quality, 1 to 100 (%(default)s)")
    parser.add_argument("--audio", action="store_true", help="write audio.wav (16 kHz, mono) where there is sound")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; 0: none but this)")
    given = parser.parse_args(argv)
    if given.rate is not None and not given.rate > 0:
        parser.error(f"--rate {given.rate:g}: must be above 0")
    if given.short_side is not None and given.short_side < 1:
        parser.error(f"--short-side {given.short_side}: must be at least 1")
    if not 1 <= given.quality <= 100:
        parser.error(f"--quality {given.quality}: must be 1 to 100")
    options = Options(rate=given.rate, short_side=given.short_side, quality=given.quality, audio=given.audio)
    workers = given.workers if given.workers is not None else len(os.sched_getaffinity(0))
    summary = extract(given.videos, given.out, options, workers=workers, progress=sys.stderr.isatty())
    print(f"extracted {summary.extracted} videos, {summary.frames} frames" + _there(summary.there))
    if summary.other:
        some = ", ".join(summary.other[:5]) + (", ..." if len(summary.other) > 5 else "")
        print(f"{len(summary.other)} files are no videos and were left alone: {some}")
    if summary.damaged:
        print(f"{len(summary.damaged)} files are damaged and were left alone:")
        for outcome in summary.damaged[:NAMED]:
            print(f"  {outcome.name}: {outcome.problem}")
        if len(summary.damaged) > NAMED:
            print(f"  and {len(summary.damaged) - NAMED} more")
    return FINDINGS if summary.damaged else DONE


def _there(count: int) -> str:
    return f"; {count} were there" if count else ""


def extract(videos: Path, out: Path, options: Options, *, workers: int = 0, progress: bool = False) -> Summary:
    """Extract every video below `videos` that has no folder in `out` yet.

    A folder appears when all of its frames are on the disk. Raises UserError where there is nothing to extract, two
    files would become one folder, or `out` was extracted with other options.
    """
    _load_av()
    found, other = find_videos(videos)
    summary = Summary(other=other)
    todo = []
    for source, folder in sorted(found.items()):
        if (out / folder).is_dir():
            summary.there += 1
        else:
            todo.append((videos.parent if videos.is_file() else videos, source, out / folder, options))
    _remember(out, options)
    sweep(out)
    for outcome in _run(todo, workers=workers, progress=progress):
        if outcome.problem is None:
            summary.extracted += 1
            summary.frames += outcome.frames
        else:
            summary.damaged.append(outcome)
    sweep(out)  # what a crash left
    summary.damaged.sort(key=lambda outcome: outcome.name)
    return summary


def find_videos(videos: Path) -> tuple[dict[Path, Path], list[str]]:
    """Video files by their names' endings, with the folder of each below OUT; and the other files' names."""
    if videos.is_file():
        return {Path(videos.name): Path(videos.stem)}, []
    if not videos.is_dir():
        raise UserError(f"{videos}: no such file or folder; give a video file or a folder of them")
    found: dict[Path, Path] = {}
    takes: dict[Path, Path] = {}
    other = []
    for root, folders, files in os.walk(videos):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = (Path(root) / name).relative_to(videos)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in SUFFIXES:
                other.append(str(path))
                continue
            folder = path.with_suffix("")
            if folder in takes:
                raise UserError(f"{videos}: {takes[folder]} and {path} would become one folder; rename one of them")
            takes[folder] = path
            found[path] = folder
    if not found:
        raise UserError(f"{videos}: no video files in it (looked for {', '.join(SUFFIXES)})")
    return found, other


def _load_av() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError(f"vac extract needs PyAV ({error}): pip install av") from error


def _remember(out: Path, options: Options) -> None:
    """Note what `out` is extracted with; one folder never mixes two rates or sizes."""
    record = out / RECORD
    if record.exists():
        before = read_json(record)
        if before != asdict(options):
            now = _spell(asdict(options))
            raise UserError(f"{out} was extracted with {_spell(before)}, now it is {now}: use another OUT")
        return
    try:
        write_json(record, asdict(options))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


def _spell(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{_host()}-{os.getpid()}{PARTIAL}")


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def sweep(out: Path) -> list[Path]:
    """Remove what killed processes of this machine left half done below `out`."""
    swept = []
    for folder in out.rglob(f".*{PARTIAL}"):
        host, _, process = folder.name.removesuffix(PARTIAL).rpartition(".")[2].rpartition("-")
        if folder.is_dir() and host == _host() and process.isdigit() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
            swept.append(folder)
    return swept


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
    """Extract the file root/source to `folder`, which appears whole or not at all."""
    outcome = Outcome(name=str(source))
    partial = _partial(folder)
    try:
        partial.mkdir(parents=True)
        try:
            outcome.frames = _write_frames(root / source, partial, options)
            if options.audio:
                write_audio(root / source, partial / "audio.wav")
            for path in partial.iterdir():
                _flush(path)
            partial.rename(folder)
            flush_directory(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except DamagedVideo as error:
        outcome.problem = str(error)
        with contextlib.suppress(OSError):  # a class folder that we made for it
            folder.parent.rmdir()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return outcome


def _write_frames(source: Path, folder: Path, options: Options) -> int:
    """Write the frames of a file as 0001.jpg, ...; returns their number."""
    count = 0
    for image in read_frames(source, rate=options.rate, short_side=options.short_side):
        count += 1
        data = simplejpeg.encode_jpeg(image, quality=options.quality, colorspace="RGB", colorsubsampling="420")
        (folder / f"{count:04d}.jpg").write_bytes(data)
    return count


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
