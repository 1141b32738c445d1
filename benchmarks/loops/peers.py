"""Other libraries' loops, as their documentation has them: fused AdamW, clipping, the same batches.

They are not installed with this project; see requirements-peers.txt. Those that are missing are left out.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.loops.works import LEARNING_RATE, MAX_GRAD_NORM, Setting, scratch

_WARM_UP = 10


def present() -> dict[str, Callable[[Setting], Any]]:
    """The loops whose library can be imported, by the name they are shown under."""
    loops: dict[str, Callable[[Setting], Any]] = {}
    if find_spec("lightning") is not None:
        loops |= {"Lightning, CSV each step": Lightning, "Fabric, no metrics": Fabric}
    if find_spec("accelerate") is not None:
        loops["Accelerate, no metrics"] = Accelerate
    if find_spec("transformers") is not None:
        loops["HF Trainer, logs each step"] = HuggingFace
    return loops


class _Stream(IterableDataset[Any]):
    """A setting's batches as a dataset that is already batched."""

    def __init__(self, batches: Iterator[Any], *, named: bool = False) -> None:
        self.batches, self.named = batches, named

    def __iter__(self) -> Iterator[Any]:
        for data, target in self.batches:
            yield {"data": data, "target": target} if self.named else (data, target)


def _adamw(model: nn.Module, *, fused: bool = True) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=fused, foreach=not fused)


class Fabric:
    """A hand-written loop over Lightning Fabric."""

    def __init__(self, setting: Setting) -> None:
        from lightning.fabric import Fabric as Engine  # noqa: PLC0415 - where installed

        parts = setting.parts()
        self.fabric = Engine(
            accelerator="cpu", devices=1, precision="bf16-mixed" if setting.precision == "bf16" else "32-true"
        )
        self.model, self.optimizer = self.fabric.setup(parts.model, _adamw(parts.model))
        self.criterion, self.batches = parts.criterion, setting.batches(parts)

    def run(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            data, target = next(self.batches)
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(data), target)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=MAX_GRAD_NORM)
            self.optimizer.step()
        return time.perf_counter() - began


class Accelerate:
    """A hand-written loop over Accelerate."""

    def __init__(self, setting: Setting) -> None:
        from accelerate import Accelerator  # noqa: PLC0415 - where installed

        parts = setting.parts()
        self.engine = Accelerator(cpu=True, mixed_precision="bf16" if setting.precision == "bf16" else "no")
        self.model, self.optimizer = self.engine.prepare(parts.model, _adamw(parts.model))
        self.criterion, self.batches = parts.criterion, setting.batches(parts)

    def run(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            data, target = next(self.batches)
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(data), target)
            self.engine.backward(loss)
            self.engine.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
        return time.perf_counter() - began


class Lightning:
    """Lightning's Trainer, logging the loss of each step to CSV."""

    def __init__(self, setting: Setting) -> None:
        from lightning.pytorch import LightningModule  # noqa: PLC0415 - where installed

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        parts = setting.parts()
        criterion = parts.criterion

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = parts.model

            def training_step(self, batch: Any, index: int) -> Any:
                del index
                data, target = batch
                loss = criterion(self.model(data), target)
                self.log("loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                # Lightning refuses to clip under mixed precision beside a fused optimizer.
                return _adamw(self.model, fused=setting.precision != "bf16")

        self.module = Module()
        self.batches = setting.batches(parts)
        self.precision = "bf16-mixed" if setting.precision == "bf16" else "32-true"
        self.directory = scratch()

    def run(self, steps: int) -> float:
        from lightning.pytorch import Callback, Trainer  # noqa: PLC0415 - where installed
        from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415 - where installed

        class Clock(Callback):
            began = ended = 0.0

            def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
                if trainer.global_step == _WARM_UP:
                    self.began = time.perf_counter()
                elif trainer.global_step == _WARM_UP + steps:
                    self.ended = time.perf_counter()

        clock = Clock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                precision=self.precision,
                max_steps=_WARM_UP + steps,
                gradient_clip_val=MAX_GRAD_NORM,
                log_every_n_steps=1,
                logger=CSVLogger(str(self.directory)),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[clock],
            )
            trainer.fit(self.module, DataLoader(_Stream(self.batches), batch_size=None))
        return clock.ended - clock.began


class HuggingFace:
    """The Trainer of transformers, logging each step to its own history."""

    def __init__(self, setting: Setting) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        parts = setting.parts()
        self.model, self.criterion = parts.model, parts.criterion
        self.batches, self.low = setting.batches(parts), setting.precision == "bf16"
        self.directory = scratch()

    def run(self, steps: int) -> float:
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments  # noqa: PLC0415 - where installed

        criterion, loader = self.criterion, DataLoader(_Stream(self.batches, named=True), batch_size=None)

        class Own(Trainer):
            def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
                return criterion(model(inputs["data"]), inputs["target"])

            def get_train_dataloader(self) -> Any:
                return loader

        class Clock(TrainerCallback):
            began = ended = 0.0

            def on_log(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
                if state.global_step == _WARM_UP:
                    self.began = time.perf_counter()
                elif state.global_step == _WARM_UP + steps and not self.ended:
                    self.ended = time.perf_counter()

        clock = Clock()
        arguments = TrainingArguments(
            output_dir=str(self.directory),
            max_steps=_WARM_UP + steps,
            logging_steps=1,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            optim="adamw_torch_fused",
            bf16=self.low,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Own(model=self.model, args=arguments, train_dataset=loader.dataset, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.ended - clock.began
