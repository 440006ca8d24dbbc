"""One tower of an open_clip model: by name, or from a folder with open_clip_config.json and weights.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021).
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict
from torch import Tensor, nn

from mm.encoders.weights import fill, read_weights

Part = Literal["visual", "text"]

CONFIG: Final = "open_clip_config.json"
FILES: Final = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
_KEYS: Final = frozenset(
    {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"}
)
_LARGEST: Final = 2**16
_LONGEST: Final = 10_000
# A tower that isn't wanted is made as small as it can be: open_clip makes both.
_TINY: Final[dict[Part, tuple[str, dict[str, Any]]]] = {
    "text": ("vision_cfg", {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}),
    "visual": ("text_cfg", {"context_length": 2, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}),
}


def architecture(
    part: Part, *, name: str | None, weights: str | None, given: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of the model that a tower is of, and how its images are prepared where that is said.

    Args:
        part: Which tower.
        name: Of one of open_clip's models.
        weights: A file with the weights of `name`, or a folder that brings its own configuration.
        given: The configuration as JSON, as a checkpoint keeps it.

    Raises:
        ValueError: None of them or two of them, or a model that this package doesn't take a tower of.
    """
    folder = weights is not None and Path(weights).is_dir()
    if (name is not None) + folder + (given is not None) != 1:
        raise ValueError(
            "give one of: the name of an open_clip model (with its weights in a file), weights=FOLDER with"
            f" {CONFIG}, or the architecture that a checkpoint keeps; got name={name!r}, weights={weights!r}"
        )
    prepared: dict[str, Any] = {}
    if name is not None:
        if name not in open_clip.list_models():
            raise ValueError(f"name must be one of open_clip's models (open_clip.list_models()), got {name!r}")
        config, prepared = open_clip.get_model_config(name) or {}, _prepared(name)
    elif given is not None:
        config = _object(given, "architecture")
    else:
        assert weights is not None
        file = Path(weights) / CONFIG
        if not file.is_file():
            raise ValueError(f"weights {weights!r}: a folder must have {CONFIG}")
        content = _object(file.read_text(encoding="utf-8"), CONFIG)
        config, prepared = content.get("model_cfg"), content.get("preprocess_cfg") or {}
    _check(config, part, own=name is not None, what=repr(name) if name is not None else repr(weights))
    assert isinstance(config, dict)
    return config, prepared if isinstance(prepared, dict) else {}


def _prepared(name: str) -> dict[str, Any]:
    """Mean and standard deviation of pixels, where all of open_clip's weights of a name agree on them."""
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    pairs = {(tuple(item.get("mean") or ()), tuple(item.get("std") or ())) for item in known}
    mean, std = pairs.pop() if len(pairs) == 1 else ((), ())
    return {"mean": mean, "std": std} if mean and std else {}


def tower(part: Part, config: dict[str, Any], *, weights: str | None) -> nn.Module:
    """One tower, with random weights or those of a file or folder.

    Raises:
        ValueError: The weights can't be read or don't fit.
    """
    other, tiny = _TINY[part]
    kept = {key: value for key, value in config.items() if key != "custom_text"}
    made: nn.Module = getattr(open_clip.CustomTextCLIP(**{**kept, other: tiny}), part)
    if weights is not None:
        state = convert_to_custom_text_state_dict(read_weights(_file(Path(weights))))
        start = f"{part}."
        own = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
        fill(made, _without_constants(own, made), path=weights)
    return made


def _without_constants(own: dict[str, Tensor], made: nn.Module) -> dict[str, Tensor]:
    """Older files hold masks as well, which the network makes itself."""
    constants = {name for name, _ in made.named_buffers()} - set(made.state_dict())
    return {name: tensor for name, tensor in own.items() if name not in constants}


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"weights {str(path)!r} must hold one of {', '.join(FILES)}")


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON") from error
    if not isinstance(content, dict) or len(text) > _LONGEST:
        raise ValueError(f"{what} must be a JSON object of at most {_LONGEST:,} characters")
    return content


def _check(config: Any, part: Part, *, own: bool, what: str) -> None:
    """Refuses what leads to the network, and of a foreign configuration whatever open_clip's own don't have."""
    where = f"open_clip model {what}"
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise ValueError(f"{where}: its configuration must have vision_cfg and text_cfg")
    text, vision = config["text_cfg"], config["vision_cfg"]
    unknown = set(config) - _KEYS
    unknown |= set(text) - {item.name for item in fields(CLIPTextCfg)}
    unknown |= set(vision) - {item.name for item in fields(CLIPVisionCfg)}
    if unknown:
        raise ValueError(f"{where} is of a kind that isn't taken: it has {', '.join(sorted(map(str, unknown))[:3])}")
    if vision.get("timm_model_pretrained"):
        raise ValueError(f"{where} would fetch weights: timm_model_pretrained must be false")
    if part == "text":
        _check_text(text, where)
    if own:
        return
    if ":" in str(vision.get("timm_model_name")) or vision.get("pos_embed_type", "learnable") != "learnable":
        raise ValueError(f"{where}: timm_model_name must be a plain name, and pos_embed_type learnable")
    numbers = [config.get("embed_dim"), *text.values(), *vision.values()]
    flat = [item for value in numbers for item in (value if isinstance(value, list | tuple) else [value])]
    if any(isinstance(item, int | float) and not abs(item) <= _LARGEST for item in flat):
        raise ValueError(f"{where}: a size in its configuration is beyond {_LARGEST:,}")
    if any(isinstance(item, dict) for item in flat):
        raise ValueError(f"{where}: act_kwargs and norm_kwargs aren't taken")


def _check_text(text: dict[str, Any], where: str) -> None:
    foreign = [key for key in ("hf_model_name", "embed_cls") if text.get(key)]
    if foreign or text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ValueError(
            f"{where}: its text tower must be a transformer of open_clip's own that is read at the end of a text; it"
            f" has {', '.join(foreign) or 'another pooling'}"
        )
    if text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs"):
        raise ValueError(f"{where}: its texts must be split with open_clip's own vocabulary, not a downloaded one")
