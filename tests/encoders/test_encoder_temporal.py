"""TemporalLSTM: padding visits are never read, order and days matter, gradients."""

import math

import torch

from mm.encoders.shared import init_weights
from mm.encoders.temporal import TemporalLSTM


def visits() -> tuple[TemporalLSTM, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return TemporalLSTM(6, 5), torch.randn(3, 4, 2, 6), torch.tensor([[0.0, 30, 200, 900]]).repeat(3, 1)


def test_padding_visits_are_never_read() -> None:
    lstm, x, days = visits()
    count = torch.tensor([4, 2, 0])
    expected = lstm(x, count=count, days=days)
    unused = torch.arange(4) >= count.clamp(min=1)[:, None]
    x[unused], days[unused] = math.nan, math.nan
    got = lstm(x, count=count, days=days)
    assert torch.equal(got, expected)
    assert (got[2] == 0).all()
    shorter = lstm(x[1:2, :2], count=count[1:2], days=days[1:2, :2])
    torch.testing.assert_close(got[1:2], shorter)


def test_it_is_an_lstm_from_oldest_to_current() -> None:
    lstm, x, days = visits()
    got = lstm(x[:1], count=torch.tensor([3]), days=days[:1])
    steps = [x[0, visit, 1] + lstm.days(days[0, visit].log1p()[None]) for visit in (2, 1, 0)]
    expected, _ = lstm.lstm(torch.stack(steps)[None])
    torch.testing.assert_close(got[0, 1], expected[0, -1])


def test_days_and_order_matter() -> None:
    lstm, x, days = visits()
    count = torch.full((3,), 2)
    one = lstm(x, count=count, days=days)
    assert not torch.allclose(one, lstm(x, count=count, days=days * 5))
    assert not torch.allclose(one, lstm(x[:, [1, 0, 2, 3]], count=count, days=days))


def test_one_visit_is_enough_and_gradient_reaches_every_parameter() -> None:
    lstm, x, days = visits()
    assert lstm(x[:, :1], count=torch.ones(3, dtype=torch.long), days=days[:, :1]).abs().sum() > 0
    lstm(x, count=torch.tensor([4, 2, 1]), days=days).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lstm.parameters())


def test_it_runs_under_bfloat16_autocast() -> None:
    lstm, x, days = visits()
    count = torch.tensor([4, 2, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lstm(x.bfloat16(), count=count, days=days)
        out.float().square().sum().backward()
    torch.testing.assert_close(out.float(), lstm(x, count=count, days=days), atol=3e-2, rtol=3e-2)


def test_initialisation_is_small_and_without_bias() -> None:
    layer = torch.nn.Linear(4, 4)
    layer.apply(init_weights)
    assert layer.weight.abs().max() <= 0.06
    assert (layer.bias == 0).all()
