"""Any of timm's image networks by name, convolutional or a transformer, with weights from a local file.

Grey images are shown to a network of three channels three times over; colour needs a data set that is read so
(`colour: true` of a data spec's image).
"""

from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from mm.batch import Tokens
from mm.encoders.base import ImageEncoder
from mm.encoders.shared import pooled
from mm.encoders.weights import fill, read_weights


class TimmEncoder(ImageEncoder):
    """Images to the network's last feature map, and to tokens pooled from it.

    Args:
        name: Of a timm model.
        weights: File with timm's names (safetensors, or torch.save of a state dict); its classifier is left out. None
            for random weights.
        pretrained: Load timm's own weights (a download) instead.
        image_size: Height and width in pixels that the network sees; images of another size are resampled.
        token_grid: Tokens along y and x, pooled from the feature map.
        mean: Of the pixels, from 0 to 1, that the weights were trained with, one a channel. None: as timm has it.
        std: Standard deviation likewise.
        channels: Of the network: 3 for pretrained weights.
        level: Of the feature pyramid as timm counts it, 0 the finest: tokens are pooled from there and the network
            ends there. None: the last feature map. Edges and textures of a middle level may say more of an image
            unlike the pretrained ones than the last level's objects do.

    Raises:
        ValueError: No such model, weights that don't fit it, or sizes that it can't have.
    """

    def __init__(
        self,
        *,
        name: str,
        weights: str | None = None,
        pretrained: bool = False,
        image_size: int = 224,
        token_grid: tuple[int, int] = (7, 7),
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        channels: Literal[1, 3] = 3,
        level: int | None = None,
    ) -> None:
        super().__init__()
        if ":" in name or not timm.is_model(name):
            raise ValueError(f"name must be one of timm's models (timm.list_models()), got {name!r}")
        if weights is not None and pretrained:
            raise ValueError(f"give weights (a local file) or pretrained=True (a download), got both: {weights!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        known = timm.get_pretrained_cfg(name)
        assert known is not None
        self.name, self.image_size, self.token_grid = name, image_size, token_grid
        self.mean = _per_channel("mean", mean or tuple(known.mean), channels, given=mean is not None)
        self.std = _per_channel("std", std or tuple(known.std), channels, given=std is not None)
        sized: dict[str, Any] = {"img_size": image_size} if known.fixed_input_size else {}
        network: Any = timm.create_model(name, pretrained=pretrained, in_chans=channels, num_classes=0, **sized)
        if weights is not None:
            fill(network, _suited(read_weights(weights), network, classifier=known.classifier), path=weights)
        network.reset_classifier(0, global_pool="")
        self.network, self.level = network, level
        self.width = int(network.num_features)
        self.widths = (self.width,)
        self.grid: tuple[int, int] | None = None
        if hasattr(network, "patch_embed") and hasattr(network, "num_prefix_tokens"):
            self.grid = tuple(network.patch_embed.grid_size)
            self.stride = image_size // self.grid[0]
        else:
            self.stride = int(network.feature_info[-1]["reduction"])
        self.channels = (1,) if channels == 1 else (1, 3)
        if level is not None:
            self._end_at(level)

    def _end_at(self, level: int) -> None:
        levels = len(self.network.feature_info)
        if not hasattr(self.network, "prune_intermediate_layers") or not 0 <= level < levels:
            raise ValueError(f"level of {self.name} must be from 0 to {levels - 1}, got {level}")
        self.network.prune_intermediate_layers([level], prune_norm=True, prune_head=True)
        said = self.network.feature_info[level]
        self.width, self.stride = int(said["num_chs"]), int(said["reduction"])
        self.widths = (self.width,)

    def pixels(self, x: Float[Tensor, "N C Y X"]) -> Float[Tensor, "N E y x"]:
        """Images as the network was trained on them."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True).clamp(0, 1)
        x = x.expand(-1, len(self.mean), -1, -1)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)

    def pyramid(self, x: Float[Tensor, "N C Y X"]) -> tuple[Float[Tensor, "N _ _ _"], ...]:
        """The last feature map, or that of `level`, of `width` channels."""
        if self.level is not None:
            made = self.network.forward_intermediates(
                self.pixels(x), indices=[self.level], intermediates_only=True, output_fmt="NCHW"
            )
            return (made[0],)
        features = self.network.forward_features(self.pixels(x))
        if self.grid is not None:
            return (features[:, self.network.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.grid),)
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        return (features,)

    def tokens(self, grid: Float[Tensor, "N D y x"]) -> Tokens:
        """Tokens pooled from the feature map, row by row."""
        return pooled(grid, self.token_grid)

    def sealed(self) -> dict[str, Any]:
        """Arguments that make the same network without the file."""
        return {"weights": None, "mean": self.mean, "std": self.std}


def _per_channel(name: str, values: tuple[float, ...], channels: int, *, given: bool) -> tuple[float, ...]:
    if not given and channels == 1:
        return (sum(values) / len(values),)
    if len(values) != channels or (name == "std" and min(values) <= 0):
        raise ValueError(f"{name} must have one value for each of {channels} channels (std above 0), got {values}")
    return tuple(float(value) for value in values)


def _suited(weights: dict[str, Tensor], network: nn.Module, *, classifier: Any) -> dict[str, Tensor]:
    """Without the classifier, and with places for as many patches as the network has."""
    parts = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    own = network.state_dict()
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if name in own or not any(name.startswith(f"{part}.") for part in parts)
    }
    places = kept.get("pos_embed")
    if places is not None and places.ndim == 3 and "pos_embed" in own and places.shape != own["pos_embed"].shape:
        assert isinstance(network.patch_embed, nn.Module)
        plain = bool(getattr(network, "no_embed_class", False))
        kept["pos_embed"] = resample_abs_pos_embed(
            places,
            new_size=list(network.patch_embed.grid_size),  # type: ignore[arg-type]
            num_prefix_tokens=0 if plain else int(network.num_prefix_tokens),  # type: ignore[arg-type]
        )
    return kept
