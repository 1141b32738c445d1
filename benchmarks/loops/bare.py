"""Hand-written loops: the bare one that everything is measured against, and one with naive metrics."""

import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.loops.works import LEARNING_RATE, MAX_GRAD_NORM, Setting


class Bare:
    """autocast, clip_grad_norm_ and AdamW, with a GradScaler where the loss is scaled; no metrics at all."""

    def __init__(self, setting: Setting, *, fused: bool = True) -> None:
        parts = setting.parts()
        self.model, self.criterion = parts.model, parts.criterion
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, fused=fused, foreach=not fused
        )
        self.batches = setting.batches(parts)
        self.low = setting.precision == "bf16"
        self.scaler = torch.amp.GradScaler("cpu") if setting.precision == "scaled" else None

    def region(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.low else nullcontext()

    def run(self, steps: int) -> float:
        model, criterion, optimizer, scaler = self.model, self.criterion, self.optimizer, self.scaler
        began = time.perf_counter()
        for _ in range(steps):
            data, target = next(self.batches)
            optimizer.zero_grad()
            with self.region():
                loss = criterion(model(data), target)
            if scaler is None:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                scaler.step(optimizer)
                scaler.update()
        return time.perf_counter() - began


class Naive(Bare):
    """The bare loop with metrics as they are often written: .item() and isnan over every gradient."""

    def run(self, steps: int) -> float:
        model, criterion, optimizer, scaler = self.model, self.criterion, self.optimizer, self.scaler
        history: deque[dict[str, float]] = deque(maxlen=10_000)
        began = time.perf_counter()
        for _ in range(steps):
            data, target = next(self.batches)
            started = time.perf_counter()
            optimizer.zero_grad()
            with self.region():
                loss = criterion(model(data), target)
            scale = 1.0 if scaler is None else scaler.get_scale()
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            has_nan = any(bool(torch.isnan(gradient).any()) for gradient in gradients)
            has_inf = any(bool(torch.isinf(gradient).any()) for gradient in gradients)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            history.append(
                {
                    "loss": loss.item(),
                    "scale": scale,
                    "grad_norm": norm.item(),
                    "nan": has_nan,
                    "inf": has_inf,
                    "seconds": time.perf_counter() - started,
                }
            )
        return time.perf_counter() - began
