"""An LSTM over visits (Hochreiter & Schmidhuber 1997): what became of each finding since the priors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class TemporalLSTM(nn.Module):
    """Reads the visits of each finding from the oldest to the current one.

    Args:
        width: Of the evidence that comes in.
        hidden: Of what goes out.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.days = nn.Linear(1, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)

    def forward(
        self, x: Float[Tensor, "B V K D"], *, count: Int[Tensor, " B"], days: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B K H"]:
        """The state after the current visit; zeros for a study without a visit.

        Args:
            x: Evidence of each visit (0 is the current one, then the most recent prior) and finding.
            count: Visits of each study; the rest of V is padding and never read.
            days: Days from each visit to the current one.
        """
        B, V, K, _ = x.shape
        step = torch.arange(V, device=x.device)
        # Step t of a study with c visits is visit c - 1 - t; steps past the end repeat the current visit.
        visit = (count[:, None] - 1 - step).clamp(min=0)
        row = torch.arange(B, device=x.device)[:, None]
        since = days[row, visit].clamp(min=0).log1p()[..., None]
        ordered = x[row, visit] + self.days(since)[:, :, None].to(x.dtype)
        states: Tensor = self.lstm(ordered.transpose(1, 2).flatten(0, 1))[0].view(B, K, V, self.hidden)
        last = states[torch.arange(B, device=x.device), :, (count - 1).clamp(min=0)]
        return last.masked_fill((count == 0)[:, None, None], 0)
