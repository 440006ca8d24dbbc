import math

import pytest
import torch

from mm.decoder.router import Router
from mm.decoder.telemetry import routing_health, visits


def routing(logits):
    """A routing by given logits, one token a row."""
    made = Router(len(logits), num_experts=len(logits[0]), experts_per_token=1, gates="softmax", capacity_factor=1.0)
    with torch.no_grad():
        made.logits.weight.copy_(torch.tensor(logits).T)
    return made(torch.eye(len(logits)))


def test_health_of_a_collapsed_and_of_an_even_router():
    collapsed = routing([[50.0, 0.0, 0.0, 0.0]] * 8)
    even = routing([[9.0 * (expert == token % 4) for expert in range(4)] for token in range(8)])
    health = routing_health([collapsed])
    assert health.load_variation.item() == pytest.approx(math.sqrt(3))
    assert health.dropped.item() == pytest.approx(0.75)
    assert health.dead.item() == 3
    assert health.entropy.item() == pytest.approx(0.0, abs=1e-6)
    health = routing_health([even])
    assert [health.load_variation.item(), health.dropped.item(), health.dead.item()] == [0, 0, 0]
    both = routing_health([collapsed, even])
    assert both.load_variation.item() == pytest.approx(math.sqrt(3) / 2)
    assert both.dead.item() == 3


def test_entropy_is_one_where_the_router_does_not_care():
    assert routing_health([routing([[0.0] * 4] * 3)]).entropy.item() == pytest.approx(1.0)


def test_no_tokens_are_no_trouble():
    made = Router(8, num_experts=4, experts_per_token=2)
    health = routing_health([made(torch.zeros(0, 8))])
    assert health.load_variation.item() == 0
    assert health.dead.item() == 4


def test_visits_count_every_choice_once():
    made = Router(8, num_experts=5, experts_per_token=2)
    result = made(torch.randn(40, 8))
    groups = torch.arange(40) % 3
    counts = visits(result, groups, num_groups=4)
    for group in range(4):
        for expert in range(5):
            assert counts[group, expert].item() == (result.experts[groups == group] == expert).sum().item()
