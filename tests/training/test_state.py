"""Checkpoints appear whole or not at all."""

import argparse

import pytest
import torch
from timm.task import ClassificationTask

from evavit.training import loop, state
from evavit.training.options import parse_settings


@pytest.fixture
def saver(tmp_path):
    settings, _ = parse_settings("train", ["--model", "tiny", "--checkpoint-hist", "2"])
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    task = ClassificationTask(model, verbose=False)
    return state.Saver(task, optimizer, loop.Stepper(settings, torch.device("cpu")), settings, ["a", "b"], tmp_path)


def test_best_and_last(saver, tmp_path):
    for epoch, metric in enumerate((10.0, 30.0, 20.0)):
        with torch.no_grad():
            saver.model.bias.fill_(epoch)
        best = saver.save_epoch(epoch, metric)
    assert best == (30.0, 1)
    assert torch.load(tmp_path / "model_best.pth.tar", weights_only=False)["epoch"] == 1
    assert torch.load(tmp_path / "last.pth.tar", weights_only=False)["epoch"] == 2
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1.pth.tar", "checkpoint-2.pth.tar"}
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model_best.safetensors")["bias"].tolist() == [1, 1]
    assert load_file(tmp_path / "last.safetensors")["bias"].tolist() == [2, 2]


@pytest.mark.parametrize("broken", ["torch.save", "safetensors.torch.save_file"])
def test_a_failed_write_leaves_the_last_checkpoint_whole(saver, tmp_path, monkeypatch, broken):
    saver.save_epoch(0, 10.0)
    names = ("last.pth.tar", "model_best.pth.tar", "last.safetensors", "model_best.safetensors")
    before = {name: (tmp_path / name).read_bytes() for name in names}

    def write_half(_, path, *args, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(broken, write_half)
    with pytest.raises(OSError, match="disk full"):
        saver.save_epoch(1, 20.0)
    kept = names if broken == "torch.save" else names[2:]
    assert all((tmp_path / name).read_bytes() == before[name] for name in kept)


@pytest.mark.parametrize("name", ["last.pth.tar", "last.safetensors"])
def test_settings_travel_with_the_weights(saver, tmp_path, name):
    saver.save_epoch(0, 10.0)
    saved = state.saved_settings(tmp_path / name)
    assert saved["model"] == "tiny" and saved["class_names"] == ["a", "b"]
    assert set(saved) == {*vars(parse_settings("train", [])[0]), "class_names"}


def test_a_file_of_other_origin_has_no_settings(tmp_path):
    torch.save(dict(args=argparse.Namespace(model="x")), tmp_path / "ours.pth")
    torch.save(dict(weight=torch.ones(1)), tmp_path / "plain.pth")
    assert state.saved_settings(tmp_path / "ours.pth") == dict(model="x")
    assert state.saved_settings(tmp_path / "plain.pth") == {}
