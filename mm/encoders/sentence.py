"""BERT as a sentence encoder: MiniLM and its like, with weights from a local folder in the layout of transformers.

Devlin et al., "BERT" (NAACL 2019); Reimers and Gurevych, "Sentence-BERT" (EMNLP 2019): the vector of a text is the
mean of its tokens. Wang et al., "MiniLM" (NeurIPS 2020). Used for retrieval; reports are written by the decoder.
"""

import json
import re
from pathlib import Path
from typing import Any, Final, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.attention import Keys, attend
from mm.batch import Padded, Tokens
from mm.encoders.base import TextTower
from mm.encoders.shared import init_weights
from mm.encoders.weights import fill, read_weights

Pooling = Literal["mean", "first"]

_FILES: Final = ("model.safetensors", "pytorch_model.bin")
_LAYER: Final = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attended",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}
"""Parts of a layer, as transformers and as this module calls them."""


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by its norm as BERT has it.

    Args:
        width: Of tokens.
        heads: Number of heads.
        hidden: Of the feed-forward.
        eps: Of the layer norms.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attended = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Float[Tensor, "M L D"], mask: Keys) -> Float[Tensor, "M L D"]:
        """Tokens that have read each other."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        x = self.attended(x + self.out(attend(q, k, v, mask=mask).flatten(2)))
        return self.norm(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class SentenceEncoder(TextTower):
    """Texts to vectors by BERT.

    Args:
        weights: Folder in the layout of transformers: config.json, model.safetensors (or pytorch_model.bin) and a
            WordPiece vocabulary, with which its texts are then split. Its sizes take the place of those below.
        vocab_size: Ids that it has room for.
        width: Of tokens and of the vector.
        depth: Number of layers.
        heads: Number of heads.
        hidden: Of the feed-forward.
        context_length: Longest text in ids; a longer one is cut.
        eps: Of the layer norms.
        pooling: "mean" of the tokens or the "first" one.

    Raises:
        ValueError: No such folder, one of another kind of network, or sizes that make none.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        vocab_size: int = 30522,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        context_length: int = 256,
        eps: float = 1e-12,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "vocab_size": vocab_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "hidden": hidden,
            "context_length": context_length,
            "eps": eps,
            "pooling": pooling,
        }
        given: dict[str, Tensor] = {}
        if weights is not None:
            given = _ours(_read(Path(weights)))
            sizes = read_sizes(Path(weights), given)
        self.sizes = sizes
        self.vocab_size, self.context_length = int(sizes["vocab_size"]), int(sizes["context_length"])
        self.width = self.token_width = int(sizes["width"])
        if self.width % int(sizes["heads"]):
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {sizes['heads']}")
        self.pooling: Pooling = sizes["pooling"]
        self.word = nn.Embedding(self.vocab_size, self.width)
        self.places = nn.Embedding(self.context_length, self.width)
        self.embedded = nn.LayerNorm(self.width, eps=float(sizes["eps"]))
        self.layers = nn.ModuleList(
            Layer(self.width, int(sizes["heads"]), int(sizes["hidden"]), eps=float(sizes["eps"]))
            for _ in range(int(sizes["depth"]))
        )
        self.apply(init_weights)
        if weights is not None:
            self.texts_from = weights
            given["places.weight"] = given["places.weight"][: self.context_length]
            fill(self, given, path=weights)

    def tokens(self, x: Padded) -> Tokens:
        """Every token behind the last layer; zeros where there is none."""
        ids, mask = x.values[:, : self.context_length], x.mask[:, : self.context_length]
        values = self.embedded(self.word(ids) + self.places.weight[: ids.shape[1]])
        for layer in self.layers:
            values = layer(values, Keys(mask))
        return Tokens(values.masked_fill(~mask[..., None], 0), mask)

    def pool(self, tokens: Tokens) -> Float[Tensor, "M D"]:
        """The vector of each text from its tokens; an empty text's are zeros."""
        if self.pooling == "first":
            return tokens.values[:, 0]
        return tokens.values.sum(1) / tokens.mask.sum(1, keepdim=True).clamp(min=1)

    def sealed(self) -> dict[str, Any]:
        """Arguments that make the same network without the folder."""
        return {"weights": None, **self.sizes}


def read_sizes(folder: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Sizes of a folder's network: by its weights' shapes, so that none can ask for more than is there.

    What shapes don't tell is read from config.json and, where it is a sentence encoder's, from 1_Pooling.

    Args:
        folder: In the layout of transformers.
        weights: Of it, with our names.

    Raises:
        ValueError: It isn't BERT's, or something is missing or absurd.
    """
    config, where = _json(folder / "config.json"), f"weights {str(folder)!r}"
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{where}: {key} must be {value!r}, got {str(config[key])[:40]!r}")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    numbers = {int(name.split(".")[1]) for name in shapes if name.startswith("layers.")}
    tables = [shapes.get(name, ()) for name in ("word.weight", "places.weight", "layers.0.up.weight")]
    if any(len(shape) != 2 for shape in tables) or numbers != set(range(len(numbers))):
        raise ValueError(f"{where} has no BERT in it: words, places or layers are missing")
    (vocab_size, width), (places, _), (hidden, _) = tables
    heads, eps = config.get("num_attention_heads"), config.get("layer_norm_eps", 1e-12)
    if type(heads) is not int or not 0 < heads <= width or width % heads:
        raise ValueError(f"{where}: num_attention_heads must divide {width}, got {str(heads)[:40]!r}")
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise ValueError(f"{where}: layer_norm_eps must be a small number, got {str(eps)[:40]!r}")
    return {
        "vocab_size": vocab_size,
        "width": width,
        "depth": len(numbers),
        "heads": heads,
        "hidden": hidden,
        "context_length": _longest(folder, places),
        "eps": float(eps),
        "pooling": _pooling(folder),
    }


def _pooling(folder: Path) -> Pooling:
    file = folder / "1_Pooling" / "config.json"
    said = _json(file) if file.is_file() else {"pooling_mode_mean_tokens": True}
    modes = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on]
    if modes not in (["mean_tokens"], ["cls_token"]):
        raise ValueError(f"weights {str(folder)!r}: pooling must be by mean_tokens or cls_token, got {modes}")
    return "mean" if modes == ["mean_tokens"] else "first"


def _longest(folder: Path, places: int) -> int:
    """Longest text: what sentence-transformers cuts at, else as many ids as have a place."""
    file = folder / "sentence_bert_config.json"
    cut = _json(file).get("max_seq_length") if file.is_file() else None
    if cut is None:
        return places
    if type(cut) is not int or cut < 2:
        raise ValueError(f"weights {str(folder)!r}: max_seq_length must be 2 or more, got {str(cut)[:40]!r}")
    return min(cut, places)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"weights {str(path.parent)!r}: {path.name} is missing or no JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"weights {str(path.parent)!r}: {path.name} must be a JSON object")
    return content


def _read(folder: Path) -> dict[str, Tensor]:
    for name in _FILES:
        if (folder / name).is_file():
            return read_weights(folder / name)
    raise ValueError(f"weights {str(folder)!r} must hold one of {', '.join(_FILES)}")


def _ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names to ours. All text is of BERT's first kind, whose embedding goes into that of the places."""
    theirs = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    made: dict[str, Tensor] = {}
    names = {"embeddings.word_embeddings": "word", "embeddings.LayerNorm": "embedded"}
    kinds = theirs.get("embeddings.token_type_embeddings.weight")
    for name, tensor in theirs.items():
        part, _, last = name.rpartition(".")
        last = {"gamma": "weight", "beta": "bias"}.get(last, last)  # as the first release of BERT has them
        if name == "embeddings.position_embeddings.weight":
            made["places.weight"] = tensor if kinds is None else tensor.float() + kinds[0].float()
        elif part in names:
            made[f"{names[part]}.{last}"] = tensor
        elif found := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", part):
            made[f"layers.{found[1]}.{_LAYER.get(found[2], found[2])}.{last}"] = tensor
        elif not name.startswith(("pooler.", "cls.", "embeddings.position_ids", "embeddings.token_type_embeddings")):
            made[name] = tensor  # has no place: `fill` will say so
    return made
