"""Which page holds what, and who holds it: the page pool with its prefix cache, as pure bookkeeping.

Each page is in one state, that of its strongest holder, and the counts always add up to the pool:

    owned (a sequence)  >  leased (promised to a peer)  >  cached (unreferenced prefix)  >  quarantined  >  free

    free --allocate--> owned --release--> cached (its hash is registered) --evict--> free
                         |                   ^   `--acquire--> owned again
                         |--release----------'-> free, or leased / quarantined until unlease / settle

Frame 0 is scratch and belongs to nobody. A page's epoch goes up when its content is given up, so (page, epoch) names
content. One thread owns a pool; nothing here locks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

SCRATCH_PAGE = 0
STATES = ("owned", "leased", "cached", "quarantined", "free")


class PagePool:
    """Frames 1 .. pages - 1 of one pool. `epochs` is where epochs are kept: memory that peers may read, or a list."""

    def __init__(self, pages: int, *, epochs: memoryview[int] | list[int] | None = None) -> None:
        assert pages >= 2, "a pool needs the scratch frame and one page"
        self.pages = pages
        self._epochs: memoryview[int] | list[int] = [0] * pages if epochs is None else epochs
        self._owners = [0] * pages
        self._leases = [0] * pages
        self._operations = [0] * pages  # transfers that may still write into (or read from) the page
        self._hashes: list[bytes | None] = [None] * pages
        self._free = list(range(pages - 1, SCRATCH_PAGE, -1))
        self._states = ["free"] * pages
        self._counts = dict.fromkeys(STATES, 0) | {"free": pages - 1}
        self._index: dict[bytes, int] = {}  # block hash -> the page that holds it
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached pages, least recently used first
        self._stored: list[bytes] = []
        self._removed: list[bytes] = []
        self.on_room: Callable[[], None] = _nothing  # called when pages become reusable

    # --- ownership -------------------------------------------------------------------------------------------

    @property
    def reusable(self) -> int:
        """Pages that `allocate` can give out now."""
        return len(self._free) + len(self._evictable)

    @property
    def capacity(self) -> int:
        return self.pages - 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages owned by the caller, evicting the least recently used prefixes; None: all or nothing."""
        if count > self.reusable:
            return None
        while len(self._free) < count:
            self._evict(next(iter(self._evictable)))
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
            self._note(page)
        return taken

    def acquire(self, pages: Iterable[int]) -> None:
        """One more owner for each page, which has an owner, a lease or cached content."""
        for page in pages:
            assert self._owners[page] or self._leases[page] or self._hashes[page] is not None, page
            self._owners[page] += 1
            self._evictable.pop(page, None)
            self._note(page)

    def release(self, page: int) -> None:
        """Drop one ownership; the last one leaves the page cached, if it was registered."""
        assert self._owners[page] > 0, page
        self._owners[page] -= 1
        self._settled(page)

    def release_all(self, pages: Sequence[int]) -> None:
        """Release a sequence's pages, last first: a prefix outlives its continuation in the cache."""
        for page in reversed(pages):
            self.release(page)

    # --- prefix cache ----------------------------------------------------------------------------------------

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages of the longest known prefix. Changes nothing: `acquire` them before anything else runs."""
        found: list[int] = []
        for value in hashes:
            page = self._index.get(value)
            if page is None:
                break
            found.append(page)
        return found

    def register(self, page: int, block_hash: bytes) -> bool:
        """Name the content of an owned, full, verified page. False if another page has that name already."""
        assert self._owners[page] > 0, page
        if block_hash in self._index or self._hashes[page] is not None:
            return False
        self._index[block_hash] = page
        self._hashes[page] = block_hash
        self._stored.append(block_hash)
        return True

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Block hashes stored and removed since the last call."""
        changes = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return changes

    def known_hashes(self) -> tuple[bytes, ...]:
        return tuple(self._index)

    # --- what peers and transfers hold -----------------------------------------------------------------------

    def lease(self, page: int) -> None:
        assert self._owners[page] or self._leases[page], page
        self._leases[page] += 1
        self._note(page)

    def unlease(self, page: int) -> None:
        assert self._leases[page] > 0, page
        self._leases[page] -= 1
        self._settled(page)

    def quarantine(self, page: int) -> None:
        """A transfer that may touch the page has been posted."""
        assert self._owners[page] > 0, page
        self._operations[page] += 1

    def settle(self, page: int) -> None:
        """That transfer can touch the page no more."""
        assert self._operations[page] > 0, page
        self._operations[page] -= 1
        self._settled(page)

    def epoch(self, page: int) -> int:
        return self._epochs[page]

    # --- states ----------------------------------------------------------------------------------------------

    def state(self, page: int) -> str:
        if self._owners[page]:
            return "owned"
        if self._leases[page]:
            return "leased"
        if self._hashes[page] is not None:
            return "cached"
        return "quarantined" if self._operations[page] else "free"

    def counts(self) -> dict[str, int]:
        """Pages by state, without the scratch frame. Kept as they change: a load report costs nothing by the page."""
        return dict(self._counts)

    def check(self) -> None:
        """Assert that every page is where its holders say. For idle moments and the end of every test."""
        counts = self.counts()
        found = Counter(self.state(page) for page in range(1, self.pages))
        assert counts == {state: found[state] for state in STATES}, (counts, found)
        assert len(set(self._free)) == len(self._free) == counts["free"], (counts, len(self._free))
        assert all(self.state(page) == "free" for page in self._free)
        assert all(self._hashes[page] == value for value, page in self._index.items())
        assert all(self.state(page) == "cached" for page in self._evictable)

    def _settled(self, page: int) -> None:
        """A holder has gone: the page becomes evictable or free when it was the last."""
        self._note(page)
        if self._owners[page] or self._leases[page] or self._operations[page]:
            return
        if self._hashes[page] is None:
            self._epochs[page] += 1
            self._free.append(page)
        else:
            self._evictable[page] = None
        self.on_room()

    def _evict(self, page: int) -> None:
        del self._evictable[page]
        value = self._hashes[page]
        assert value is not None
        del self._index[value]
        self._hashes[page] = None
        self._removed.append(value)
        self._epochs[page] += 1
        self._free.append(page)
        self._note(page)

    def _note(self, page: int) -> None:
        """Count the page in the state that it is in now."""
        state = self.state(page)
        self._counts[self._states[page]] -= 1
        self._counts[state] += 1
        self._states[page] = state


def _nothing() -> None:
    """Nobody is waiting for room."""
