"""Rows of text: picked and listed as they were given."""

from dataclasses import astuple, replace

import torch

from mm.batch import Padded, Slots, Writing


def test_selected_rows_are_those_rows() -> None:
    three = torch.arange(3)
    texts = [[7, 8], [], [9]]
    kept = Writing(torch.tensor([0, 0, 1]), Slots(*(three + item for item in range(5))), Padded.of(texts), None)
    assert kept.prompt.rows() == texts
    kept = replace(kept, target=Padded.of([[1], [2], [3]]))
    chosen = kept.select(torch.tensor([2, 0]))
    assert chosen.study.tolist() == [1, 0]
    assert [column.tolist() for column in astuple(chosen.slots)] == [[2 + item, item] for item in range(5)]
    assert (chosen.prompt.rows(), chosen.asked) == ([[9], [7, 8]], None)
    assert chosen.target is not None
    assert chosen.target.rows() == [[3], [1]]
    again = replace(kept, asked=kept.prompt).select(three)
    assert again.asked is not None
    assert again.asked.rows() == texts
