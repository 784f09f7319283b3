"""report.html: whole in itself, names are text, pictures decode, and its figures are those of the files."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vac_ddp import config as settings_io
from vac_ddp.commands import report_command
from vac_ddp.errors import UserError
from vac_ddp.report.page import audit_lines
from vac_ddp.report.pictures import make_strip
from vac_ddp.results.logits_file import ViewsHead, write_views
from vac_ddp.scoring.views import view_table
from vac_ddp.settings import Config, ViewSettings

EVIL = "<script>alert(1)<"  # a folder's name has no slash
CLASSES = [EVIL, "$a$ \"q\" & 'x'", "漢字", "<img src=x onerror=alert(2)>"]


class Page(HTMLParser):
    """The tags, their attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves, with names that are markup elsewhere, and frames of one colour a class."""
    folder = tmp_path / "<b>run</b>".replace("/", "")
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    ids = [f"{CLASSES[label]}/clip<i>{i}" for i, label in enumerate(labels)]
    for name, label in zip(ids, labels, strict=True):
        (folder / "data" / name).mkdir(parents=True)
        for frame in range(3):
            colour = (60 * int(label), 120, 20 * frame)
            Image.new("RGB", (48, 32), colour).save(folder / "data" / name / f"{frame}.png")
    logits = rng.normal(size=(40, 2, 4)).astype(np.float32)
    logits[np.arange(40), :, labels] += 1.5
    head = ViewsHead(
        ids=ids,
        classes=CLASSES,
        views=view_table(ViewSettings(), 2),
        labels=labels,
        sources=[f"s{i // 8}" for i in range(40)],
        damaged=np.zeros(40),
        failed=np.zeros(40, bool),
    )
    write_views(folder / "views.npz", head, [logits])
    config = Config()
    config.data.train, config.data.cache = str(folder / "data"), str(tmp_path / "cache")
    config.data.group_regex = "</pre><script>alert(3)</script>"
    (folder / "config.yaml").write_text(settings_io.to_yaml(config))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    with (folder / "split.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["video", "class", "source", "part"])
        for i, name in enumerate(ids):
            writer.writerow([name, CLASSES[labels[i]], f"s{i // 8}", "val" if i >= 32 else "train"])
    lines = [
        {"kind": "train", "step": s, "lr": 1e-3, "grad_norm": 1.0, "clips_per_s": s, "data_wait": 0.1}
        | {"mfu": 0.1 * s, "memory_gib": 4.0 - s}
        for s in (1, 2, 3)
    ]
    lines += [{"kind": "speed", "step": 4, "training": 9.0, "wait": 1.0, "forward": 2.0, "saving": 3.0}]
    lines += [
        {"kind": "epoch", "step": 4 * e, "epoch": e, "train_loss": 1 / e, "train_accuracy": 0.5, "val_loss": 2 / e}
        | {"val_top1": 0.1 * e, "best": True}
        for e in (1, 2)
    ]
    lines += [{"kind": "event", "step": 3, "event": "non-finite", "steps": [3]}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "load_report.json").write_text(
        json.dumps({"source": "<s>hub</s>", "missing": ["head.weight"], "used": 0})
    )
    return folder


def page_of(run: Path, *flags: str) -> tuple[str, Page]:
    assert report_command.main([str(run), "--views", str(run / "views.npz"), *flags]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_nothing_leaves_the_file_and_names_are_text(run: Path) -> None:
    text, page = page_of(run)
    plain = r"html|head|meta|title|link|style|body|section|h[123]|p|div|span|b|pre|img|table|thead|tbody|tr|th|td"
    assert [tag for tag, _ in page.tags if not re.fullmatch(plain, tag)] == []
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text
    assert "@import" not in text
    assert ("http-equiv", "Content-Security-Policy") in page.tags[3][1].items()
    for name in CLASSES:
        assert name in page.text
    assert "</pre><script>alert(3)</script>" in page.text  # among the settings


def test_every_picture_decodes(run: Path) -> None:
    _, page = page_of(run)
    kinds = []
    for attributes in (attributes for tag, attributes in page.tags if tag == "img"):
        kind, _, data = attributes["src"].removeprefix("data:").partition(";base64,")
        kinds.append(kind)
        content = base64.b64decode(data)
        if kind == "image/jpeg":
            image = Image.open(io.BytesIO(content))
            image.load()
            assert image.size == (3 * 144 + 2 * 2, 96)  # three frames of 48 x 32, three times as high, with gaps
        else:
            assert ET.fromstring(content).tag.endswith("svg")
        assert attributes["alt"]
    assert kinds.count("image/svg+xml") == 5
    assert kinds.count("image/jpeg") >= 2


def test_figures_are_those_of_the_files(run: Path) -> None:
    _, page = page_of(run)
    stored = np.load(run / "views.npz")
    scores = stored["logits"].astype(np.float64).mean(axis=1)
    correct = scores.argmax(axis=1) == stored["labels"]
    assert f"{correct.mean():.4f} top-1 of 40 videos" in page.text
    assert "0.2000 best in training, epoch 2" in page.text
    assert "8 of 8 validation videos (100.0 %) have their source in training" not in page.text
    assert (
        "0 of 8 validation videos (0.0 %) have their source in training; the part holds 1 sources, training 4"
        in page.text
    )
    assert "median 2.5 clips/s" in page.text
    assert "25.0 % of the FLOP/s" in page.text
    assert "at most 2.00 GiB" in page.text
    assert "seconds until step 4: training 9.0 (wait 1.0, forward 2.0), saving 3.0" in page.text
    assert "step 3: non-finite, steps [3]" in page.text
    assert "<s>hub</s>" in page.text
    wrong = np.flatnonzero(~correct)
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    surest = wrong[np.argmax(shares[wrong].max(axis=1))]
    head = page.text.index("Mistakes that were most sure of themselves")
    assert page.text[head:].split("themselves ")[1].startswith(str(stored["ids"][surest]))


def test_a_leak_is_a_warning() -> None:
    rows = [["a/1", "a", "s1", "train"], ["a/2", "a", "s1", "val"], ["a/3", "a", "s2", "val"]]
    (line,) = audit_lines(rows)
    assert line.startswith("warning: 1 of 2 validation videos (50.0 %)")
    assert line.endswith("First: a/2")


def test_what_a_run_does_not_have_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "load_report.json", "classes.json", "split.csv"):
        (run / name).unlink()
    shutil.rmtree(run / "data")
    assert report_command.main([str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "No epoch has ended yet." in page.text
    assert "There are no predictions of a validation part." in page.text
    assert "nothing was predicted" in page.text
    with pytest.raises(UserError, match="is no run directory"):
        report_command.main([str(run / "data")])
    assert "no frames in the report" in capsys.readouterr().err


def test_strips_leave_out_what_does_not_decode() -> None:
    buffer = io.BytesIO()
    Image.new("L", (10, 20), 7).save(buffer, "PNG")
    good = buffer.getvalue()
    strip = make_strip([good, b"", good[:30], good])
    assert Image.open(io.BytesIO(strip)).size == (2 * 48 + 2, 96)
    assert make_strip([b"", b"none"]) is None


CHECK = """<script>
addEventListener("load", () => {
  const small = [...document.images].filter(i => !(i.complete && i.naturalWidth > 9 && i.clientWidth > 9)).length;
  document.title = `${document.images.length} pictures, ${small} unseen, ${document.scripts.length} script`;
});
</script></body>"""


def test_a_browser_shows_it_without_a_word(run: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        assert not os.environ.get("CI"), "CI installs Chromium: it is not there"
        pytest.skip("extra test: no Chromium on this machine")
    text, page = page_of(run)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    flags.append(f"--user-data-dir={tmp_path / 'profile'}")

    def dump(path: Path) -> tuple[str, str]:
        done = subprocess.run(
            [chromium, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
        )
        return done.stdout, done.stderr

    shown, said = dump(run / "report.html")
    assert "CONSOLE" not in said
    assert text.count("<section>") == shown.count("<section>") > 4
    # The same page with a script of ours that looks at the pictures; the policy would not let it run.
    policy = text.index('<meta http-equiv="Content-Security-Policy"')
    open_page = text[:policy] + text[text.index("\n", policy) :]
    (tmp_path / "checked.html").write_text(open_page.replace("</body>", CHECK), encoding="utf-8")
    shown, said = dump(tmp_path / "checked.html")
    pictures = sum(tag == "img" for tag, _ in page.tags)
    assert f"<title>{pictures} pictures, 0 unseen, 1 script</title>" in shown
    assert "CONSOLE" not in said
