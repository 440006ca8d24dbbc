"""What every stage of training shares: the model, where it starts from, which parts learn, optimizer and export."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from mm.data.datamodule import MultimodalData, Numbered
from mm.data.spec import describe, procedural
from mm.model import MultimodalModel
from mm.report.schema import Kind
from mm.training import checkpoint
from mm.training.ema import MovingAverage
from mm.training.layer_rates import layer_rates
from mm.training.optim import adamw, progress, warmup_cosine
from mm.training.parts import learning, top_names
from mm.training.resume import not_finite

log = logging.getLogger(__name__)


class Task(LightningModule, ABC):
    """One stage of training a `MultimodalModel`.

    Attributes:
        trains: Parts of the model, or parts of these, that learn in this stage; all others are frozen and stay in
            evaluation mode.
        model: The model.
        model_config: `class_path` and `init_args` of it, for the checkpoint folder.
    """

    trains: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *,
        model: MultimodalModel | None = None,
        init_from: str | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        freeze: tuple[str, ...] = (),
        unfreeze: tuple[str, ...] = (),
        layer_decay: float = 1.0,
        ema: float = 0.0,
        name: str = "mm",
        description: str = "",
        kind: Kind | None = None,
    ) -> None:
        """Makes the model, or takes it from an earlier stage.

        Args:
            model: None: the model of `init_from`, with its sizes and weights.
            init_from: Checkpoint folder of an earlier stage. With `model` given as well, its weights are filled in
                by name; what it doesn't have stays as it was made and is listed in the log.
            learning_rate: At the top of the schedule.
            weight_decay: Of matrices and kernels.
            warmup_steps: Optimizer steps until the full learning rate.
            freeze: Parts that this stage would train but shall not.
            unfreeze: Modules, by dotted name, that this stage wouldn't train but shall: `image` or
                `image.network.blocks.4`.
            layer_decay: Learning rate of a tower's block by that of the next, see `mm.training.layer_rates`.
            ema: Decay of a moving average of the weights that is validated and exported in their place; 0 for none.
            name: Of the model, for its card.
            description: Of the model, for its card; empty: that of `init_from`.
            kind: Of the model, for its card. None: that of `init_from` while every stage saw nothing but procedural
                patients, else "trained".

        Raises:
            ValueError: Neither `model` nor `init_from`, or they don't fit together, or an unknown part, or a number
                out of range.
        """
        super().__init__()
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {ema}")
        self.init_from = init_from
        self.model_config: dict[str, Any] = {}
        self.earlier: checkpoint.Card | None = None
        if init_from is not None:
            folder = checkpoint.find(init_from)
            self.earlier = checkpoint.read_card(folder)
        if model is None:
            if init_from is None:
                raise ValueError("give `model` (a class_path with init_args) or `init_from` (a checkpoint folder)")
            loaded = checkpoint.load(init_from)
            self.model, self.model_config = loaded.model, loaded.config
        else:
            self.model = model
            if init_from is not None:
                fresh = checkpoint.initialise(model, init_from)
                log.info(
                    "from %s; %d weights start fresh: %s", init_from, len(fresh), ", ".join(top_names(fresh)) or "-"
                )
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.layer_decay, self.ema = layer_decay, ema
        self.card_name, self.card_description, self.card_kind = name, description, kind
        self._seconds = 0.0
        self._started: float | None = None
        self._seed = torch.initial_seed()
        self._studies: Int[Tensor, " B"] = torch.zeros(0, dtype=torch.long)
        self.learning = learning(self.model, self.trains, freeze=freeze, unfreeze=unfreeze)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(f"{name}.".startswith(f"{part}.") for part in self.learning))
        self.train()  # an opened checkpoint is in evaluation mode, and Lightning leaves modes as they are

    # ------------------------------------------------------------------------------------------ one step

    @abstractmethod
    def losses(self, numbered: Numbered) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name; their sum is trained."""

    def on_train_batch_start(self, batch: Numbered, batch_idx: int) -> None:  # noqa: ARG002
        """Seeds what a step draws by its place in the run, so that a resumed run draws the same."""
        torch.manual_seed(hash((self._seed, self.global_rank, self.current_epoch, batch_idx)) % 2**63)

    def training_step(self, numbered: Numbered, batch_idx: int) -> Float[Tensor, ""]:  # noqa: ARG002
        """Sum of the losses, each of them logged.

        Raises:
            ValueError: It is no number.
        """
        losses = self.losses(numbered)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self._studies = numbered[0]
        if not bool(total.isfinite()):
            wrong = [name for name, loss in losses.items() if not bool(loss.isfinite())]
            raise ValueError(not_finite(self, f"the loss ({', '.join(wrong) or 'their sum'})", numbered[0]))
        if not total.requires_grad:  # nothing in this batch to learn from
            total = total + 0.0 * sum(item.sum() for item in self.parameters() if item.requires_grad)
        size = numbered[1].size
        self.log("loss", total.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"loss_{name}": loss.detach().float() for name, loss in losses.items()}, batch_size=size)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Stops before a gradient that is no number reaches the weights, and with them the next .ckpt.

        Raises:
            ValueError: It is no number. In float16 such steps are left out by the loss scale instead.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            found = [item.grad for item in self.parameters() if item.grad is not None]
            if not bool(torch.nn.utils.get_total_norm(found).isfinite()):
                raise ValueError(not_finite(self, "the gradient", self._studies))

    @property
    def judged(self) -> Literal["val", "test"]:
        """The split that is being scored; the scores' names begin with it."""
        return "test" if self.trainer.testing else "val"

    def test_step(self, numbered: Numbered, batch_idx: int) -> None:
        """The same on the test split."""
        self.validation_step(numbered, batch_idx)

    def on_test_epoch_start(self) -> None:
        """The same on the test split."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """The same on the test split."""
        self.on_validation_epoch_end()

    def predict_step(self, numbered: Numbered, batch_idx: int) -> list[list[dict[str, Any]]]:  # noqa: ARG002
        """The findings of each study, by the sealed thresholds; neither text nor truth is looked at.

        Returns:
            The fields of each `DetectedFinding`: Lightning takes no frozen dataclass.

        Raises:
            ValueError: The model has no finding head.
        """
        if self.model.findings is None:
            raise ValueError("to predict findings a model needs `findings`")
        found = self.model.find(self.model.encode(numbered[1]))
        assert found is not None
        return [[asdict(item) for item in findings] for findings in self.model.findings.decode(found)]

    def on_train_start(self) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_end(self) -> None:
        """Stops the clock."""
        if self._started is not None:
            self._seconds += time.monotonic() - self._started
            self._started = None

    def train(self, mode: bool = True) -> "Task":  # torch's signature
        """Frozen parts stay in evaluation mode: their dropout and statistics must not move what is cached."""
        super().train(mode)
        self.model.eval()
        for name in self.learning:
            self.model.get_submodule(name).train(mode)
        return self

    def configure_optimizers(self) -> Any:  # Lightning's own union is private
        """AdamW with a warm-up and a cosine over steps, epochs or wall time."""
        factors = layer_rates(self.model, self.layer_decay) if self.layer_decay < 1 else {}
        rates = {item: factors[name] for name, item in self.model.named_parameters() if name in factors}
        optimizer = adamw(self, learning_rate=self.learning_rate, weight_decay=self.weight_decay, rates=rates)

        def factor(step: int) -> float:
            done = 0.0 if self._trainer is None else progress(self.trainer)
            return warmup_cosine(step=step, warmup_steps=self.warmup_steps, done=done)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[Callback]:
        """The moving average of the weights, where there is one."""
        return [MovingAverage(self.ema)] if self.ema else []

    # -------------------------------------------------------------------------------- states and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps how long training took."""
        running = 0.0 if self._started is None else time.monotonic() - self._started
        checkpoint["seconds"] = self._seconds + running

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on counting."""
        self._seconds = float(checkpoint.get("seconds", 0.0))

    def seal(self) -> None:
        """Called behind a last validation and before the export: a stage sets thresholds here."""

    def scores(self) -> dict[str, float]:
        """What the card says of this stage's last validation."""
        metrics = {} if self._trainer is None else self.trainer.callback_metrics
        return {name: round(float(value), 4) for name, value in metrics.items() if name.startswith("val_")}

    def notes(self) -> dict[str, Any]:
        """What else the card keeps of this stage."""
        return {}

    def export(self, folder: str | Path, data: MultimodalData) -> checkpoint.Identity:
        """Writes the checkpoint folder.

        Args:
            folder: Where to.
            data: What it was trained on.
        """
        assert self.model_config, "the configuration of the model was never captured"
        stage: Mapping[str, Any] = {
            "task": type(self).__name__,
            "data": describe(data.spec),
            "inputs": list(data.inputs),
            "batch_size": data.batch_size,
            "learning_rate": self.learning_rate,
            "steps": self.trainer.global_step,
            "seconds": round(self._seconds),
            "scores": self.scores(),
            **self.notes(),
        }
        stages = (*(() if self.earlier is None else self.earlier.stages), dict(stage))
        description = self.card_description or ("" if self.earlier is None else self.earlier.description)
        return checkpoint.save(
            self.model,
            folder,
            config=self.model_config,
            tokenizer=data.tokenizer,
            card=checkpoint.Card(self.card_name, description, stages, kind=self._kind(stages)),
            preprocessing=checkpoint.Preprocessing(max_words=data.max_words, max_text=data.max_text),
        )

    def _kind(self, stages: tuple[dict[str, Any], ...]) -> Kind:
        """A demonstration that goes on learning from real data is none any more."""
        if self.card_kind is not None or self.earlier is None:
            return self.card_kind or "trained"
        return self.earlier.kind if all(procedural(stage.get("data")) for stage in stages) else "trained"
