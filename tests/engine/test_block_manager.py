"""BlockManager: no page is lost or owned twice, and only equal prefixes are shared."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nbllm import SamplingParams
from nbllm.engine.block_manager import BlockManager
from nbllm.engine.request import Request

SIZE = 4
MakeRequest = Callable[..., Request]


def compute(manager: BlockManager, request: Request, num_tokens: int | None = None) -> None:
    """Pretend that a step computed the request's tokens."""
    request.num_computed_tokens = request.num_tokens if num_tokens is None else num_tokens
    manager.register_full_blocks(request)


def test_a_finished_prompts_full_pages_are_found_by_an_equal_prompt(
    make_request: MakeRequest,
) -> None:
    manager = BlockManager(16, SIZE)
    first, second = make_request([1, 2, 3, 4, 5, 6, 7, 8, 9]), make_request([1, 2, 3, 4, 5, 6])
    assert manager.admit(first)
    compute(manager, first)
    pages = list(first.block_table)
    manager.free(first)
    assert manager.admit(second)
    assert second.num_computed_tokens == SIZE
    assert second.block_table[0] == pages[0]
    manager.check_integrity([second])


def test_one_token_is_always_left_to_compute(make_request: MakeRequest) -> None:
    manager = BlockManager(16, SIZE)
    first, again = make_request([1, 2, 3, 4, 5, 6, 7, 8]), make_request([1, 2, 3, 4, 5, 6, 7, 8])
    manager.admit(first)
    compute(manager, first)
    manager.admit(again)
    assert again.num_computed_tokens == SIZE


def test_equal_pages_after_different_prefixes_are_not_shared(make_request: MakeRequest) -> None:
    manager = BlockManager(16, SIZE)
    first = make_request([1, 1, 1, 1, 7, 7, 7, 7, 9])
    other = make_request([2, 2, 2, 2, 7, 7, 7, 7, 9])
    manager.admit(first)
    compute(manager, first)
    manager.admit(other)
    assert other.num_computed_tokens == 0
    assert not set(first.block_table) & set(other.block_table)


def test_a_salt_of_its_own_keeps_pages_private(make_request: MakeRequest) -> None:
    manager = BlockManager(16, SIZE)
    first = make_request([1, 2, 3, 4, 5], cache_salt=1)
    same_salt = make_request([1, 2, 3, 4, 5], cache_salt=1)
    no_salt = make_request([1, 2, 3, 4, 5])
    manager.admit(first)
    compute(manager, first)
    assert manager.find_cached_blocks(same_salt) == first.block_table[:1]
    assert manager.find_cached_blocks(no_salt) == []


def test_prompt_logprobs_read_no_cached_pages(make_request: MakeRequest) -> None:
    manager = BlockManager(16, SIZE)
    first = make_request([1, 2, 3, 4, 5])
    scored = make_request([1, 2, 3, 4, 5], params=SamplingParams(prompt_logprobs=1))
    manager.admit(first)
    compute(manager, first)
    assert manager.find_cached_blocks(scored) == []


def test_the_least_recently_used_prefix_is_reused_first_and_its_end_before_its_start(
    make_request: MakeRequest,
) -> None:
    manager = BlockManager(6, SIZE)  # five usable pages
    old, new = make_request([1] * 8), make_request([2] * 8)
    for request in (old, new):
        manager.admit(request)
        compute(manager, request)
        manager.free(request)
    taker = make_request([3] * 8)  # the empty page, then the last page of `old`
    manager.admit(taker)
    assert len(manager.find_cached_blocks(make_request([1] * 9))) == 1
    assert len(manager.find_cached_blocks(make_request([2] * 9))) == 2


def test_admission_takes_all_pages_or_none(make_request: MakeRequest) -> None:
    manager = BlockManager(4, SIZE)
    assert not manager.admit(make_request([1] * 13))
    assert manager.num_free_blocks == 3
    manager.check_integrity([])


def test_pages_whose_content_is_in_doubt_are_not_found_again(make_request: MakeRequest) -> None:
    manager = BlockManager(8, SIZE)
    request = make_request([1] * 9)
    manager.admit(request)
    compute(manager, request)
    assert sorted(manager.forget_content(request)) == sorted(request.block_table)
    manager.free(request)
    assert manager.find_cached_blocks(make_request([1] * 9)) == []
    manager.check_integrity([])


def test_a_cache_without_a_usable_page_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockManager(1, SIZE)


class BlockManagerMachine(RuleBasedStateMachine):
    """Any order of operations keeps the accounting exact and the cache truthful."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(10, SIZE)
        self.live: list[Request] = []
        self.written: dict[int, tuple[int, ...]] = {}  # page -> the whole prefix it ends
        self.num_requests = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from([0, 0, 5])
    )
    def admit(self, prompt: list[int], salt: int) -> None:
        self.num_requests += 1
        token_ids = array("I", prompt)
        request = Request(
            f"r{self.num_requests}", token_ids, len(prompt), SamplingParams(), 8, 0, cache_salt=salt
        )
        if not self.manager.admit(request):
            return
        self.live.append(request)
        for i in range(request.num_computed_tokens // SIZE):
            expected = (salt, *prompt[: (i + 1) * SIZE])
            assert self.written[request.block_table[i]] == expected, "a foreign prefix was shared"
        assert request.num_computed_tokens < request.num_tokens

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        request.num_computed_tokens = data.draw(
            st.integers(request.num_computed_tokens, request.num_tokens)
        )
        for i in range(request.num_computed_tokens // SIZE):
            prefix = (request.cache_salt, *request.token_ids[: (i + 1) * SIZE])
            self.written[request.block_table[i]] = prefix
        self.manager.register_full_blocks(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        request = data.draw(st.sampled_from(self.live))
        if self.manager.grow(request, request.num_tokens + 1):
            request.token_ids.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), doubt=st.booleans())
    def free(self, data: st.DataObject, doubt: bool) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        if doubt:
            self.manager.forget_content(request)
        self.manager.free(request)

    @rule()
    def drop_cached_prefixes(self) -> None:
        self.manager.drop_cached_prefixes()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_integrity(self.live)


BlockManagerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
TestAnyOrderOfOperations = BlockManagerMachine.TestCase
