"""Text to one vector: open_clip's text transformer, in a size of our own or any of open_clip's by name.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021). Used for
contrastive alignment only; reports are written by the decoder.
"""

import json
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from mm.batch import Padded, Tokens
from mm.encoders.base import TextTower
from mm.encoders.clip import architecture as read_architecture
from mm.encoders.clip import tower


class TextEncoder(TextTower):
    """Transformer, causal in our sizes; the vector is read at the last token, as CLIP does at the end-of-text token.

    Args:
        vocab_size: Of the tokenizer.
        width: Of tokens.
        depth: Number of blocks.
        heads: Number of heads.
        context_length: Longest text in tokens; a longer one is cut.
        name: An open_clip model whose text tower to take; None for one of the sizes above, which it replaces.
        pretrained: Tag of open_clip weights for `name` (a download); None for random weights.
        weights: A file with the weights of `name` (safetensors, or torch.save of a state dict), or a folder with
            open_clip_config.json and weights. Texts are then split with open_clip's own vocabulary.
        architecture: open_clip's configuration as JSON: what a checkpoint keeps of a folder.

    Raises:
        ValueError: See `mm.encoders.clip.architecture`.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 2048,
        width: int = 96,
        depth: int = 3,
        heads: int = 3,
        context_length: int = 256,
        name: str | None = None,
        pretrained: str | None = None,
        weights: str | None = None,
        architecture: str | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        if name is None and weights is None and architecture is None:
            if pretrained is not None:
                raise ValueError(f"pretrained={pretrained!r} needs the name of an open_clip model, got name=None")
            network = TextTransformer(
                context_length=context_length,
                vocab_size=vocab_size,
                width=width,
                heads=heads,
                layers=depth,
                output_dim=None,
                pool_type="none",
            )
        elif pretrained is not None:
            if weights is not None or name is None:
                raise ValueError(f"give pretrained (a download) or weights (local), got {pretrained!r} and {weights!r}")
            read_architecture("text", name=name, weights=None, given=None)
            network = open_clip.create_model(name, pretrained=pretrained, force_custom_text=True).text
        else:
            config, _ = read_architecture("text", name=name, weights=weights, given=architecture)
            network = tower("text", config, weights=weights)
            if name is None:
                self.architecture = json.dumps(config, sort_keys=True)
        assert isinstance(network, TextTransformer)
        if weights is not None or pretrained is not None:
            self.texts_from = "open_clip"
        self.network = network
        self.context_length = int(network.context_length)
        self.vocab_size = int(network.vocab_size)
        self.width = int(network.output_dim if network.text_projection is not None else network.width)
        self.token_width = int(network.width)

    def tokens(self, x: Padded) -> Tokens:
        """Every token after the last layer norm, of the transformer's own width."""
        ids, mask = x.values[:, : self.context_length], x.mask[:, : self.context_length]
        network, length, seen = self.network, ids.shape[1], None
        if network.attn_mask is None:
            # It reads to both sides, and was trained on rows that zeros fill up to their longest.
            ids = F.pad(ids.masked_fill(~mask, 0), (0, self.context_length - length))
        else:
            # On the left of the diagonal of the causal mask there is no padding: right-padded rows need no other.
            seen = network.attn_mask[:length, :length]
        values = network.token_embedding(ids) + network.positional_embedding[: ids.shape[1]]
        return Tokens(network.ln_final(network.transformer(values, attn_mask=seen))[:, :length], mask)

    def pool(self, tokens: Tokens) -> Float[Tensor, "M D"]:
        """The vector of each text from its tokens; an empty text's are zeros."""
        lengths = tokens.mask.sum(1)
        rows = torch.arange(len(lengths), device=lengths.device)
        last = tokens.values[rows, (lengths - 1).clamp(min=0)].masked_fill((lengths == 0)[:, None], 0)
        projection = self.network.text_projection
        if projection is None:
            return last
        projected = projection(last) if isinstance(projection, nn.Linear) else last @ projection
        return cast("Tensor", projected)

    def sealed(self) -> dict[str, Any]:
        """Arguments that make the same network without the file or folder."""
        return {"weights": None, "pretrained": None, "architecture": self.architecture}
