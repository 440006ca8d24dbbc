"""Balance without an auxiliary loss: a bias on the choice, moved after each step."""

import torch
from jaxtyping import Float
from torch import Tensor

from mm.decoder.router import Router


@torch.no_grad()
def balance(router: Router, load: Float[Tensor, " E"], *, rate: float = 1e-3) -> None:
    """Makes busy experts a little less eligible and idle ones a little more (Wang et al. 2024; DeepSeek-V3).

    Call it after the optimizer's step with the load of that whole step: averaged over accumulated batches and over
    processes.

    Args:
        router: Made with `selection_bias=True`.
        load: Share of the choices that each expert got, `Routing.load`.
        rate: Step of the bias, in units of the scores.

    Raises:
        ValueError: The router has no bias, or the rate is negative.
    """
    if router.selection_bias is None:
        raise ValueError("balance needs a router made with selection_bias=True, got one without")
    if rate < 0:
        raise ValueError(f"rate must not be negative, got {rate}")
    router.selection_bias += rate * (load.mean() - load).sign()
