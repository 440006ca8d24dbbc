"""Text to one vector: open_clip's text transformer, in a size of our own or any of open_clip's by name.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021). Used for
contrastive alignment only; reports are written by the decoder.
"""

from typing import cast

import open_clip
import torch
from jaxtyping import Float
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from mm.batch import Padded, Tokens


class TextEncoder(nn.Module):
    """Causal transformer; the vector is read at the last token, as CLIP reads it at the end-of-text token.

    Args:
        vocab_size: Of the tokenizer.
        width: Of tokens.
        depth: Number of blocks.
        heads: Number of heads.
        context_length: Longest text in tokens; a longer one is cut.
        name: An open_clip model whose text tower to take; None for one of the sizes above, which it replaces.
        pretrained: Tag of open_clip weights for `name` (a download); None for random weights.

    Attributes:
        width: Width of the vector.
    """

    width: int

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
    ) -> None:
        super().__init__()
        if name is None:
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
        else:
            network = _named(name, pretrained)
        self.network = network
        self.context_length = int(network.context_length)
        self.vocab_size = int(network.vocab_size)
        self.width = int(network.output_dim if network.text_projection is not None else network.width)

    def tokens(self, x: Padded) -> Tokens:
        """Every token after the last layer norm, of the transformer's own width."""
        ids = x.values[:, : self.context_length]
        length = ids.shape[1]
        network = self.network
        values = network.token_embedding(ids) + network.positional_embedding[:length]
        # On the left of the diagonal of the causal mask there is no padding: right-padded rows need no other.
        values = network.ln_final(network.transformer(values, attn_mask=network.attn_mask[:length, :length]))
        return Tokens(values, x.mask[:, :length])

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

    def forward(self, x: Padded) -> Float[Tensor, "M D"]:
        """One vector a text."""
        return self.pool(self.tokens(x))


def _named(name: str, pretrained: str | None) -> TextTransformer:
    if name not in open_clip.list_models():
        raise ValueError(f"name must be one of open_clip's models (open_clip.list_models()), got {name!r}")
    config = open_clip.get_model_config(name) or {}
    if "hf_model_name" in config.get("text_cfg", {}):  # its tower would be fetched from the network
        raise ValueError(f"name must be an open_clip model with a text transformer of its own, got {name!r}")
    device = torch.get_default_device()  # open_clip would move a model that has no memory yet
    network = open_clip.create_model(name, pretrained=pretrained, force_custom_text=True, device=device).text
    if not isinstance(network, TextTransformer) or network.attn_mask is None or network.cls_emb is not None:
        raise ValueError(f"name must be an open_clip model with a causal text transformer of its own, got {name!r}")
    return network
