"""Help: what it shows, how long it is, what it imports; and what is typed in place of arguments of other programs."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from tests.help_screens import FOLDER, screens
from tests.support import REPO, environment
from vac_ddp import checks, cli, config
from vac_ddp.arguments import parse_prediction, parse_settings
from vac_ddp.errors import UserError
from vac_ddp.settings_help import completion, presets

WITHOUT_TORCH = """
import contextlib, io, sys
from vac_ddp import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.main(sys.argv[1:])
print("torch" in sys.modules)
"""


def shown(capsys, *words: str) -> list[str]:
    with contextlib.suppress(SystemExit):  # of argparse, after --help
        assert cli.main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


def test_the_help_of_train_is_one_screen(capsys) -> None:
    lines = shown(capsys, "train", "--help")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for word in ("--nproc", "torchrun", "vac settings", "optim.lr=", "run.dir=runs/", *presets()):
        assert word in text, word


def test_help_shows_the_values_of_a_preset(capsys) -> None:
    values = parse_settings(["--config=scratch_small"]).config
    text = "\n".join(shown(capsys, "train", "--config", "scratch_small", "--help"))
    assert f"train.epochs={values.train.epochs} " in text
    assert f"clip.size={values.clip.size} " in text
    assert values.train.epochs != config.Config().train.epochs


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_imports_no_torch(command: str) -> None:
    words = [command, "--help"] if command else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        env=environment(), cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays its help out differently in every version")
def test_help_screens_are_those_that_were_read() -> None:
    """A change of one is seen in a diff: `python -m tests.help_screens` writes them."""
    kept = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.txt")}
    assert screens() == kept


def test_help_of_a_command_in_both_orders(capsys) -> None:
    assert shown(capsys, "help", "runs") == shown(capsys, "runs", "--help")
    assert shown(capsys, "help") == shown(capsys, "--help")


def test_settings_are_searched_by_name_and_meaning(capsys) -> None:
    everything = shown(capsys, "settings")
    assert [line.split()[0] for line in everything if "  <" in line] == list(checks.leaves())
    found = [line.split()[0] for line in shown(capsys, "settings", "warm-up") if "  <" in line]
    wanted = [
        name for name, field in checks.leaves().items() if "warm-up" in f"{name} {field.metadata['help']}".lower()
    ]
    assert found == wanted != []
    (line,) = [line for line in shown(capsys, "settings", "EPOCHS", "--config", "quickstart") if "train.epochs" in line]
    assert "= 24" in line
    assert cli.main(["settings", "warmpu_epochs"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_presets_are_listed_and_shown(capsys) -> None:
    lines = shown(capsys, "presets")
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (REPO / "configs").glob("*.yaml"))
    assert all(line.endswith(".") and len(line) <= 110 for line in lines)
    assert (
        "\n".join(shown(capsys, "presets", "show", "quickstart")) + "\n"
        == (REPO / "configs" / "quickstart.yaml").read_text()
    )
    assert cli.main(["presets", "show", "quickstrat"]) == 2
    assert "did you mean quickstart?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--lr", "1e-4"], "type optim.lr=1e-4"),
        (["--lr=1e-4"], "type optim.lr=1e-4"),
        (["--epochs", "5"], "type train.epochs=5"),
        (["--batch-size", "8"], "type train.global_batch=8"),
        (["--num_train_epochs", "5"], "type train.epochs=5"),
        (["--output_dir", "out"], "type run.dir=out"),
        (["--weight-decay", "0.1"], "type optim.weight_decay=0.1"),
        (["--gradient_accumulation_steps", "4"], "type train.global_batch=4"),
        (["--seed", "3"], "type seed=3"),
        (["--gpus", "2"], "type --nproc 2"),
        (["-c", "x.yaml"], "type --config x.yaml"),
        (["x.yaml"], "type --config x.yaml"),
        (["scratch_small"], "type --config scratch_small"),
        (["optim.lr", "1e-4"], "type optim.lr=1e-4"),
        (["tests"], "type data.train=tests"),
        (["--debgu"], "did you mean --debug?"),
        (["--confg", "x"], "did you mean --config?"),
        (["--frobnicate"], "unknown flag --frobnicate (see --help, vac settings)"),
        (["nothing"], "'nothing' is not a setting (see --help, vac settings)"),
        (["optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_what_is_typed_elsewhere_is_answered_with_what_works_here(monkeypatch, words, answer) -> None:
    monkeypatch.chdir(REPO)
    with pytest.raises(UserError) as caught:
        parse_settings(words)
    assert answer in str(caught.value)
    typed = answer.partition("type ")[2].split()
    if typed and "=" in typed[0]:
        assert typed[0].partition("=")[0] in checks.leaves()


def test_run_and_data_of_a_prediction_by_position_or_flag() -> None:
    for words in (
        ["runs/a", "test"],
        ["--run", "runs/a", "test"],
        ["runs/a", "--data", "test"],
        ["run.dir=runs/a", "test"],
    ):
        options = parse_prediction([*words, "predict.average=mean-probs"])
        assert (options.weights, str(options.data)) == ("runs/a", "test")
        assert options.words == ["predict.average=mean-probs"]
    assert str(parse_prediction(["--weights", "best.pt", "test"]).data) == "test"
    with pytest.raises(UserError, match="unknown argument third"):
        parse_prediction(["runs/a", "test", "third"])


def test_completion_knows_commands_presets_and_settings(tmp_path, capsys) -> None:
    """By bash itself: what it offers for a line."""
    (tmp_path / "vac").write_text("\n".join(shown(capsys, "completion", "bash")))
    ask = 'source ./vac; COMP_WORDS=({words}); COMP_CWORD={place}; compopt() {{ :; }}; _vac; echo "${{COMPREPLY[@]}}"'

    def offered(*words: str) -> list[str]:
        script = ask.format(words=" ".join(f"'{word}'" for word in words), place=len(words) - 1)
        return subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.split()

    assert offered("vac", "") == sorted([*cli.COMMANDS, "help"])
    assert offered("vac", "pr") == ["predict", "presets", "probe"]
    assert offered("vac", "train", "--config", "scratch") == ["scratch_small"]
    assert offered("vac", "train", "optim.warm") == [
        name + "=" for name in checks.leaves() if name.startswith("optim.warm")
    ]
    assert completion("zsh", []).startswith("autoload")
