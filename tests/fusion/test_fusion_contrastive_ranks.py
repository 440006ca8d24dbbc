"""Every contrastive loss over two processes equals that of the whole batch in one, with all gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing

from mm.batch import Padded
from mm.fusion.contrastive import contrastive_mse, info_nce, text_numbers
from mm.fusion.siglip import siglip
from mm.fusion.soft import soft_targets

N, WIDTH, RANKS = 4, 6, 2
VALID = [True, False, True, True, True, True, True, False]
TEXTS = [[5], [6, 7], [5], [8], [5], [9, 5, 6], [6, 7], [5]]  # the longest on the second rank only

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Leaves, Tensor, Tensor | None], Tensor]
LOSSES: dict[str, Loss] = {
    "info_nce": lambda x, valid, _: info_nce(x[0], x[1], scale=x[2], valid=valid),
    "all": lambda x, *_: info_nce(x[0], x[1], scale=x[2]),
    "soft": lambda x, valid, same: info_nce(x[0], x[1], scale=x[2], valid=valid, same=same),
    "alike": lambda x, valid, _: info_nce(
        x[0], x[1], scale=x[2], valid=valid, targets=soft_targets(x[1], share=0.3, valid=valid)
    ),
    "distance": lambda x, valid, _: contrastive_mse(x[0], x[1], scale=x[2], valid=valid),
    "siglip": lambda x, *_: siglip(x[0], x[1], scale=x[2], bias=x[3]),
    "siglip_soft": lambda x, valid, same: siglip(x[0], x[1], scale=x[2], bias=x[3], valid=valid, same=same),
}


def everything() -> tuple[Leaves, Tensor]:
    g = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(N * RANKS, WIDTH, generator=g), dim=-1) for _ in range(2))
    return (first, second, torch.tensor(5.0), torch.tensor(-2.0)), torch.tensor(VALID)


def results(rows: slice) -> dict[str, list[Tensor]]:
    """Loss and gradients of each loss for some rows of the whole batch."""
    given, valid = everything()
    texts = Padded.of(TEXTS[rows])
    same = text_numbers(texts)
    found = {}
    for name, loss in LOSSES.items():
        leaves = (given[0][rows], given[1][rows], given[2], given[3])
        leaves = tuple(item.clone().requires_grad_() for item in leaves)
        value = loss(leaves, valid[rows], same)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        found[name] = [value.detach(), *(torch.zeros(()) if item is None else item for item in gradients)]
    return found


def work(rank: int, path: str, queue: "multiprocessing.SimpleQueue[tuple[int, dict[str, list[list[float]]]]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
    found = results(slice(rank * N, (rank + 1) * N))
    queue.put((rank, {name: [item.tolist() for item in items] for name, items in found.items()}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    path = str(tmp_path_factory.mktemp("ranks") / "store")
    processes = [context.Process(target=work, args=(rank, path, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    got = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [{name: list(map(torch.tensor, items)) for name, items in got[rank].items()} for rank in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_are_one_batch(name: str, both: list[dict[str, list[Tensor]]]) -> None:
    whole = results(slice(None))[name]
    loss, scale, bias = (sum(rank[name][place] for rank in both) / RANKS for place in (0, 3, 4))
    torch.testing.assert_close(loss, whole[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(scale, whole[3], atol=1e-6, rtol=0)
    torch.testing.assert_close(bias, whole[4], atol=1e-6, rtol=0)
    for place in (1, 2):
        rows = torch.cat([rank[name][place] for rank in both]) / RANKS
        torch.testing.assert_close(rows, whole[place], atol=1e-6, rtol=0)


def test_two_processes_are_open_clip(both: list[dict[str, list[Tensor]]]) -> None:
    from open_clip.loss import SigLipLoss  # here: the two processes would import it too

    given, _ = everything()
    leaves = tuple(item.requires_grad_() for item in given)
    theirs = SigLipLoss()(*leaves)
    torch.testing.assert_close(sum(rank["siglip"][0] for rank in both) / RANKS, theirs, atol=1e-6, rtol=0)
    for place, gradient in enumerate(torch.autograd.grad(theirs, leaves[:2]), start=1):
        ours = torch.cat([rank["siglip"][place] for rank in both]) / RANKS
        torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=0)
