"""RecordEncoder: padding, missingness, standardisation, gradients."""

import math

import torch

from mm.batch import Padded, Records
from mm.encoders.record import FARTHEST, RecordEncoder
from mm.ontology import MEASUREMENT_INDEX, MEASUREMENTS

R = len(MEASUREMENTS)


def encoder() -> RecordEncoder:
    torch.manual_seed(0)
    return RecordEncoder(vocab_size=50, width=24, depth=2, heads=2).eval()


def records(words: list[list[int]], *, known: bool = True, present: bool = True) -> Records:
    torch.manual_seed(1)
    B = len(words)
    values = torch.rand(B, R) * 50 + 1
    return Records(values, torch.full((B, R), known), Padded.of(words), torch.full((B,), present))


def test_padding_words_never_change_a_record() -> None:
    network = encoder()
    alone = network(records([[5, 6, 7]]))
    x = records([[5, 6, 7], [1] * 9])
    x.words.values[0, 3:] = 11
    both = network(x)
    torch.testing.assert_close(both.values[0, : R + 3], alone.values[0])
    assert not both.mask[0, R + 3 :].any()
    assert (both.values[0, R + 3 :] == 0).all()


def test_the_number_behind_a_missing_value_is_never_read() -> None:
    network, x = encoder(), records([[5], [6]], known=False)
    other = Records(x.values * math.nan, x.known, x.words, x.present)
    assert torch.equal(network(x).values, network(other).values)


def test_missing_is_not_average() -> None:
    network = encoder()
    average = torch.tensor([[math.exp(item.mean) if item.log else item.mean for item in MEASUREMENTS]])
    words, present = Padded.of([[5]]), torch.tensor([True])
    known = network(Records(average, torch.ones(1, R, dtype=torch.bool), words, present))
    missing = network(Records(average, torch.zeros(1, R, dtype=torch.bool), words, present))
    assert not torch.allclose(known.values, missing.values, atol=1e-3)


def test_values_are_standardised_with_the_ontology_and_clamped() -> None:
    network = encoder()
    values = torch.zeros(1, R)
    values[0, MEASUREMENT_INDEX["temperature"]] = 38.6
    values[0, MEASUREMENT_INDEX["crp"]] = math.exp(2.0 + 1.3)
    values[0, MEASUREMENT_INDEX["age"]] = 1e6
    z = network.standardise(values, torch.ones(1, R, dtype=torch.bool))[0]
    torch.testing.assert_close(z[MEASUREMENT_INDEX["temperature"]], torch.tensor(2.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z[MEASUREMENT_INDEX["crp"]], torch.tensor(1.0), atol=1e-4, rtol=1e-4)
    assert z[MEASUREMENT_INDEX["age"]] == FARTHEST
    assert z.isfinite().all()


def test_a_study_without_a_record_has_no_tokens() -> None:
    tokens = encoder()(records([[5, 6], [7]], present=False))
    assert not tokens.mask.any()
    assert (tokens.values == 0).all()


def test_words_have_an_order_and_measurements_have_values() -> None:
    network = encoder()
    one, other = network(records([[5, 6]])), network(records([[6, 5]]))
    assert not torch.allclose(one.values[:, :R], other.values[:, :R], atol=1e-6)


def test_gradient_reaches_every_parameter() -> None:
    network = encoder()
    x = records([list(range(50))])
    known = torch.arange(R)[None] % 2 == 0
    total = torch.zeros(())
    for mask in (known, ~known):
        tokens = network(Records(x.values, mask, x.words, x.present))
        total = total + (tokens.values * torch.randn(24)).pow(3).sum()
    total.backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
