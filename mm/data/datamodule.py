"""MultimodalData: a data spec as Lightning loaders that yield (index into the split, batch)."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mm.batch import Batch, Modality, Sample
from mm.data.augment import Mirrored
from mm.data.collate import Rows, collate
from mm.data.readers import INPUTS, TableDataset, open_split, open_words, texts
from mm.data.sounds import ChangedSounds, SoundChanges
from mm.data.spec import Spec, Split, load_spec
from mm.data.text_vocabulary import TextVocabulary
from mm.data.tokenizer import Tokenizer, train_tokenizer

ENCODED_AT_ONCE = 12
"""Studies that frozen encoders see together: a 3-D network's memory grows with each."""

SORTED_BATCHES = 4
"""Batches that are sorted by length together: few enough that their company changes from epoch to epoch."""

log = logging.getLogger(__name__)

Numbered: TypeAlias = tuple[Int[Tensor, " B"], Batch]
"""Which studies of the split a batch holds (to find what was cached of them), and the batch."""


class MultimodalData(LightningDataModule):
    """Loaders over a data spec.

    Attributes:
        spec: The data spec.
        tokenizer: Known after `prepare`.
        texts_only: Set by a task that has the encoders' output cached: no input is rendered or read any more.
    """

    def __init__(
        self,
        *,
        spec: str = "phantom",
        root: str | None = None,
        batch_size: int = 6,
        workers: int = 1,
        inputs: tuple[Modality, ...] = INPUTS,
        rows: tuple[Rows, ...] = ("report", "questions"),
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        tokenizer_studies: int = 1500,
        train_studies: int | None = None,
        val_studies: int | None = None,
        test_studies: int | None = None,
        max_words: int = 64,
        max_text: int = 256,
        mirror: float = 0.0,
        sounds: SoundChanges | None = None,
        held_out: str | None = None,
        seed: int = 0,
    ) -> None:
        """Remembers the settings; reads nothing but the spec.

        Args:
            spec: Name of a shipped data spec or a YAML file.
            root: Takes the place of the spec's own root folder.
            batch_size: Studies a batch.
            workers: Processes that make samples; 0 makes them in the main process.
            inputs: Inputs to give to the model.
            rows: Which texts the decoder learns.
            tokenizer: A tokenizer.json or a checkpoint folder; None: that of `init_from`, else one is trained.
            vocab_size: Of a tokenizer trained here.
            tokenizer_studies: Studies of the training split whose texts a tokenizer is trained on.
            train_studies: Takes the place of the spec's number.
            val_studies: Takes the place of the spec's number.
            test_studies: Takes the place of the spec's number.
            max_words: Longest run of tokens of a record's words.
            max_text: Longest run of tokens of a whole report.
            mirror: Share of the training studies shown as their mirror image, with left and right exchanged in
                texts and truth; those that can't be are left as they are. Not with a cache of encoded inputs.
            sounds: How the sounds of the training studies are changed each time. Not with a cache either.
            held_out: A value of the spec's `group` column, such as one speaker: its rows are the test split, all
                others are trained on.
            seed: Of the order of the training studies.

        Raises:
            ValueError: A number out of range, or whatever is wrong with the spec.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
        if workers < 0:
            raise ValueError(f"data.workers must be at least 0, got {workers}")
        if not 0.0 <= mirror <= 1.0:
            raise ValueError(f"data.mirror must be a share from 0 to 1, got {mirror}")
        self.spec: Spec = load_spec(spec, root=root, held_out=held_out)
        self.batch_size, self.workers, self.inputs, self.rows = batch_size, workers, inputs, rows
        self.tokenizer_path, self.vocab_size, self.tokenizer_studies = tokenizer, vocab_size, tokenizer_studies
        self.studies: dict[Split, int | None] = {"train": train_studies, "val": val_studies, "test": test_studies}
        self.max_words, self.max_text, self.seed = max_words, max_text, seed
        self.mirror, self.sounds = mirror, sounds
        self.texts_only = False
        self._tokenizer: Tokenizer | None = None
        self._texts: TextVocabulary | None = None

    def read_texts_with(self, vocabulary: TextVocabulary) -> None:
        """Splits whole texts with the vocabulary of a pretrained text tower; it goes into the checkpoint."""
        self._texts, self._tokenizer = vocabulary, None

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary; trained on the texts of the training split if none was given."""
        if self._tokenizer is None:
            made = self._make_tokenizer()
            self._tokenizer = made if self._texts is None else made.with_texts(self._texts)
        return self._tokenizer

    def _make_tokenizer(self) -> Tokenizer:
        if self.tokenizer_path is not None:
            path = Path(self.tokenizer_path)
            file = path / "tokenizer.json" if path.is_dir() else path
            if not file.is_file():
                raise ValueError(f"data.tokenizer {str(path)!r}: no such file or checkpoint folder")
            return Tokenizer.load(file)
        made = train_tokenizer(texts(self.spec, studies=self.tokenizer_studies), vocab_size=self.vocab_size)
        log.info("trained a tokenizer of %d ids", made.vocab_size)
        return made

    def dataset(self, split: Split) -> Dataset[Sample]:
        """The samples of a split, in their fixed order."""
        return open_split(self.spec, split, inputs=self.inputs, studies=self.studies[split])

    def words(self, split: Split) -> Dataset[Sample]:
        """The same studies in words only."""
        return open_words(self.spec, split, inputs=self.inputs, studies=self.studies[split])

    def loader(self, split: Split, *, start: int = 0, everything: bool = False) -> DataLoader[Numbered]:
        """Batches of a split: the training split shuffled, the others in order.

        Args:
            split: Which part.
            start: Studies to leave out at the beginning, for work that goes on where it was stopped.
            everything: In order, with inputs and to the last study, whatever split it is: for the cache.
        """
        read = samples = self.words(split) if self.texts_only and not everything else self.dataset(split)
        shuffled = split == "train" and not everything
        if shuffled and self.mirror > 0.0:
            if self.texts_only:
                raise ValueError(f"data.mirror {self.mirror} can't mirror inputs that are cached; set 0 or no cache")
            samples = Mirrored(samples, share=self.mirror)
        if shuffled and self.sounds is not None:
            if self.texts_only:
                raise ValueError("data.sounds can't change inputs that are cached; leave it out, or set no cache")
            samples = ChangedSounds(samples, self.sounds)
        size = len(samples)  # type: ignore[arg-type]  # every dataset of ours is sized
        seconds = read.seconds() if shuffled and isinstance(read, TableDataset) else None
        order: Sampler[int | Drawn] = (
            Shuffled(size, seed=self.seed, batch_size=self.batch_size, seconds=seconds)
            if shuffled
            else Rest(size, start)
        )
        return DataLoader[Numbered](  # the collate function turns pairs of number and sample into it
            NumberedDataset(samples),  # type: ignore[arg-type]
            batch_size=min(self.batch_size, ENCODED_AT_ONCE) if everything else self.batch_size,
            sampler=order,
            num_workers=self.workers,
            collate_fn=partial(
                _collate,
                tokenizer=self.tokenizer,
                rows=self.rows,
                max_words=self.max_words,
                max_text=self.max_text,
            ),
            persistent_workers=self.workers > 0 and not everything,
            drop_last=shuffled and size >= self.batch_size,
        )

    def train_dataloader(self) -> DataLoader[Numbered]:
        """Batches to train on; a resumed run goes on behind the last one it has learnt from."""
        loader = self.loader("train")
        if self.trainer is not None:
            assert isinstance(loader.sampler, Shuffled)
            limit = self.trainer.limit_train_batches
            batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
            done: int = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
            if self.trainer.world_size == 1:
                loader.sampler.go_on(*divmod(done, max(batches, 1)))
            else:  # several ranks share an order that Lightning deals out: it begins anew, with another one
                loader.sampler.seed = hash((self.seed, done))
        return loader

    def val_dataloader(self) -> DataLoader[Numbered]:
        """Batches to validate on."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Numbered]:
        """Batches to test on."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader[Numbered]:
        """Batches to predict: the test split."""
        return self.loader("test")


class Drawn(NamedTuple):
    """A training sample, and the seed of all that is drawn when it is made."""

    study: int
    seed: int


class NumberedDataset(Dataset[tuple[int, Sample]]):
    """Samples with their number in the split."""

    def __init__(self, samples: Dataset[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int | Drawn) -> tuple[int, Sample]:
        """Sample `index`, and the index. A `Drawn` one is the same whichever process makes it, and when."""
        if isinstance(index, int):
            return index, self.samples[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(index.seed)
            return index.study, self.samples[index.study]


class Rest(Sampler[int]):
    """In order, from `start` on."""

    def __init__(self, size: int, start: int = 0) -> None:
        self.size, self.start = size, start

    def __len__(self) -> int:
        """What is left."""
        return max(self.size - self.start, 0)

    def __iter__(self) -> Iterator[int]:
        """The indices."""
        return iter(range(self.start, self.size))


class Shuffled(Sampler[Drawn]):
    """A fresh order each epoch, a function of seed and epoch: what was stopped goes on as if it had not been.

    Args:
        size: Number of studies.
        seed: Of the orders.
        batch_size: Of the batches that are cut from it.
        seconds: How long each study's sound is. Those of a few batches are then dealt out by length, so that little
            of a batch is padding.
    """

    def __init__(self, size: int, *, seed: int, batch_size: int, seconds: Sequence[float] | None = None) -> None:
        self.size, self.seed, self.epoch = size, seed, 0
        self.batch_size, self.seconds = batch_size, seconds
        self._resumed, self._done = -1, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def go_on(self, epoch: int, batches: int) -> None:
        """Begins with this epoch, behind so many batches of it."""
        self.epoch = self._resumed = epoch
        self._done = batches * self.batch_size

    def __len__(self) -> int:
        """Number of studies of a whole epoch."""
        return self.size

    def __iter__(self) -> Iterator[Drawn]:
        """A permutation that depends on seed and epoch, less what is done of it."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        order = torch.randperm(self.size, generator=generator).tolist()
        if self.seconds is not None:
            order = by_length(order, self.seconds, self.batch_size)
        done = self._done if self.epoch == self._resumed else 0
        return iter([Drawn(item, hash((self.seed, self.epoch, item)) % 2**63) for item in order[done:]])


def by_length(order: Sequence[int], seconds: Sequence[float], batch_size: int) -> list[int]:
    """An order whose stretches of `SORTED_BATCHES` whole batches are sorted by length; the rest behind stays."""
    whole = len(order) // batch_size * batch_size
    step = SORTED_BATCHES * batch_size
    stretches = (order[start : min(start + step, whole)] for start in range(0, whole, step))
    return [item for stretch in stretches for item in sorted(stretch, key=seconds.__getitem__)] + list(order[whole:])


def _collate(
    numbered: list[tuple[int, Sample]],
    *,
    tokenizer: Tokenizer,
    rows: tuple[Rows, ...],
    max_words: int,
    max_text: int,
) -> Numbered:
    samples = [sample for _, sample in numbered]
    batch = collate(samples, tokenizer, rows=rows, max_words=max_words, max_text=max_text)
    return torch.tensor([index for index, _ in numbered]), batch
