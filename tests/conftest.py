"""What tests of several rooms need: a checkpoint folder with every part of a model, tiny and untrained."""

from pathlib import Path

import pytest
import torch
import yaml

import mm
from mm.data.readers import texts
from mm.data.spec import load_spec
from mm.data.tokenizer import train_tokenizer
from mm.training.checkpoint import Card, Preprocessing, build, save


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of train_tiny with fresh weights."""
    recipe = yaml.safe_load(mm.shipped("train_tiny").read_text(encoding="utf-8"))
    config, data = recipe["model"]["init_args"]["model"], recipe["data"]
    words = train_tokenizer(texts(load_spec("phantom"), studies=40), vocab_size=data["vocab_size"])
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save(
        build(config),
        folder,
        config=config,
        tokenizer=words,
        card=Card("tiny", "A demonstration that never trained."),
        preprocessing=Preprocessing(max_text=data["max_text"]),
    )
    return folder
