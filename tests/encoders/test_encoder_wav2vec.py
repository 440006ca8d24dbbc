"""Wav2VecEncoder: neither a sound's padding nor its neighbours change it; missing sites; gradients; size."""

from itertools import pairwise

import pytest
import torch

from mm.batch import Audio
from mm.encoders.mel import BAND_HZ, MelStem, warped, warped_filters
from mm.encoders.wav2vec import Wav2VecEncoder

CONVOLUTIONS = ((8, 10, 5), (16, 4, 4))


STEMS = pytest.mark.parametrize("stem", ["mel", "waveform"])


def small(**changes: object) -> Wav2VecEncoder:
    torch.manual_seed(0)
    settings = {"width": 32, "depth": 2, "heads": 2, "hidden": 32, "tokens_per_site": 4}
    settings |= {"stem": "waveform", "convolutions": CONVOLUTIONS}
    return Wav2VecEncoder(**settings | changes)  # type: ignore[arg-type]


@STEMS
def test_padding_and_neighbours_never_change_a_sound(stem: str) -> None:
    encoder = small(stem=stem).eval()
    sound = torch.randn(1, 4, 5000) * 0.1
    lengths = torch.tensor([[5000, 3003, 0, 4210]])
    expected = encoder(Audio(sound, lengths))
    assert expected.mask.any()
    for filling in (0.0, 1.0):
        longer = torch.full((2, 4, 9000), filling)
        longer[0, :, :5000] = sound
        longer[0].masked_fill_(torch.arange(9000) >= lengths[0, :, None], filling)
        longer[1] = torch.randn(4, 9000)
        got = encoder(Audio(longer, torch.cat([lengths, torch.full((1, 4), 9000)])))
        assert torch.equal(got.mask[:1], expected.mask)
        torch.testing.assert_close(got.values[:1], expected.values, atol=1e-5, rtol=1e-5)


def test_a_missing_site_has_no_tokens() -> None:
    encoder = small()
    tokens = encoder(Audio(torch.randn(2, 4, 400), torch.tensor([[400, 0, 10, 400], [0, 0, 0, 0]])))
    assert tokens.mask.view(2, 4, 4).all(-1).tolist() == [[True, False, False, True], [False] * 4]
    assert (tokens.values[~tokens.mask] == 0).all()


def test_no_sound_at_all_gives_an_empty_mask() -> None:
    tokens = small()(Audio(torch.zeros(1, 4, 1), torch.zeros(1, 4, dtype=torch.long)))
    assert not tokens.mask.any()


def test_a_sound_of_one_frame_fills_one_token() -> None:
    encoder = small()
    assert encoder.shortest == 25
    tokens = encoder(Audio(torch.randn(1, 4, 25), torch.tensor([[25, 24, 0, 0]])))
    assert tokens.mask[0].view(4, 4).sum(-1).tolist() == [1, 0, 0, 0]
    assert tokens.values.isfinite().all()


def test_each_token_pools_its_own_stretch() -> None:
    encoder = small()
    frames = torch.arange(1.0, 11.0)[None, :, None].expand(1, 10, 32)
    pooled, filled = encoder.pool(frames.contiguous(), torch.tensor([8]))
    assert filled.all()
    assert all(earlier < later for earlier, later in pairwise(pooled[0, :, 0].tolist()))
    assert (pooled[0, :, 0] >= torch.tensor([1.0, 3, 5, 7])).all()
    assert (pooled[0, :, 0] <= torch.tensor([2.0, 4, 6, 8])).all()


@STEMS
def test_loudness_does_not_matter(stem: str) -> None:
    encoder = small(stem=stem).eval()
    sound, lengths = torch.randn(1, 4, 4000), torch.full((1, 4), 4000)
    loud, quiet = encoder(Audio(sound, lengths)), encoder(Audio(sound * 0.01, lengths))
    torch.testing.assert_close(quiet.values, loud.values, atol=1e-2, rtol=1e-2)


@STEMS
def test_gradient_reaches_every_parameter(stem: str) -> None:
    encoder = small(stem=stem)
    tokens = encoder(Audio(torch.randn(2, 4, 6000), torch.full((2, 4), 6000)))
    (tokens.values * torch.randn(32)).pow(3).sum().backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias on keys shifts all scores of a query alike: the softmax takes it away again.
    assert [name for name in missing if not name.endswith("k_proj.bias")] == []


@STEMS
def test_default_size_and_frame(stem: str) -> None:
    encoder = Wav2VecEncoder(stem=stem)  # type: ignore[arg-type]
    assert sum(p.numel() for p in encoder.parameters()) <= 1_000_000
    assert encoder.stride == 160
    shortest = torch.randn(1, encoder.shortest)
    _, lengths = encoder.frames(shortest, torch.tensor([encoder.shortest]))
    assert lengths.tolist() == [1]
    _, lengths = encoder.frames(torch.randn(1, 32_000), torch.tensor([32_000]))
    assert 195 <= int(lengths) <= 200


def test_digital_silence_stays_finite() -> None:
    tokens = small(stem="mel").eval()(Audio(torch.zeros(1, 4, 4000), torch.full((1, 4), 4000)))
    assert tokens.values.isfinite().all()


def test_a_tone_sounds_in_its_own_bins() -> None:
    stem = MelStem()
    time = torch.arange(8000) / 8000
    low, high = ((2 * torch.pi * hz * time).sin()[None] for hz in (200.0, 1200.0))
    assert stem.mel(low).mean(-1).argmax() < stem.mel(high).mean(-1).argmax()


def test_a_wider_band_hears_what_the_default_does_not() -> None:
    hiss = (2 * torch.pi * 3500 * torch.arange(4000) / 8000).sin()[None]
    heard = [MelStem(band_hz=band).mel(hiss).sum() for band in ((80.0, 2500.0), (60.0, 4000.0))]
    assert heard[1] > 100 * heard[0]


@pytest.mark.parametrize("band", [BAND_HZ, (60.0, 4000.0)])
def test_a_warp_of_1_is_torchaudios_own_filter_bank(band: tuple[float, float]) -> None:
    filters = warped_filters(torch.ones(3), band_hz=band)
    torch.testing.assert_close(filters, MelStem(band_hz=band).mel.mel_scale.fb.expand(3, -1, -1), atol=1e-5, rtol=0)


def test_warped_frequencies_rise_from_0_to_half_the_rate() -> None:
    hertz = torch.linspace(0, 4000, 401)
    factors = torch.tensor([0.5, 1 / 1.2, 1.0, 1.1, 1.9])
    got = warped(hertz, factors)
    assert (got.diff() > 0).all()
    torch.testing.assert_close(got[:, [0, -1]], torch.tensor([[0.0, 4000.0]]).expand(5, -1))
    torch.testing.assert_close(got[:, :160], hertz[:160] * factors[:, None])  # plain factors up to 1.6 kHz
    torch.testing.assert_close(got[2], hertz)


def test_a_longer_or_shorter_vocal_tract_sounds_in_the_same_bins() -> None:
    """What warps by a factor hears a voice higher by that factor as it hears the voice without."""
    time = torch.arange(8000) / 8000
    band = (60.0, 4000.0)
    spectrogram = MelStem(band_hz=band).mel.spectrogram
    for factor in (0.85, 1.15):
        plain, other = (spectrogram((2 * torch.pi * hz * time).sin()).mean(-1) for hz in (1500.0, 1500.0 * factor))
        one, same = (warped_filters(torch.tensor([item]), band_hz=band)[0] for item in (1.0, factor))
        assert (plain @ one).argmax() == (other @ same).argmax()
        assert (plain @ one).argmax() != (other @ one).argmax()


def test_sounds_are_warped_in_training_only_and_by_torchs_state_alone() -> None:
    torch.manual_seed(0)
    stem, sounds, lengths = MelStem(warp=0.3), torch.randn(3, 3000), torch.tensor([3000, 2000, 2500])
    plain = MelStem()
    plain.load_state_dict(stem.state_dict())  # a warp is no weight
    assert torch.equal(stem.eval()(sounds, lengths)[0], plain.eval()(sounds, lengths)[0])
    stem.train()
    stem.layers.eval()  # or a batch would have statistics of its own

    def heard(seed: int, sounds: torch.Tensor = sounds) -> torch.Tensor:
        torch.manual_seed(seed)
        return stem(sounds, lengths)[0]

    first = heard(1)
    assert torch.equal(heard(1), first)
    assert all((row != other).any() for row, other in zip(first, heard(2), strict=True))  # each its own factor
    longer = heard(1, torch.cat([sounds.masked_fill(torch.arange(3000) >= lengths[:, None], 9), torch.ones(3, 999)], 1))
    torch.testing.assert_close(longer[:, : first.shape[1]], first, atol=1e-5, rtol=1e-5)
    assert (longer[:, first.shape[1] :] == 0).all()


def test_bad_settings_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"warp must be at least 0 and below 1, got 1.0"):
        small(stem="mel", warp=1.0)
    with pytest.raises(ValueError, match=r"warp 0.2 stretches the spectrum of stem: mel, and stem is 'waveform'"):
        small(warp=0.2)
    with pytest.raises(ValueError, match="width=30, heads=4"):
        small(width=30, heads=4)
    for band in ((100.0, 100.0), (80.0, 4001.0), (-1.0, 90.0)):
        with pytest.raises(ValueError, match=r"band_hz must rise within 0 to 4000, got"):
            small(stem="mel", band_hz=band)
