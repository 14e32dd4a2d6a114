"""The processes that torchrun or accelerate has started on one run: ranks, and what they exchange.

    torchrun --nproc-per-node 2 -m compress run RECIPE

Everything goes through torch.distributed: what is on a GPU by NCCL, all else by gloo. Each exchange
begins with a few numbers by gloo, so a rank waits where it can be told that another has failed, and
never in NCCL. Without a launcher there is one rank, which exchanges nothing.

Policy: a rank that meets an error leaves its line in the launcher's store and ends; the others find
their connection closed, read the line, and end with it. Whoever comes first prints it.

    with together("cpu") as ranks:
        for i in ranks.share(len(samples)): ...
        ranks.sum(H)                      # [K, K], in place, on every rank
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from compress.errors import CompressError, UsageError

if TYPE_CHECKING:  # a command line that prints its help needs no torch
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")  # what JSON holds

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
# How long a rank waits in an exchange for one that neither comes nor closes its connection: longer
# than ranks are apart in a layer, where one may solve while the others have nothing to do.
PATIENCE = timedelta(hours=1)
STARTING = timedelta(minutes=5)  # for all to have loaded torch
POLL = 0.05  # seconds
FIRST_WORDS, LAST_WORDS = 1.0, 5.0  # seconds that ranks leave the one that prints
GONE = (
    "another rank has ended without a word (killed, or out of memory): the same command goes on "
    "behind what is finished"
)


class RankError(CompressError):
    """Another rank has failed; the message is its own."""


class Ranks:
    """One process, which has all of the work. `Group` is one of several.

    Attributes:
        rank, size: of the process, and how many there are.
        deterministic: whether sums are added up as one process adds them.
    """

    rank, size, deterministic = 0, 1, True

    @property
    def first(self) -> bool:
        """Whether this one writes, and says what is going on."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of so many things are this rank's: blocks in order, the first ones larger by one.

        Empty where there are more ranks than things.
        """
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return range(start, start + least + (self.rank < more))

    def sum(self, *tensors: "Tensor") -> None:
        """Adds up what all ranks have, in place, on every rank."""

    def in_turn(self, add: Callable[[], None], *tensors: "Tensor") -> None:
        """Hands tensors from rank to rank, each of which adds its own to what is there.

        All ranks end with what the last one has.
        """
        add()

    def gather(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """The named tensors of all ranks, on the CPU; names are of one rank each."""
        return dict(tensors)

    def collect(self, value: T) -> list[T]:
        """What each rank has, by rank: what JSON holds."""
        return [value]

    def tell(self, make: Callable[[], T]) -> T:
        """What the first rank makes; the others wait for it, however long that takes."""
        return make()

    def meet(self) -> None:
        """Waits until all are here."""
        self.collect(None)

    def wait(self) -> None:
        """Waits until all are here, however long that takes."""

    def check_alike(self, mark: str, what: str) -> None:
        """UsageError for ranks that read different things: their marks differ; `what`: of what."""
        marks = self.collect(mark)
        if other := next((rank for rank, own in enumerate(marks) if own != marks[0]), None):
            raise UsageError(f"rank {other} has another {what} than rank 0: all need the same")


class Group(Ranks):
    """One of several processes. Started by `together`."""

    def __init__(self, rank: int, size: int, device: str, deterministic: bool):
        import torch.distributed as dist

        self.rank, self.size, self.deterministic = rank, size, deterministic
        # Of this group alone: a script may run several recipes, one after the other.
        self._store = dist.PrefixStore(f"group-{next(_groups)}", _rendezvous())
        self._told = self._waited = 0
        self._own = not dist.is_initialized()
        try:
            if self._own:
                dist.init_process_group(
                    "nccl" if device.startswith("cuda") else "gloo",
                    store=dist.PrefixStore("torch", self._store),
                    rank=rank,
                    world_size=size,
                    timeout=PATIENCE,
                )
            self._cpu: ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise CompressError(f"rank {rank} of {size} finds no others: {_line(error)}") from error

    def sum(self, *tensors: "Tensor") -> None:
        import torch.distributed as dist

        with self._exchange():
            self._sizes(0)
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group_of(tensor))

    def in_turn(self, add: Callable[[], None], *tensors: "Tensor") -> None:
        import torch.distributed as dist

        with self._exchange():
            self._sizes(0)
            if self.rank > 0:
                for tensor in tensors:
                    dist.recv(tensor, self.rank - 1, group=self._group_of(tensor))
        add()
        with self._exchange():
            if self.rank < self.size - 1:
                for tensor in tensors:
                    dist.send(tensor, self.rank + 1, group=self._group_of(tensor))
            for tensor in tensors:
                dist.broadcast(tensor, self.size - 1, group=self._group_of(tensor))

    def gather(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        from safetensors.torch import load, save

        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        found: dict[str, Tensor] = {}
        for data in self._bytes(save(on_cpu) if on_cpu else b""):
            found |= load(data) if data else {}
        return found

    def collect(self, value: T) -> list[T]:
        return [json.loads(data) for data in self._bytes(json.dumps(value).encode())]

    def tell(self, make: Callable[[], T]) -> T:
        key = f"told-{self._told}"
        self._told += 1
        value = make() if self.first else None
        with self._exchange():
            if self.first:
                self._store.set(key, json.dumps(value))
            self._until([key])
            told: T = json.loads(self._store.get(key))
            return told

    def wait(self) -> None:
        keys = [f"waits-{self._waited}-{rank}" for rank in range(self.size)]
        self._waited += 1
        with self._exchange():
            self._store.set(keys[self.rank], "")
            self._until(keys)

    def fail(self, error: BaseException) -> None:
        """Leaves for the others what has ended this rank."""
        said = "interrupted" if isinstance(error, KeyboardInterrupt) else _line(error)
        with suppress(RuntimeError):
            self._store.set("failure", f"rank {self.rank}: {said}")

    def end(self) -> None:
        """Leaves the group."""
        import torch.distributed as dist

        with suppress(RuntimeError):
            if self._own:
                dist.destroy_process_group()

    def _until(self, keys: list[str]) -> None:
        """Waits until the store has all of them; RuntimeError where a rank has failed."""
        while not self._store.check(keys):
            if self._store.check(["failure"]):
                raise RuntimeError(f"no {keys[0]}")
            time.sleep(POLL)

    def _group_of(self, tensor: "Tensor") -> "ProcessGroup | None":
        return None if tensor.is_cuda else self._cpu

    def _sizes(self, size: int) -> list[int]:
        """A number of every rank."""
        import torch
        import torch.distributed as dist

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([size]), group=self._cpu)
        return [int(each) for each in sizes]

    def _bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every rank."""
        import torch
        import torch.distributed as dist

        found = []
        with self._exchange():
            for rank, size in enumerate(self._sizes(len(data))):
                own = rank == self.rank
                buffer = bytearray(data if own else size)
                if size:
                    read = torch.frombuffer(buffer, dtype=torch.uint8)
                    dist.broadcast(read, rank, group=self._cpu)
                found.append(bytes(buffer))
        return found

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """RankError where others do not answer: with what one of them has left."""
        try:
            yield
        except RuntimeError as error:
            said = GONE
            with suppress(RuntimeError):
                if self._store.check(["failure"]):
                    said = self._store.get("failure").decode()
                elif "imed out" in str(error):  # of gloo, or of the store
                    said = f"a rank did not answer for {PATIENCE}: {_line(error)}"
            raise RankError(said) from error


@contextmanager
def together(device: str = "cpu", *, deterministic: bool = False) -> Iterator[Ranks]:
    """Joins the other processes of a launcher; one process of its own is all there is.

    Args:
        device: where this rank computes.
        deterministic: sums of several ranks are added up in the order of one process.
    """
    global _group
    rank, size = launched()
    if size == 1 or _group is not None:
        yield _group or Ranks()
        return
    _group = Group(rank, size, device, deterministic)
    try:
        yield _group
    except BaseException as error:
        if not isinstance(error, RankError):
            _group.fail(error)
        raise
    finally:
        ended, _group = _group, None
        ended.end()


_group: Group | None = None  # that this process has joined
_groups = count()
_found: "list[Store]" = []  # of the launcher
_lock = threading.Lock()


def joined() -> bool:
    """Whether this process knows the others that were started with it."""
    return _group is not None


def launched() -> tuple[int, int]:
    """Which process this is, of how many, as torchrun or accelerate say it; (0, 1) without."""
    given = [os.environ.get(name, "") for name in LAUNCHER]
    if not all(given) or not (given[0].isdigit() and given[1].isdigit()):
        return 0, 1
    return int(given[0]), max(1, int(given[1]))


def local_rank() -> int:
    """Which of the processes on this machine this is."""
    given = os.environ.get("LOCAL_RANK", "")
    return int(given) if given.isdigit() else 0


def speaks(heard: bool = False) -> bool:
    """Whether this process is the one of all that says why they end.

    The others wait for it a moment: a launcher ends all when one has. `heard`: this one knows it
    from another, which goes first.
    """
    rank, size = launched()
    if size == 1:
        return True
    try:
        store = _rendezvous()
        until = time.monotonic() + FIRST_WORDS
        while heard and not store.check(["said"]) and time.monotonic() < until:
            time.sleep(POLL)
        if store.add("said", 1) == 1:
            return True
        until = time.monotonic() + LAST_WORDS
        while not store.check(["heard"]) and time.monotonic() < until:
            time.sleep(POLL)
        return False
    except (RuntimeError, CompressError):  # the store has gone
        return rank == 0


def has_spoken() -> None:
    """Lets the others go, who wait in `speaks`."""
    if launched()[1] > 1:
        with suppress(RuntimeError, CompressError):
            _rendezvous().set("heard", "1")


def _rendezvous() -> "Store":
    """The launcher's store, by which its processes find each other."""
    import torch.distributed as dist

    with _lock:
        if not _found:
            try:
                store, _, _ = next(dist.rendezvous("env://", timeout=STARTING))
            except (RuntimeError, ValueError) as error:
                where = ":".join(os.environ.get(name, "") for name in LAUNCHER[2:])
                raise UsageError(
                    f"MASTER_ADDR and MASTER_PORT, {where}: expected the place where torchrun's "
                    f"processes meet: {_line(error)}"
                ) from error
            _found.append(dist.PrefixStore("modelpress", store))
        return _found[0]


def _line(error: BaseException) -> str:
    """The first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
