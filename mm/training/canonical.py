"""The canonical head's part of a stage on frozen towers: fitted in closed form before the first step."""

import logging

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mm.batch import Padded, Sample, Tokens
from mm.data.collate import collate
from mm.data.datamodule import MultimodalData
from mm.model import MultimodalModel
from mm.training.cache import Cache
from mm.training.text_memory import TextMemory

log = logging.getLogger(__name__)

AT_ONCE = 256
"""Studies that are read together."""


def fit_canonical(model: MultimodalModel, cache: Cache, data: MultimodalData) -> None:
    """Fits the head to the pairs of image and text of the training split.

    Args:
        model: With `canonical`; its towers are in evaluation mode.
        cache: What the encoders said of the training split.
        data: Its texts; of several captions of an image one is drawn.

    Raises:
        ValueError: See `CanonicalHead.fit`.
    """
    assert model.canonical is not None
    assert model.text is not None
    device = next(model.parameters()).device
    samples: Dataset[Sample] = data.words("train")
    remember = TextMemory()
    values, masks, sentences, ids = list[Tensor](), list[Tensor](), list[Tensor](), list[list[int]]()
    for start in range(0, len(cache), AT_ONCE):
        index = torch.arange(start, min(start + AT_ONCE, len(cache)))
        some = [samples[item] for item in index.tolist()]
        images = cache.select(index, device).tokens.image
        text = collate(some, data.tokenizer, rows=(), max_text=data.max_text).text
        if images is None or text is None:
            continue
        text = text.to(device)
        both = (images.mask.any(1) & (text.lengths > 0)).nonzero()[:, 0]
        text = text.select(both)
        values.append(images.values[both])
        masks.append(images.mask[both])
        sentences.append(remember(model.text, text))
        ids += text.rows()
    if not ids:
        raise ValueError("canonical correlations need images with reports or captions; the training split has none")
    model.canonical.fit(Tokens(torch.cat(values), torch.cat(masks)), torch.cat(sentences), Padded.of(ids).to(device))
    log.info("canonical head: %d pairs, %d distinct texts", len(ids), len(remember))
