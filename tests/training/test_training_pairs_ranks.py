"""Two processes whose batches hold different pairs compute the losses, and the gradients, of one batch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing

from mm.batch import Batch, BySource, Padded
from mm.encoded import Encoded
from mm.fusion.alignment import CrossModalAlignment
from mm.model import MultimodalModel
from mm.training.pairs import PairLosses

B, E, RANKS = 3, 5, 2
HAS = {"volume": [1, 0, 1, 0, 0, 0], "image": [1, 1, 0, 0, 1, 1], "audio": [0, 0, 0, 1, 1, 0]}
TEXTS = [[5], [6], [5], [6, 7, 8], [], [5]]


def losses(rows: slice) -> tuple[dict[str, float], list[Tensor]]:
    """Losses by name, and gradients of text, scale, bias and each modality; what a batch lacks isn't in it at all."""
    g = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(B * RANKS, E, generator=g), dim=-1)[rows].requires_grad_()
    embeddings = {}
    for source, there in HAS.items():
        values = F.normalize(torch.randn(B * RANKS, E, generator=g), dim=-1) * torch.tensor(there)[:, None]
        embeddings[source] = values[rows].requires_grad_()
    present = {source: item for source, item in embeddings.items() if bool(item.detach().any())}
    encoded = Encoded(len(text), BySource(), BySource(), embeddings=BySource(**present))
    torch.manual_seed(0)
    model, pairs = MultimodalModel(fusion=CrossModalAlignment(8, heads=2)), PairLosses(loss="siglip", lambda2=0.5)
    found = pairs(model, encoded, pairs.partners(Batch(len(text), text=Padded.of(TEXTS[rows]))), text)
    leaves = [model.logit_scale.log_scale, pairs.bias.bias, text, *embeddings.values()]
    total = torch.stack(list(found.values())).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    pairs_of = [torch.zeros_like(leaf) if item is None else item for leaf, item in zip(leaves, gradients, strict=True)]
    return {name: item.item() for name, item in found.items()}, pairs_of


def work(
    rank: int, path: str, queue: "multiprocessing.SimpleQueue[tuple[int, dict[str, float], list[object]]]"
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
    found, gradients = losses(slice(rank * B, (rank + 1) * B))
    queue.put((rank, found, [item.tolist() for item in gradients]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_one_process_lacks_is_no_row_there(tmp_path: object) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=work, args=(rank, f"{tmp_path}/store", queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    got = sorted((queue.get() for _ in processes), key=lambda item: item[0])
    for process in processes:
        process.join()
    found, gradients = losses(slice(None))
    assert set(found) == {"volume_text", "image_text", "audio_text", "volume_image"}
    for name, value in found.items():
        assert sum(rank[1][name] for rank in got) / RANKS == pytest.approx(value, abs=1e-6)
    for place, gradient in enumerate(gradients):
        parts = [torch.tensor(rank[2][place]) for rank in got]
        ours = (torch.cat(parts) if gradient.ndim else sum(parts)) / RANKS
        torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=0)
