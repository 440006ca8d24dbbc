"""`mm fit|validate|test|predict`: LightningCLI over the tasks, with recipes found by name and closed imports."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace, get_loader, set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

import mm
from mm.data.check import group_leaks
from mm.data.check_text import leak_line
from mm.data.datamodule import MultimodalData
from mm.data.index import rows_by_split
from mm.data.spec import Split, TableSpec
from mm.data.text_vocabulary import open_vocabulary
from mm.decoder.writing import WritingModel
from mm.errors import USER_ERRORS, one_line, tell
from mm.files import write_atomically
from mm.training import checkpoint
from mm.training.align import AlignTask
from mm.training.allocator import keep_freed_memory
from mm.training.answer import AnswerTask
from mm.training.findings import FindingsTask
from mm.training.history import HistoryTask
from mm.training.joint import JointTask
from mm.training.precision import affordable
from mm.training.rebuild import check_vocabulary
from mm.training.resume import AtomicCheckpointIO, StepCheckpoint
from mm.training.small import SmallTask
from mm.training.task import Task
from mm.training.write import WriteTask
from mm.trust import restrict_imports

log = logging.getLogger(__name__)

TASKS = (FindingsTask, SmallTask, HistoryTask, AlignTask, WriteTask, AnswerTask, JointTask)
"""Named in YAML by class name alone, because they are imported here."""
VERBS = ("fit", "validate", "test", "predict")
_LOAD = get_loader("yaml")


def main(arguments: Sequence[str]) -> int:
    """Runs one of Lightning's verbs.

    Args:
        arguments: The words behind `mm`, the verb first.

    Returns:
        0 done, 2 usage, configuration, or a folder that can't be written (one line on stderr says what, where and
        what would be accepted).
    """
    _quieten()
    keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are forked behind it
    try:
        words, trust = prepare(arguments)
        restrict_imports(trust)
        cli = TrainingCLI.make(words)
        cli.check()
        cli.run()
    except (ArgumentError, *USER_ERRORS) as error:
        parsed = isinstance(error, ArgumentError | ValueError)
        said = one_line(str(error), classes=(Trainer, MultimodalData)) if parsed else tell(error)
        sys.stderr.write(f"mm {arguments[0] if arguments else ''}: {said}\n")
        return 2
    return 0


def _read_word(text: str) -> Any:
    """YAML, and Python's word for null: on its way to a class within a class the parser writes `null` so."""
    return None if text == "None" else _LOAD(text)


def _quieten() -> None:
    """Our own progress is logged; Lightning's tips, and warnings about its own insides, are not."""
    logging.getLogger("mm").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")  # frozen on purpose
    warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than the logging interval")


def prepare(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--trust PKG` out of the words and turns the recipe behind `-c` into its path.

    Raises:
        ValueError: A word is missing behind either, or there is no such recipe.
    """
    words: list[str] = []
    trust: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in ("-c", "--config", "--trust"):
            words.append(name + equals + value)
            continue
        if not equals:
            if not rest:
                raise ValueError(f"{name} takes {'a package' if name == '--trust' else 'a recipe or a YAML file'}")
            value = rest.pop(0)
        if name == "--trust":
            trust.append(value)
        else:
            words += ["--config", str(mm.shipped(value))]
    return words, trust


class TrainingCLI(LightningCLI):
    """LightningCLI that parses and makes everything first, so that mistakes are found before anything runs."""

    @classmethod
    def make(cls, words: list[str]) -> "TrainingCLI":
        """Parses the words and makes trainer, task and data."""
        set_loader("yaml", _read_word, exceptions=(yaml.YAMLError,))
        strict: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
        return cls(
            Task,
            MultimodalData,
            subclass_mode_model=True,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={**strict, **{verb: dict(strict) for verb in VERBS}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=words,
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:  # Lightning's signature
        """Parses the given words and nothing else."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Makes data, task and trainer; the task learns its model's configuration."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        given = self._get(self.config, "model").init_args.get("model")
        if given is not None:
            self.model.model_config = plain(given)
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # Lightning's signature
        """Adds what a run must have to be resumed: atomic files, and one every few minutes."""
        config = self._get(self.config_init, "trainer")
        root = Path(config.get("default_root_dir") or "runs")
        config.precision = affordable(config.precision, accelerator=str(config.accelerator))
        callbacks = list(config.get("callbacks") or [])
        if self.subcommand == "fit" and not any(isinstance(item, ModelCheckpoint) for item in callbacks):
            callbacks.append(
                StepCheckpoint(
                    dirpath=root / "resume",
                    filename="{step}",
                    save_last=True,
                    save_top_k=1,
                    train_time_interval=timedelta(minutes=5),
                )
            )
        plugins = [AtomicCheckpointIO(), *(config.get("plugins") or [])]
        config.callbacks = callbacks
        return super().instantiate_trainer(plugins=plugins, default_root_dir=str(root), **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: `run` starts it, once all is checked."""

    def check(self) -> None:
        """Finds mistakes in the data before training starts.

        Raises:
            ValueError: The data set or the tokenizer can't be opened, or the vocabulary doesn't fit the model.
        """
        data: MultimodalData = self.datamodule
        if data.tokenizer_path is None and self.model.init_from is not None:
            data.tokenizer_path = str(checkpoint.find(self.model.init_from))
        decoder = self.model.model.decoder
        if data.tokenizer_path is None and isinstance(decoder, WritingModel):
            data.tokenizer_path = decoder.vocabulary
        text = self.model.model.text
        if text is not None and text.texts_from is not None:
            data.read_texts_with(open_vocabulary(text.texts_from, limit=text.context_length))
        check_vocabulary(self.model.model, data.tokenizer.vocab_size, texts=data.tokenizer.texts_size)
        splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for split in splits.get(str(self.subcommand), ("test",)):
            if split != "val" or self.subcommand == "validate" or self.trainer.limit_val_batches:
                data.dataset(split)
        if self.subcommand == "fit" and isinstance(data.spec, TableSpec):
            for leak in group_leaks(data.spec, rows_by_split(data.spec)):
                log.warning("%s; unless that is meant, see mm data check", leak_line("groups", leak))

    def run(self) -> None:
        """Runs the verb; `fit` ends with a validation, calibration and the checkpoint folder, `predict` with a file."""
        verb: Callable[..., Any] = getattr(self.trainer, str(self.subcommand))
        result = verb(**self._prepare_subcommand_kwargs(str(self.subcommand)))
        if self.subcommand == "predict" and self.trainer.is_global_zero:
            file = Path(self.trainer.default_root_dir) / "predictions.jsonl"
            write_predictions(file, [findings for batch in result for findings in batch])
            log.info("written to %s", file)
        if self.subcommand != "fit" or self.trainer.interrupted:
            return
        steps = self.trainer.global_step
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            self.model.seal()
            folder = Path(self.trainer.default_root_dir) / "checkpoint"
            identity = self.model.export(folder, self.datamodule)
            log.info("%s after %d steps, written to %s", identity, steps, folder)


def write_predictions(path: Path, predictions: Sequence[list[dict[str, Any]]]) -> None:
    """A line of JSON a study, in the order of the test split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"study": number, "findings": findings} for number, findings in enumerate(predictions))
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))


def plain(value: Any) -> Any:
    """A parsed configuration as JSON: namespaces become dicts, tuples lists, paths strings."""
    if isinstance(value, Namespace):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
