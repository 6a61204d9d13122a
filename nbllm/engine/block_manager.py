"""BlockManager: who owns which page of the KV cache.

    block 0              never given away: padding reads and writes land there
    ref_count > 0        in the block table of that many running requests
    ref_count == 0       free, either empty (`_empty`) or still holding a cached prefix (`_cached`)

A page that is full is *registered* under (id of the prefix before it, its tokens), so a later
prompt with the same tokens finds it. The key holds the tokens themselves and prefix ids are never
used twice, so a lookup compares content, not a hash: two different prefixes can't be taken for one
another. Free cached pages are reused least recently used first; a request gives back its last page
first, so a prefix always outlives what follows it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from nbllm.engine.request import Request

_PrefixKey = tuple[int, bytes]


class BlockManager:
    """Allocation, sharing and reuse of KV-cache pages; all operations are O(pages touched).

    Args:
        num_blocks: pages in the cache, including the null block 0.
        block_size: tokens in a page.
        enable_prefix_caching: whether requests may share the pages of equal prefixes.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (one is the null block): {num_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._next_prefix_id = 0
        self.reset()

    def reset(self) -> None:
        """Forget every owner and every cached prefix."""
        self._ref_counts = [0] * self.num_blocks
        self._prefix_ids: list[int | None] = [None] * self.num_blocks
        self._keys: list[_PrefixKey | None] = [None] * self.num_blocks
        self._index: dict[_PrefixKey, int] = {}
        self._empty = list(range(self.num_blocks - 1, 0, -1))
        # The order of reuse. A plain dict finds its first key by passing over all deleted ones.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Pages that can be given to a request now."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Of the free ones, those that still hold a cached prefix."""
        return len(self._cached)

    @property
    def num_usable_blocks(self) -> int:
        """All pages but the null block."""
        return self.num_blocks - 1

    def num_blocks_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def find_cached_blocks(self, request: Request) -> list[int]:
        """Pages that hold the longest cached prefix of `request`, without taking them.

        At least one token is always left to compute: sampling needs its logits.
        """
        if not self._shares(request) or not request.may_read_prefix_cache:
            return []
        blocks: list[int] = []
        parent = _root(request)
        num_pages = (request.num_tokens - 1) // self.block_size
        for tokens in self._pages(request, 0, num_pages):
            block = self._index.get((parent, tokens))
            if block is None:
                break
            blocks.append(block)
            prefix_id = self._prefix_ids[block]
            assert prefix_id is not None
            parent = prefix_id
        return blocks

    def admit(self, request: Request) -> bool:
        """Give a request its cached prefix and pages for all its tokens, or nothing at all.

        On success `num_computed_tokens` covers the cached prefix. Returns False if too few pages
        are free.
        """
        assert not request.block_table
        cached = self.find_cached_blocks(request)
        num_new = self.num_blocks_for(request.num_tokens) - len(cached)
        ref_counts = self._ref_counts
        reclaimed = [block for block in cached if not ref_counts[block]]
        if num_new > self.num_free_blocks - len(reclaimed):
            return False
        for block in reclaimed:
            del self._cached[block]
        for block in cached:
            ref_counts[block] += 1
            prefix_id = self._prefix_ids[block]
            assert prefix_id is not None
            request.prefix_ids.append(prefix_id)
        request.block_table += cached
        request.block_table += [self._pop_free() for _ in range(num_new)]
        request.num_computed_tokens = len(cached) * self.block_size
        self.num_prefix_queries += request.num_tokens
        self.num_prefix_hits += request.num_computed_tokens
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Extend the block table to hold `num_tokens` tokens; False (and no change) if it can't."""
        if num_tokens <= len(request.block_table) * self.block_size:
            return True
        num_new = self.num_blocks_for(num_tokens) - len(request.block_table)
        if num_new > self.num_free_blocks:
            return False
        for _ in range(num_new):
            request.block_table.append(self._pop_free())
        return True

    def can_grow(self, wanted: Iterable[tuple[Request, int]]) -> bool:
        """True if all of these requests could grow to so many tokens."""
        num_new = sum(
            max(self.num_blocks_for(num_tokens) - len(request.block_table), 0)
            for request, num_tokens in wanted
        )
        return num_new <= self.num_free_blocks

    def register_full_blocks(self, request: Request) -> None:
        """Make the pages that are full, once all enqueued steps have run, findable by others.

        Only known tokens count, and of an ended text not the last: it may not have been computed.
        """
        size = self.block_size
        first = len(request.prefix_ids)  # not known yet
        if request.num_computed_tokens < (first + 1) * size or not self._shares(request):
            return
        num_tokens = request.num_tokens - 1 if request.is_finished else request.num_tokens
        num_full = min(request.num_computed_tokens, num_tokens) // size
        for tokens in self._pages(request, first, num_full):
            parent = request.prefix_ids[-1] if request.prefix_ids else _root(request)
            key = (parent, tokens)
            block = self._index.get(key)
            if block is None:  # else: another request was first, and its page is the one to find
                block = request.block_table[len(request.prefix_ids)]
                self._index[key] = block
                self._keys[block] = key
                self._prefix_ids[block] = self._next_prefix_id
                self._next_prefix_id += 1
            prefix_id = self._prefix_ids[block]
            assert prefix_id is not None
            request.prefix_ids.append(prefix_id)

    def free(self, request: Request) -> None:
        """Give back all pages of a request, last page first."""
        while request.block_table:
            block = request.block_table.pop()
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._keys[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None
        request.prefix_ids.clear()

    def forget_content(self, request: Request) -> list[int]:
        """Unregister the pages that only `request` owns: what is in them can't be trusted.

        Returns:
            those pages; they stay in the request's block table until it is freed.
        """
        own = [block for block in request.block_table if self._ref_counts[block] == 1]
        for block in own:
            key = self._keys[block]
            if key is not None:
                del self._index[key]
                self._keys[block] = None
        return own

    def drop_cached_prefixes(self) -> None:
        """Forget all cached prefixes; pages in use stay with their owners."""
        self._index.clear()
        self._keys = [None] * self.num_blocks
        self._empty += self._cached
        self._cached.clear()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError if a page is lost, owned twice or counted wrongly.

        Args:
            requests: every request that may own pages.
        """
        owners = Counter(block for request in requests for block in request.block_table)
        free = set(self._empty) | set(self._cached)
        assert len(free) == len(self._empty) + len(self._cached), "a page is free twice"
        assert 0 not in owners and 0 not in free, "the null block was given away"
        for block in range(1, self.num_blocks):
            count = self._ref_counts[block]
            assert count == owners[block], f"page {block}: {count} refs, {owners[block]} owners"
            assert (count == 0) == (block in free), f"page {block} is lost, or free and owned"
            if block in self._cached:
                assert self._keys[block] is not None, f"page {block} is cached without a key"
        for key, block in self._index.items():
            assert self._keys[block] == key, f"page {block} is indexed under a foreign key"

    def _pages(self, request: Request, first: int, end: int) -> Iterator[bytes]:
        """The tokens of some of a request's pages."""
        size = self.block_size
        return (request.token_ids[i * size : (i + 1) * size].tobytes() for i in range(first, end))

    def _shares(self, request: Request) -> bool:
        # A salt of its own (the continuations of one prompt) shares even with caching off.
        return self.enable_prefix_caching or request.cache_salt != 0

    def _pop_free(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            del self._index[key]
            self._keys[block] = None
        self._prefix_ids[block] = None
        self._ref_counts[block] = 1
        return block


def _root(request: Request) -> int:
    """Parent id of a first page: negative, one per salt, never the id of a page."""
    return -1 - request.cache_salt
