"""InfoNCE over several processes equals that of the whole batch in one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from mm.fusion.contrastive import info_nce

N, WIDTH, RANKS = 4, 6, 2


def everything() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(N * RANKS, WIDTH, generator=g), dim=-1) for _ in range(2))
    return first, second, torch.tensor([True, False, True, True, True, True, True, False])


def work(rank: int, path: str, results: "multiprocessing.SimpleQueue[tuple[int, float, list[list[float]]]]") -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
    first, second, valid = (item[rank * N : (rank + 1) * N] for item in everything())
    first = first.clone().requires_grad_()
    loss = info_nce(first, second, scale=5.0, valid=valid)
    loss.backward()
    results.put((rank, loss.item(), first.grad.tolist()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_are_each_others_negatives(tmp_path: object) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=work, args=(rank, f"{tmp_path}/store", results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    got = sorted(results.get() for _ in processes)
    for process in processes:
        process.join()
    first, second, valid = everything()
    first.requires_grad_()
    whole = info_nce(first, second, scale=5.0, valid=valid)
    whole.backward()
    assert sum(loss for _, loss, _ in got) / RANKS == pytest.approx(whole.item(), abs=1e-6)
    gradient = torch.cat([torch.tensor(rows) for _, _, rows in got]) / RANKS
    assert torch.allclose(gradient, first.grad, atol=1e-6)
