"""Layer-wise learning rates against timm's own, and what partial unfreezing leaves as it was."""

import math

import pytest
import timm
import torch
import transformers
from timm.optim import param_groups_layer_decay
from torch import nn

from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.text import TextEncoder
from mm.encoders.vit import ViTEncoder
from mm.encoders.wav2vec import Wav2VecEncoder
from mm.training.layer_rates import layer_rates
from mm.training.optim import adamw, parameter_groups


class Towers(nn.Module):
    def __init__(self, **towers: nn.Module) -> None:
        super().__init__()
        for name, tower in towers.items():
            setattr(self, name, tower)


def test_equals_timm() -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=32, num_heads=2, num_classes=5)
    names = {id(item): name for name, item in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=0.7, no_weight_decay_list=network.no_weight_decay())
    theirs = {names[id(item)]: group["lr_scale"] for group in groups for item in group["params"]}
    ours = layer_rates(Towers(image=network), 0.7)
    assert ours.keys() == {f"image.{name}" for name in theirs}
    for name, rate in theirs.items():
        if not name.startswith("norm."):  # BEiT's last norm learns like the head, timm's like the last block
            assert ours[f"image.{name}"] == pytest.approx(rate), name


def test_known_places_of_every_tower() -> None:
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )
    model = Towers(
        image=ViTEncoder(width=32, depth=2, heads=2),
        text=TextEncoder(vocab_size=20, width=16, depth=2, heads=2),
        audio=Wav2VecEncoder(width=32, depth=2, heads=2, hidden=32),
        volume=ResNet3DEncoder(width=4, depth=10),
        record=bert,
        fusion=nn.Linear(2, 2),
    )
    rates = layer_rates(model, 0.5)
    by_power = {name: -math.log2(rate) for name, rate in rates.items()}
    assert {name.split(".")[0] for name in rates} == {"image", "text", "audio", "record"}
    for tower, before, first, behind in (
        ("image", "stem.fine.0.weight", "network.blocks.0.norm1.weight", "network.norm.weight"),
        ("text", "network.token_embedding.weight", "network.transformer.resblocks.0.ln_1.weight",
         "network.ln_final.weight"),
        ("audio", "network.encoder.feature_projection.projection.weight",
         "network.encoder.transformer.layers.0.final_layer_norm.weight", "score.weight"),
        ("record", "embeddings.LayerNorm.weight", "encoder.layer.0.attention.output.LayerNorm.bias",
         "pooler.dense.weight"),
    ):  # fmt: skip
        assert by_power[f"{tower}.{before}"] == 3
        assert by_power[f"{tower}.{first}"] == 2
        assert by_power[f"{tower}.{first.replace('.0.', '.1.', 1)}"] == 1
        assert by_power[f"{tower}.{behind}"] == 0


def test_each_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    model = Towers(image=ViTEncoder(width=32, depth=2, heads=2), head=nn.Linear(4, 3))
    named = dict(model.named_parameters())
    rates = {named[name]: rate for name, rate in layer_rates(model, 0.5).items()}
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.2, rates=rates)
    seen = [item for group in optimizer.param_groups for item in group["params"]]
    assert len(seen) == len(named)
    assert {id(item) for item in seen} == {id(item) for item in named.values()}
    for group in optimizer.param_groups:
        for item in group["params"]:
            assert group["lr"] == pytest.approx(0.1 * rates.get(item, 1.0))
            assert group["weight_decay"] == (0.2 if item.ndim > 1 else 0.0)
    assert len(parameter_groups(model, weight_decay=0.1)) == 2
    before = {name: item.detach().clone() for name, item in named.items()}
    for item in named.values():
        item.grad = torch.ones_like(item)
    optimizer.step()  # of Adam the first is as long as the learning rate; decay adds to it
    for name, rate in (("image.network.blocks.0.mlp.fc1.weight", 0.1 * 0.25), ("head.weight", 0.1)):
        moved = named[name].detach() - before[name] * (1 - 0.2 * rate)
        assert moved.abs().mean().item() == pytest.approx(rate, rel=1e-3)
