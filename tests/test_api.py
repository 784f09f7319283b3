"""From Python: a run directory in, the best classes of a folder or a video out, the same as the command gives."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vac_ddp
from tests.runs import Workplace
from tests.support import environment
from vac_ddp import load
from vac_ddp.errors import UserError

# The five lines that the README and docs/python.md show.
NOTEBOOK = """\
import vac_ddp
model = vac_ddp.load("run")
for video in model.predict("data_val/class1/v00"):
    for name, probability in video.top:
        print(f"{probability:.4f}  {name}")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    made = Workplace(tmp_path_factory.mktemp("api"))
    done = made.alone("run", "train.epochs=1", "data.workers=0")
    assert done.returncode == 0, done.stderr
    return made


def test_a_script_prints_what_the_command_prints(place: Workplace) -> None:
    by_hand = place.python("-c", NOTEBOOK)
    command = place.python("-m", "vac_ddp.cli", "predict", "--run", "run", "--data", "data_val/class1/v00")
    assert by_hand.returncode == 0, by_hand.stderr
    assert len(by_hand.stdout.splitlines()) == 3  # three classes there are
    assert by_hand.stdout == command.stdout


def test_a_folder_of_videos_gives_what_the_prediction_writes(place: Workplace) -> None:
    words = ["--run", "run", "--data", "data_val", "--out", "out", "data.workers=0"]
    done = place.python("-m", "vac_ddp.predict", *words)
    assert done.returncode == 0, done.stderr
    with (place.folder / "out" / "submission.csv").open(encoding="utf-8", newline="") as stream:
        wanted = {row["id"]: row["class"] for row in csv.DictReader(stream)}
    before = sorted(path for path in place.folder.rglob("*"))
    found = load(place.folder / "run").predict(place.folder / "data_val", top=2)
    assert {video.name: video.top[0][0] for video in found} == wanted
    assert len(wanted) == 6
    for video in found:
        assert len(video.top) == 2
        assert video.top[0][1] >= video.top[1][1] > 0
        assert video.logits.shape == (3,)
        shares = np.exp(video.logits - video.logits.max())
        assert video.top[0][1] == pytest.approx(float((shares / shares.sum()).max()))
        assert not video.failed
    assert sorted(path for path in place.folder.rglob("*")) == before  # nothing was written


def test_views_can_be_asked_for(place: Workplace) -> None:
    model = load(place.folder / "run", device="cpu")
    video = place.folder / "data_val" / "class0" / "v00"
    (plain,), (one,), (mirrored,) = (model.predict(video, views=views) for views in (None, "1x1", "1x1+flip"))
    assert not np.array_equal(one.logits, mirrored.logits)
    assert not np.array_equal(plain.logits, one.logits)
    again = model.predict(video)[0].logits  # the model itself has not been changed
    assert np.array_equal(again, plain.logits)


def test_mistakes_are_one_line(place: Workplace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no best_<model>\.pt"):
        load(tmp_path)
    model = load(place.folder / "run")
    with pytest.raises(UserError, match="no such data"):
        model.predict(tmp_path / "nothing")
    with pytest.raises(UserError, match="expected KxC"):
        model.predict(place.folder / "data_val", views="many")


@pytest.mark.parametrize(
    "first",
    [
        "import vac_ddp",
        "import vac_ddp.predict",
        "from vac_ddp.predict import main",
        "import vac_ddp.api",
        "import vac_ddp.cli",
    ],
)
def test_the_old_function_works_with_a_warning_in_any_order_of_imports(first: str) -> None:
    """`vac_ddp.predict` is a program as well: importing it must not take the function away, nor the other way round."""
    script = (
        f"{first}\nimport inspect, sys, warnings\n"
        "from vac_ddp import predict; assert inspect.isfunction(predict)\n"
        "import vac_ddp.predict; assert vac_ddp.predict is predict\n"
        "from vac_ddp.predict import main; assert sys.modules['vac_ddp.predict'].main is main\n"
        "class Model:\n"
        "    def predict(self, data, **options): return [data, options]\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    assert predict(Model(), 'clip.mp4', top=1) == ['clip.mp4', {'top': 1}]\n"
        "assert [(w.category, w.filename) for w in told] == [(DeprecationWarning, '<string>')], told\n"
        "assert 'model.predict(data)' in str(told[0].message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vac_ddp.nothing  # noqa: B018


def test_the_old_function_predicts(place: Workplace) -> None:
    model, video = load(place.folder / "run"), place.folder / "data_val" / "class1" / "v00"
    with pytest.warns(DeprecationWarning, match="model.predict"):
        (old,) = vac_ddp.predict(model, video, top=2, views="1x1")
    (new,) = model.predict(video, top=2, views="1x1")
    assert (old.top, old.name) == (new.top, new.name)


def test_importing_the_package_alone_is_light() -> None:
    script = "import sys, vac_ddp; assert not {'torch', 'numpy'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["x" * 300, "zero\0byte"])
def test_names_that_no_file_can_have_are_one_line(place: Workplace, name: str) -> None:
    with pytest.raises(UserError, match=r"give another name|no such"):
        load(name)
    with pytest.raises(UserError, match=r"give another name|no such"):
        load(place.folder / "run").predict(name)
