"""What is bound to fail is refused before anything is read."""

import shutil
from collections import namedtuple

import pytest

from gemma4_jax.errors import UserError
from launch import preflight
from launch.run import main

Usage = namedtuple("Usage", "total used free")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 70, 30))
    preflight.check_disk(tmp_path / "new" / "run", 10, 2)
    with pytest.raises(UserError, match=r"take 0.0 GiB .* 3 kept and one being written"):
        preflight.check_disk(tmp_path / "new" / "run", 10, 3)
    assert not (tmp_path / "new").exists()


def test_state_that_does_not_fit_is_refused_before_weights_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "_available", lambda: 10 * 2**20)
    options = ["--config=configs/tiny_sft.py", f"--config.workdir={tmp_path}/run", "--config.mesh.devices=1"]
    assert main(options) == 1
    out, err = capsys.readouterr()
    assert "gradients alone take" in err
    assert "has 0.0 GiB" in err
    assert "data" not in out.splitlines()
    assert not (tmp_path / "run" / "checkpoints").exists()
