"""What a file that does not decode as an image is, by its first bytes: a git-lfs pointer, a web page, an archive."""

from __future__ import annotations

LOOK = 256  # bytes that `meaning` looks at

_STARTS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get`"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\0\x05\x16\x07", "a macOS resource file"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video: cut it into frames with `vac extract`"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
)
_SENTENCE = 8  # characters: a shorter text says nothing
_STILLS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF", b"avis": "AVIF"}


def meaning(data: bytes) -> str | None:
    """In a few words, what the bytes of a file are that is not an image we decode; None where they do not show it.

    >>> meaning(b"<!DOCTYPE html><html>...")
    'a web page (HTML), so the download failed'
    """
    start = data[:LOOK]
    if not data:
        return "an empty file"
    if not start.strip(b"\0"):
        return "zero bytes only, as an interrupted copy leaves them"
    for bytes_, words in _STARTS:
        if start.startswith(bytes_):
            return words
    if start[4:8] == b"ftyp":
        still = _STILLS.get(start[8:12])
        return f"an {still} image: convert it" if still else "an MP4 video: cut it into frames with `vac extract`"
    if start[:4] == b"RIFF" and start[8:12] in (b"AVI ", b"WAVE"):
        return "an AVI video: cut it into frames with `vac extract`" if start[8:12] == b"AVI " else "a sound file"
    return _of_text(start)


def _of_text(start: bytes) -> str | None:
    try:
        text = start[: LOOK - 3].decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    plain = text.lstrip().lower()
    if plain.startswith(("<!doctype html", "<html", "<head")):
        return "a web page (HTML), so the download failed"
    if plain.startswith(("<?xml", "<svg")):
        return "an XML or SVG file"
    if plain.startswith(("{", "[")):
        return "a JSON text"
    if len(text) >= _SENTENCE and text.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return f"a text that begins {text.split(chr(10))[0].strip()[:40]!r}"
    return None
