"""RequestStream: readers in event loops hear of every change, at little cost to the engine."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

from nbllm.engine.request import Request
from nbllm.engine.request_stream import Progress, RequestStream

MakeRequest = Callable[..., Request]


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts the messages that other threads send it."""

    num_messages = 0

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> asyncio.Handle:
        self.num_messages += 1
        return super().call_soon_threadsafe(*arguments, **options)


def put_from_a_thread(streams: list[RequestStream], requests: list[Request]) -> None:
    def put() -> None:
        for stream, request in zip(streams, requests, strict=True):
            stream.put([request])

    thread = threading.Thread(target=put)
    thread.start()
    thread.join()


def test_all_readers_of_a_loop_are_woken_by_one_message(make_request: MakeRequest) -> None:
    streams = [RequestStream() for _ in range(20)]
    requests = [make_request([1, 2, 3]) for _ in streams]

    async def read_twice() -> list[list[Progress]]:
        taken: list[list[Progress]] = []
        for _ in range(2):
            waiting = [asyncio.ensure_future(stream.take_async()) for stream in streams]
            await asyncio.sleep(0)  # each comes to its wait
            put_from_a_thread(streams, requests)  # while this loop stands still
            taken += await asyncio.gather(*waiting)
        return taken

    loop = CountingLoop()
    try:
        taken = loop.run_until_complete(read_twice())
    finally:
        loop.close()
    assert taken == [[(request, 0)] for request in requests] * 2
    assert loop.num_messages == 2


def test_readers_in_several_loops_are_all_woken(make_request: MakeRequest) -> None:
    streams = [RequestStream() for _ in range(4)]
    requests = [make_request([1, 2, 3]) for _ in streams]
    ready = threading.Barrier(3)
    taken: list[list[Progress]] = []

    async def read(own: list[RequestStream]) -> None:
        waiting = [asyncio.ensure_future(stream.take_async()) for stream in own]
        await asyncio.sleep(0)
        ready.wait(10)
        taken.extend(await asyncio.wait_for(asyncio.gather(*waiting), 10))

    threads = [
        threading.Thread(target=lambda own=own: asyncio.run(read(own)))
        for own in (streams[:2], streams[2:])
    ]
    for thread in threads:
        thread.start()
    ready.wait(10)
    put_from_a_thread(streams, requests)
    for thread in threads:
        thread.join()
    assert sorted(map(str, taken)) == sorted(str([(request, 0)]) for request in requests)


def test_a_closed_loop_is_no_error_and_is_let_go(make_request: MakeRequest) -> None:
    stream, loop = RequestStream(), asyncio.new_event_loop()
    task = loop.create_task(stream.take_async())
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    closed = weakref.ref(loop)
    stream.put([make_request([1, 2, 3])])
    assert len(stream.take(timeout_s=0)) == 1
    del loop, task
    gc.collect()
    assert closed() is None
