"""Who holds which blocks of the cache, without a tensor: positions of a sequence lie in blocks of a fixed size.

A block that is full, and whose entries are final, is published under its tokens and its predecessor; a new
sequence with the same beginning takes such blocks instead of computing them. The key holds the tokens
themselves, since a collision of hashes would hand one user another's text. It also holds the few tokens after
the block: module k of multi-token prediction has read k tokens further, so two prompts that part right behind
a block differ in the modules' entries within it. Modules may lie idle, so it is known of each block how many of them
have filled it. Blocks that nobody holds stay findable until room is needed, the longest unused first.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import count

Key = tuple[int, tuple[int, ...]]


class Blocks:
    """A pool of blocks, counted by how many sequences hold each."""

    def __init__(self, num_blocks: int, size: int, lookahead: int) -> None:
        self.size, self.lookahead = size, lookahead
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._held: Counter[int] = Counter()
        self._found: dict[Key, tuple[int, int]] = {}
        """(block, serial) by key; serials tell a block from what it held before."""
        self._keys: dict[int, Key] = {}
        self._filled: dict[int, int] = {}
        """Modules, of the first on, whose entries a block holds."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published blocks that nobody holds, the longest unused first."""
        self._serials = count(1)

    @property
    def available(self) -> int:
        """Blocks that could be taken now."""
        return len(self._free) + len(self._idle)

    def match(self, tokens: Sequence[int], modules: int = 0) -> tuple[list[int], list[int]]:
        """Blocks, held from now on, that hold the beginning of `tokens`, in so many modules' caches too, with their
        serials; not all tokens: at least one is left to run."""
        blocks: list[int] = []
        serials = [0]
        while (len(blocks) + 1) * self.size < len(tokens):
            found = self._found.get(self._key(tokens, len(blocks), serials[-1]))
            if found is None or self._filled.get(found[0], 0) < modules:
                break
            blocks.append(found[0])
            serials.append(found[1])
        for block in blocks:
            self._hold(block)
        return blocks, serials[1:]

    def grow(self, blocks: list[int], positions: int) -> bool:
        """Make room for `positions` positions in all; False, with nothing taken, if there is none."""
        missing = -(-positions // self.size) - len(blocks)
        if missing > self.available:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._filled.pop(block, None)
            self._hold(block)
            blocks.append(block)
        return True

    def cut(self, blocks: list[int], positions: int) -> None:
        """Give back the blocks beyond `positions` positions."""
        kept = -(-positions // self.size)
        self.release(blocks[kept:])
        del blocks[kept:]

    def publish(
        self, tokens: Sequence[int], blocks: list[int], serials: list[int], final: int, modules: int = 0
    ) -> None:
        """Let others find the blocks whose `final` positions are done; `serials` grows by those.

        One that so many modules will fill takes the place of one that fewer have.
        """
        while (len(serials) + 1) * self.size <= min(final, len(tokens) - self.lookahead):
            index = len(serials)
            key = self._key(tokens, index, serials[-1] if serials else 0)
            if key not in self._found:
                self._found[key] = (blocks[index], next(self._serials))
                self._keys[blocks[index]] = key
            elif self._filled.get(self._found[key][0], 0) < modules:
                self._replace(key, blocks[index])
            serials.append(self._found[key][1])

    def fill(self, blocks: Sequence[int], modules: int) -> None:
        """So many modules' entries of these blocks are final."""
        for block in blocks:
            self._filled[block] = max(modules, self._filled.get(block, 0))

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks; a prefix outlives what follows it."""
        for block in reversed(blocks):
            self._held[block] -= 1
            if self._held[block]:
                continue
            del self._held[block]
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._held[block] += 1

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._found[self._keys.pop(block)]
        return block

    def _replace(self, key: Key, block: int) -> None:
        """Another block is found by this key from now on."""
        old, serial = self._found[key]
        if old == block:
            return
        self._found[key], self._keys[block] = (block, serial), key
        del self._keys[old]
        if old in self._idle:
            del self._idle[old]
            self._free.append(old)

    def _key(self, tokens: Sequence[int], index: int, parent: int) -> Key:
        start = index * self.size
        return parent, tuple(tokens[start : start + self.size + self.lookahead])
