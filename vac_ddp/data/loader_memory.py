"""Host memory of a loader: how much its batches under way take, and how many there may be."""

from __future__ import annotations

from dataclasses import dataclass

from vac_ddp.data.slots import slot_bytes
from vac_ddp.errors import UserError

UNDER_WAY = 16  # batches of a rank between its loader processes and itself, or one for each process where they are more


@dataclass(frozen=True, kw_only=True)
class LoaderMemory:
    """What the batches of one loader of one rank take, an upper bound.

    batch_bytes: clips of the largest batch. held: batches that the rank needs at a time. pin: batches are copied to
    page-locked memory, for a GPU. Everything but the clips of a batch is left out: it is less than a thousandth.
    """

    batch_bytes: int
    workers: int
    held: int
    pin: bool

    def slots(self, prefetch: int) -> int:
        """Slots of each process: of its batches under way, of the one being copied, of those that the rank holds."""
        return prefetch + 1 + (0 if self.pin else -(-self.held // max(1, self.workers)))

    def needed(self, prefetch: int) -> int:
        """Bytes of slots and pinned copies where each process has `prefetch` batches under way.

        Every slot counts: in time all have been written. Every batch under way may be a pinned copy that nobody has
        asked for yet; PyTorch rounds an allocation of pinned memory up to a power of two and keeps it.
        """
        shared = self.workers * self.slots(prefetch) * slot_bytes(self.batch_bytes)
        pinned = (self.workers * prefetch + self.held) * _power_of_two(self.batch_bytes) if self.pin else 0
        return shared + pinned

    def prefetch(self, setting: int, room: int) -> int:
        """Batches that each process may have under way: `setting`, or fewer.

        Fewer where more than `UNDER_WAY` would be, or where they took more than half of `room`, the bytes that this
        rank may have. UserError where one each is more than all of it.
        """
        count = max(1, min(setting, UNDER_WAY // max(1, self.workers)))
        while count > 1 and self.needed(count) > room // 2:
            count -= 1
        if self.workers and self.needed(count) > room:
            raise UserError(
                f"{self.workers} loader processes with {count} batches each need {self.needed(count) >> 20} MiB of "
                f"memory, a rank of this machine has {room >> 20} MiB: lower data.workers, or the clips of a batch"
            )
        return count


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0
