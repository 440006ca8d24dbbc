"""A plain language model as the engine runs it: keys and values in pages, prompts read without padding."""

from copy import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.batch import Slots, Tokens
from mm.decoder.cache import MemoryKeys
from mm.decoder.language import LanguageModel
from mm.decoder.memory import StepMemory
from mm.decoder.paged import PagedCache, Step, checked_page_size


class PagedLanguageModel:
    """Puts a `LanguageModel` behind the interface that the engine wants (`mm.decoder.engine.PagedDecoder`).

    Prompts of unequal length are read one behind the other, each seeing itself alone, so that no padding is computed
    and a mixture of experts routes real tokens only. With latent attention a page holds what such a model remembers:
    the latent and the turned key of a token, of unequal widths.

    Example:
        engine = Engine(PagedLanguageModel(model), max_sequences=16)
        completions = engine.run([Request(prompt, sampling=Sampling(64)) for prompt in prompts])
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.vocab_size = model, model.config.vocab_size

    def prepared(self) -> "PagedLanguageModel":
        """A twin for generation, see `mm.decoder.prepared`."""
        twin = copy(self)
        twin.model = self.model.prepared()
        return twin

    def paged_cache(self, *, num_blocks: int, page_size: int | None) -> PagedCache:
        """Room for keys and values of all layers; `page_size` None: what suits the device.

        Raises:
            ValueError: The paged kernel on CUDA can't read pages of this size, or knows no sliding window.
        """
        config, device = self.model.config, self.model.embedding.weight.device
        page = checked_page_size(page_size, device=device, window=config.window)
        return PagedCache(config.depth, num_blocks=num_blocks, page_size=page, device=device, context=config.context)

    def remember(self, memory: Tokens) -> tuple[MemoryKeys, ...]:  # noqa: ARG002
        """Nothing: a plain language model reads no memory."""
        return ()

    @torch.no_grad()
    def read(
        self,
        ids: Int[Tensor, " T"],
        cache: PagedCache,
        now: Step,
        *,
        slots: Slots | None,  # noqa: ARG002
        memory: StepMemory,  # noqa: ARG002
    ) -> Float[Tensor, "M V"]:
        """Logits behind each row's last new token; the past lies in pages."""
        model = self.model
        # Of a prompt's last layer nothing is needed behind the attention but the last token.
        hidden, _ = model._run(  # noqa: SLF001  # one of the few places that run these layers
            model.embedding(ids)[None],
            mask=now.mask(window=model.config.window),
            positions=now.positions[None],
            caches=cache.bind(now),
            kept=None if now.reads is None else now.last,
        )
        return model.logits(hidden[0])
