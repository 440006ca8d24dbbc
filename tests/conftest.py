"""What tests of several rooms need: a checkpoint folder with every part of a model, tiny and untrained."""

import os
from pathlib import Path

import pytest
import torch
import yaml

import mm
from mm import ontology
from mm.data.readers import texts
from mm.data.spec import load_spec
from mm.data.tokenizer import train_tokenizer
from mm.training.checkpoint import Card, Preprocessing, build, save

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core: more threads than cores make small tests ten times slower, and sums depend on how many there are.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of train_tiny with fresh weights."""
    recipe = yaml.safe_load(mm.shipped("train_tiny").read_text(encoding="utf-8"))
    config, data = recipe["model"]["init_args"]["model"], recipe["data"]
    words = train_tokenizer(texts(load_spec("phantom"), studies=40), vocab_size=data["vocab_size"])
    torch.manual_seed(0)
    model = build(config)
    assert model.findings is not None
    for code in ("nodule", "effusion", "rib_fracture", "infection"):
        model.findings.threshold[ontology.INDEX[code]] = 0.0  # always found: places, sizes and sentences are walked
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save(
        model,
        folder,
        config=config,
        tokenizer=words,
        card=Card("tiny", "It never trained.", kind="demonstration"),
        preprocessing=Preprocessing(max_text=data["max_text"]),
    )
    return folder
