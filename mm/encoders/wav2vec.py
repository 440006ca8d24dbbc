"""wav2vec 2.0 on chest sounds, in a size of our own (Baevski et al., NeurIPS 2020; torchaudio's model).

Its own feature extractor, `stem="waveform"`, normalises each frame by itself (`layer_norm`); the other mode,
`group_norm`, normalises over time, padding included, and so makes a sound's features depend on the longest sound of
its batch. Trained from nothing on thousands of patients rather than on 960 hours, the tower begins with the spectrum
instead (`mm.encoders.mel`).
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchaudio.models import wav2vec2_model

from mm.batch import Audio, Tokens
from mm.encoders.base import Encoder
from mm.encoders.mel import BAND_HZ, MelStem
from mm.ontology import SOUND_SITES

Convolution = tuple[int, int, int]
"""Output channels, kernel and stride of one layer of the feature extractor."""


class Wav2VecEncoder(Encoder):
    """Sounds of the chest sites to a few tokens a site.

    A frame is 20 ms at 8 kHz with either stem (stride 160), so that a crackle of 10 ms fills half of a frame and a
    wheeze of 100 ms five of them. Each sound is scaled to unit power first.

    Args:
        width: Of tokens.
        depth: Number of transformer layers.
        heads: Number of heads.
        hidden: Hidden width of the feed-forward layers.
        stem: "mel" for a log-mel spectrogram and convolutions, "waveform" for wav2vec 2.0's own convolutions.
        convolutions: Layers of the waveform's stem.
        band_hz: Lowest and highest frequency of the spectrum; the default is for lung sounds, speech goes beyond.
        warp: In training, share by which each sound's frequency axis is stretched or squeezed at random, see
            `mm.encoders.mel`; not with the waveform's stem.
        tokens_per_site: Each sound is cut into so many equal stretches, and each is pooled by learned attention.
        dropout: In the transformer, in training only.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 3,
        heads: int = 2,
        hidden: int = 384,
        stem: Literal["mel", "waveform"] = "mel",
        convolutions: tuple[Convolution, ...] = ((32, 16, 8), (64, 10, 5), (128, 8, 4)),
        band_hz: tuple[float, float] = BAND_HZ,
        warp: float = 0.0,
        tokens_per_site: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width}, heads={heads}")
        if warp and stem != "mel":
            raise ValueError(f"warp {warp} stretches the spectrum of stem: mel, and stem is {stem!r}; leave warp out")
        mel = MelStem(band_hz=band_hz, warp=warp) if stem == "mel" else None
        layers = convolutions if mel is None else ((mel.width, 1, 1),)
        self.network = wav2vec2_model(
            extractor_mode="layer_norm",
            extractor_conv_layer_config=list(layers),
            extractor_conv_bias=True,
            encoder_embed_dim=width,
            encoder_projection_dropout=dropout,
            encoder_pos_conv_kernel=16,
            encoder_pos_conv_groups=16,
            encoder_num_layers=depth,
            encoder_num_heads=heads,
            encoder_attention_dropout=dropout,
            encoder_ff_interm_features=hidden,
            encoder_ff_interm_dropout=dropout,
            encoder_dropout=dropout,
            encoder_layer_norm_first=True,
            encoder_layer_drop=0.0,
            aux_num_out=None,
        )
        if mel is None:
            self.stride = math.prod(stride for _, _, stride in convolutions)
            self.shortest = _samples_of_one_frame(convolutions)
        else:
            self.network.feature_extractor = mel
            self.stride, self.shortest = mel.stride, mel.shortest
        self.width = width
        self.tokens_per_site = tokens_per_site
        self.score = nn.Linear(width, 1, bias=False)
        self.site = nn.Embedding(len(SOUND_SITES), width)
        self.place = nn.Embedding(tokens_per_site, width)
        nn.init.trunc_normal_(self.site.weight, std=0.02)
        nn.init.trunc_normal_(self.place.weight, std=0.02)

    def frames(
        self, sounds: Float[Tensor, "R T"], lengths: Int[Tensor, " R"]
    ) -> tuple[Float[Tensor, "R F D"], Int[Tensor, " R"]]:
        """Features of each frame of each sound, and how many frames each has.

        Args:
            sounds: Samples; what lies past a sound's length is ignored.
            lengths: Samples of each sound, all at least `self.shortest`.
        """
        inside = torch.arange(sounds.shape[1], device=sounds.device) < lengths[:, None]
        sounds = sounds.masked_fill(~inside, 0)
        power = sounds.square().sum(1, keepdim=True) / lengths[:, None]
        return self.network(sounds / (power.sqrt() + 1e-5), lengths)  # type: ignore[no-any-return]

    def forward(self, x: Audio) -> Tokens:
        """Tokens site by site; a site without sound (or shorter than a frame) has none."""
        B, S, T = x.values.shape
        heard = (x.lengths >= self.shortest).flatten()
        values = x.values.new_zeros(B * S, self.tokens_per_site, self.width)
        mask = torch.zeros(B * S, self.tokens_per_site, dtype=torch.bool, device=x.values.device)
        if heard.any():
            frames, lengths = self.frames(x.values.reshape(B * S, T)[heard], x.lengths.flatten()[heard])
            pooled, filled = self.pool(frames, lengths)
            sites = self.site.weight.repeat(B, 1)[heard]
            pooled = pooled + sites[:, None] + self.place.weight
            values = values.to(pooled.dtype).index_put((heard,), pooled.masked_fill(~filled[..., None], 0))
            mask = mask.index_put((heard,), filled)
        return Tokens(values.view(B, -1, self.width), mask.view(B, -1))

    def pool(
        self, frames: Float[Tensor, "R F D"], lengths: Int[Tensor, " R"]
    ) -> tuple[Float[Tensor, "R P D"], Bool[Tensor, "R P"]]:
        """Attention pooling of each of P equal stretches of a sound, and which stretches have a frame."""
        frame = torch.arange(frames.shape[1], device=frames.device)
        stretch = frame * self.tokens_per_site // lengths[:, None]
        inside = stretch[:, None] == torch.arange(self.tokens_per_site, device=frames.device)[:, None]
        filled = inside.any(-1)
        score = self.score(frames).squeeze(-1)[:, None].float()
        weight = score.masked_fill(~inside, -1e4).softmax(-1).to(frames.dtype)
        return weight @ frames.masked_fill(frame[:, None] >= lengths[:, None, None], 0), filled


def _samples_of_one_frame(convolutions: tuple[Convolution, ...]) -> int:
    samples = 1
    for _, kernel, stride in reversed(convolutions):
        samples = (samples - 1) * stride + kernel
    return samples
