"""Faults of the disk, and damage to checkpoints that are on it."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from halfstep.service.store import jobs
from tests.faults.injecting import Fault, Injecting
from tests.faults.processes import send
from tests.faults.variants import SAVE_EVERY

POWER_LOSS = "power-loss"  # a point of the suite's own, which `powerloss` reaches
Damage = Callable[[Path, Path, random.Random], None]  # a file, the same of an older checkpoint, the choice


class DiskFaults(Injecting):
    """What is damaged is always a job's that trains, so that it must be read again."""

    def disk_full(self, fault: Fault) -> None:
        self.arm(fault, "checkpoint.after_write", "no-space", times=self.draw.randint(1, 3))

    def disk_error(self, fault: Fault) -> None:
        point = self.draw.choice(("checkpoint.after_fsync", "checkpoint.after_rename"))
        self.arm(fault, point, "io-error")

    def truncate_a_checkpoint(self, fault: Fault) -> None:
        self._damage(fault, _truncate)

    def flip_a_bit_of_a_checkpoint(self, fault: Fault) -> None:
        self._damage(fault, _flip)

    def swap_a_checkpoint(self, fault: Fault) -> None:
        self._damage(fault, _swap)

    def _damage(self, fault: Fault, damage: Damage) -> None:
        """Of a job that trains, the newest; then its process is killed, so that it must be read again."""
        deadline = time.monotonic() + 20.0
        while not self._damage_once(fault, damage) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _damage_once(self, fault: Fault, damage: Damage) -> bool:
        worker = self.victim(fault)
        fault.hit = False
        child = None if worker is None else self.installation.child(worker)
        if worker is None or child is None or fault.job_id is None:
            return False
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not self._going_back_is_possible(fault.job_id):
            time.sleep(0.02)
        # It must not save another one meanwhile: the newest is what it goes on from.
        send(child, signal.SIGSTOP)
        held = self.installation.holders().get(worker, ("", "", 0))
        if held == (fault.job_id, "running", fault.fence) and self._going_back_is_possible(fault.job_id):
            kept = self._kept(fault.job_id)
            newest, oldest = (self.installation.data_dir / each.path for each in (kept[0], kept[-1]))
            name = self.draw.choice(("model.safetensors", "state.pt", "manifest.json"))
            damage(newest / name, oldest / name, self.draw)
            fault.hit, fault.at = True, time.time()
            send(child, signal.SIGKILL)
        else:
            send(child, signal.SIGCONT)
        return fault.hit

    def _going_back_is_possible(self, job_id: str) -> bool:
        """Damage is survived where there is an older checkpoint."""
        kept = self._kept(job_id)
        return bool(kept) and kept[0].step >= 3 * SAVE_EVERY

    def _kept(self, job_id: str) -> list[jobs.Checkpoint]:
        return self.installation.look(partial(jobs.checkpoints, job_id=job_id))

    def power_loss(self, fault: Fault) -> None:
        """All that a job's process never fsynced is gone with it."""
        self.arm(fault, POWER_LOSS)


def _truncate(file: Path, _: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _flip(file: Path, _: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _swap(file: Path, older: Path, _: random.Random) -> None:
    shutil.copy(older, file)
