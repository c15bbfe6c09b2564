"""What holds for all commands: help, speed of help, errors."""

import subprocess
import sys

import pytest

import efficientsam3_hf
from efficientsam3_hf import zoo


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("segment", "--text bicycle"),
        ("track", "--davis masks/"),
        ("evaluate", "accelerate launch"),
        ("distill", "--phrases phrases.txt"),
        ("cache-teacher", "--codec pca --rank 256"),
        ("zoo", "efficientsam3 zoo efficientsam3-tinyvit-s"),
    ],
)
def test_help_teaches_by_examples(name, says, command):
    ran = command(name, "--help")

    assert ran.code == 0
    assert says in ran.out
    assert name in command("--help").out


@pytest.mark.parametrize("name", ["evaluate", "distill", "cache-teacher"])
def test_help_imports_nothing_heavy(name):
    code = (
        "import sys\nfrom efficientsam3_hf.cli.app import app\n"
        f"try:\n    app(['{name}', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules] or 0)"
    )

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr


def test_the_version_is_the_package_s(command):
    assert command("--version").out.strip() == efficientsam3_hf.__version__


def test_an_unknown_command_is_an_error(command):
    ran = command("sagment")

    assert ran.code == 2
    assert "sagment" in ran.err


def test_the_traceback_is_shown_on_demand(command):
    assert command("zoo", "nothing").code == 2
    with pytest.raises(ValueError, match="no variant 'nothing'"):
        command("--debug", "zoo", "nothing")


@pytest.mark.parametrize("kind", [MemoryError, FloatingPointError])
def test_what_a_training_ends_with_is_said_in_words(kind, command, monkeypatch):
    def fail(*args, **kwargs):
        raise kind("Out of memory in step 3, with a batch of ...")

    monkeypatch.setattr(zoo, "names", fail)

    ran = command("zoo")

    assert ran.code == 2
    assert ran.err.strip().splitlines()[-1] == "Error: Out of memory in step 3, with a batch of ..."
