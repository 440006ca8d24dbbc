"""open_clip's towers, by name or from a folder: embeddings and zero-shot results are open_clip's own."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mm.batch import Batch, Images, Padded, Sample
from mm.data.collate import collate
from mm.data.text_vocabulary import ClipVocabulary
from mm.data.tokenizer import Tokenizer, train_tokenizer
from mm.encoders.clip import architecture
from mm.encoders.clip_image import ClipImageEncoder
from mm.encoders.text import TextEncoder
from mm.fusion.alignment import CrossModalAlignment
from mm.model import MultimodalModel
from mm.training import checkpoint

VISION = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None},
    "timm": {"image_size": 64, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TEXTS = ["A chest radiograph of 5 mm!", "no pleural effusion is seen on the left", "", "nodule " * 40]


def folder(path: Path, kind: str = "vit", **changes: object) -> Path:
    config = {"embed_dim": 32, "vision_cfg": VISION[kind], "text_cfg": TEXT} | changes
    path.mkdir(exist_ok=True)
    prepared = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": prepared}))
    torch.manual_seed(0)
    made = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    save_file({name: item.clone() for name, item in made.state_dict().items()}, path / "open_clip_model.safetensors")
    return path


def theirs(path: Path) -> torch.nn.Module:
    return open_clip.create_model(f"local-dir:{path}").eval()


def pictures(size: int, number: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(number, 3, size, size)


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.25])[:, None, None]


@pytest.mark.parametrize(("kind", "causal"), [("vit", True), ("vit", False), ("resnet", True), ("timm", True)])
def test_embeddings_of_a_folder_are_open_clips(tmp_path: Path, kind: str, causal: bool) -> None:
    path = folder(tmp_path, kind, text_cfg=TEXT | {"no_causal_mask": not causal})
    clip, size = theirs(path), VISION[kind]["image_size"]
    assert isinstance(size, int)
    image, text = ClipImageEncoder(weights=str(path)).eval(), TextEncoder(weights=str(path)).eval()
    x, words = pictures(size), ClipVocabulary(limit=text.context_length)
    ids = open_clip.get_tokenizer(f"local-dir:{path}")(TEXTS)
    rows = Padded.of([words.encode(line, 1000) for line in TEXTS])
    assert (rows.values == ids[:, : rows.values.shape[1]]).all()
    with torch.no_grad():
        assert torch.equal(image(x).values[:, 0], clip.encode_image(normalised(x)))
        torch.testing.assert_close(text(rows), clip.encode_text(ids), atol=1e-6, rtol=1e-6)


def test_patches_stand_behind_the_embedding_in_their_places(tmp_path: Path) -> None:
    path = folder(tmp_path)
    encoder = ClipImageEncoder(weights=str(path), token_grid=(2, 2)).eval()
    x = pictures(32)
    with torch.no_grad():
        (grid,), tokens = encoder.look(x)
        alone = ClipImageEncoder(weights=str(path)).eval()(x)
    assert grid.shape == (3, 32, 4, 4)
    assert encoder.stride == 8
    assert tokens.values.shape == (3, 5, 32)
    torch.testing.assert_close(tokens.values[:, 0], alone.values[:, 0])
    torch.testing.assert_close(tokens.values[:, 2], grid[:, :, :2, 2:].mean((2, 3)))


def model(path: Path) -> MultimodalModel:
    return MultimodalModel(
        fusion=CrossModalAlignment(16, heads=2),
        image=ClipImageEncoder(weights=str(path)),
        text=TextEncoder(weights=str(path)),
        compared="as_is",
    ).eval()


def tokenizer() -> Tokenizer:
    return train_tokenizer(["a b c"], vocab_size=300).with_texts(ClipVocabulary(limit=TEXT["context_length"]))


def test_zero_shot_is_open_clips_and_a_checkpoint_keeps_it_without_the_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "clip")
    clip, names = theirs(path), ["pneumothorax", "pleural effusion", "nodule"]
    x = pictures(32, 6)
    grey = x[:, :1]
    own = open_clip.build_zero_shot_classifier(
        clip,
        open_clip.get_tokenizer(f"local-dir:{path}"),
        names,
        [lambda name: f"a radiograph with {name}"],
        num_classes_per_batch=None,
        device="cpu",
    )
    config = {
        "class_path": "mm.model.MultimodalModel",
        "init_args": {
            "compared": "as_is",
            "fusion": {"class_path": "mm.fusion.alignment.CrossModalAlignment", "init_args": {"width": 16, "heads": 2}},
            "image": {"class_path": "mm.encoders.clip_image.ClipImageEncoder", "init_args": {"weights": str(path)}},
            "text": {"class_path": "mm.encoders.text.TextEncoder", "init_args": {"weights": str(path)}},
        },
    }
    made = model(path)
    checkpoint.save(made, tmp_path / "kept", config=config, tokenizer=tokenizer(), card=checkpoint.Card("clip"))
    assert str(path) not in (tmp_path / "kept" / "config.json").read_text()
    for file in path.iterdir():
        file.unlink()
    opened = checkpoint.load(tmp_path / "kept")
    assert opened.model.image is not None
    assert isinstance(opened.model.image, ClipImageEncoder)
    assert opened.model.image.mean == (0.4, 0.5, 0.6)
    prompts = [Sample("s", text=f"a radiograph with {name}") for name in names]
    for network, words, close in ((made, tokenizer(), 1e-6), (opened.model, opened.tokenizer, 2e-2)):
        text = collate(prompts, words, rows=()).text
        assert text is not None
        with torch.no_grad():
            batch = Batch(6, image=Images(x, torch.ones(6, dtype=torch.bool)))
            images = network.encode(batch).embeddings.image
            shades = network.encode(Batch(6, image=Images(grey, torch.ones(6, dtype=torch.bool)))).embeddings.image
            vectors = network.embed_text(text)
            expected = clip.encode_image(normalised(x), normalize=True) @ own
            grey_expected = clip.encode_image(normalised(grey.expand(-1, 3, -1, -1)), normalize=True) @ own
        torch.testing.assert_close(images @ vectors.T, expected, atol=close, rtol=close)
        torch.testing.assert_close(shades @ vectors.T, grey_expected, atol=close, rtol=close)


def test_a_file_and_a_name_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    config = json.loads((path / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(config)))
    clip, file = theirs(path), tmp_path / "tiny.pt"
    torch.save({"state_dict": clip.state_dict()}, file)
    text, image = TextEncoder(name="tiny", weights=str(file)), ClipImageEncoder(name="tiny", weights=str(file))
    ids = open_clip.get_tokenizer(f"local-dir:{path}")(TEXTS[:2])
    rows = Padded.of([ClipVocabulary(limit=24).encode(line, 24) for line in TEXTS[:2]])
    with torch.no_grad():
        torch.testing.assert_close(text.eval()(rows), clip.encode_text(ids), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(image.eval().network(pictures(32)), clip.encode_image(pictures(32)))
    assert text.texts_from == "open_clip"
    assert TextEncoder(name="tiny").texts_from is None
    assert image.sealed()["architecture"] is None


def test_a_name_knows_how_its_images_were_prepared() -> None:
    for name, mean in (("ViT-B-16-SigLIP", (0.5, 0.5, 0.5)), ("MobileCLIP-S1", (0.0, 0.0, 0.0))):
        _, prepared = architecture("visual", name=name, weights=None, given=None)
        assert prepared["mean"] == mean


def test_what_would_reach_the_network_or_is_no_tower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of"):
        ClipImageEncoder()
    with pytest.raises(ValueError, match="a folder must have"):
        ClipImageEncoder(weights=str(tmp_path))
    with pytest.raises(ValueError, match="transformer of open_clip's own"):
        TextEncoder(name="ViT-B-16-SigLIP")
    with pytest.raises(ValueError, match="isn't taken"):
        ClipImageEncoder(name="coca_ViT-B-32")
    path = folder(tmp_path)
    config = json.loads((path / "open_clip_config.json").read_text())
    for part, changes, match in (
        ("vision_cfg", {"timm_model_name": "hf-hub:someone/model"}, "plain name"),
        ("vision_cfg", {"timm_model_name": "resnet10t", "timm_model_pretrained": True}, "would fetch weights"),
        ("vision_cfg", {"width": 10**9}, "beyond 65,536"),
        ("vision_cfg", {"surprise": 1}, "surprise"),
        ("text_cfg", {"hf_model_name": "someone/model"}, "transformer of open_clip's own"),
        ("text_cfg", {"hf_tokenizer_name": "someone/model"}, "open_clip's own vocabulary"),
    ):
        changed = json.loads(json.dumps(config))
        changed["model_cfg"][part] |= changes
        (path / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            TextEncoder(weights=str(path))
