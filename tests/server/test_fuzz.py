"""Bodies that no client would send: an answer below 500 to each, in time, and a server that lives.

Three kinds: JSON that is none or barely so (after the cases of JSONTestSuite), texts that trip
programs up (after the Big List of Naughty Strings), and right requests with a part made odd.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nbllm import LLM
from nbllm.server.serve import Server

Case = tuple[str, bytes]  # route, body

HANG_S = 5.0
NUM_CLIENTS = 8

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}
TALK: dict[str, Any] = {"input": "Hi", "max_output_tokens": 2}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": SCHEMA}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ROUND_TRIP = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "1"},
]
SAMPLING: list[dict[str, Any]] = [  # for all routes that generate
    {},
    {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 1},
    {"presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.1},
    {"logit_bias": {"5": 1.5}, "stop_token_ids": [7], "bad_words": ["zebra"]},
    {"stop": ["x", "yz"], "include_stop_str_in_output": True, "min_tokens": 1},
    {"allowed_token_ids": [5, 6, 7], "ignore_eos": True, "skip_special_tokens": False},
    {"structured_outputs": {"regex": "[ab]+c"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"structured_outputs": {"grammar": 'start: "a" | "b"'}},
    {"repetition_detection": {"max_pattern_size": 3, "min_count": 2}, "priority": 1},
    {"stop": "x", "vllm_xargs": {"a": 1}, "unknown": [None]},
    {"truncate_prompt_tokens": 20, "request_id": "me", "return_token_ids": True},
]
VARIANTS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {  # bases, options
    "/v1/completions": (
        [
            TEXT,
            TEXT | {"prompt": [1, 2, 3]},
            TEXT | {"prompt": [[1], [2, 3]], "n": 1},
            TEXT | {"prompt": ["a", "b"], "stream": True},
            TEXT | {"stream": True, "stream_options": {"include_usage": True}},
        ],
        [
            *SAMPLING,
            {"logprobs": 2, "echo": True},
            {"n": 2, "temperature": 1},
            {"max_tokens": 0, "echo": True},
        ],
    ),
    "/v1/chat/completions": (
        [
            CHAT,
            CHAT | {"messages": ROUND_TRIP},
            CHAT | {"stream": True, "stream_options": {"include_usage": True}},
        ],
        [
            *SAMPLING,
            {"logprobs": True, "top_logprobs": 2},
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"tools": [TOOL], "tool_choice": "required"},
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"messages": ROUND_TRIP, "chat_template_kwargs": {"a": 1}, "documents": [{"a": "b"}]},
            {"n": 2, "temperature": 1, "max_completion_tokens": 1},
        ],
    ),
    "/v1/responses": (
        [TALK, TALK | {"stream": True}, TALK | {"store": False, "instructions": "Be brief."}],
        [
            *SAMPLING,
            {"text": {"format": {"type": "json_object"}}, "metadata": {"a": "b"}},
            {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "f"}},
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "1"},
                ],
                "instructions": "Be brief.",
                "reasoning": {"effort": "low"},
            },
        ],
    ),
    "/v1/embeddings": (
        [{"input": "Hi"}, {"input": ["a", "b"]}, {"input": [1, 2]}],
        [
            {},
            {"encoding_format": "base64"},
            {"dimensions": 8},
            {"pooling": "mean"},
            {"priority": 1},
        ],
    ),
    "/tokenize": ([{"prompt": "Hi"}, CHAT], [{}, {"return_token_strs": True}]),
    "/detokenize": ([{"tokens": [1, 2]}, {"tokens": []}], [{}, {"model": "nbllm-demo"}]),
}
VALID = [
    (route, base | options)
    for route, (bases, variants) in VARIANTS.items()
    for base, options in itertools.product(bases, variants)
]
BASIC = {route: bases[0] for route, (bases, _) in VARIANTS.items()}

ODD: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, 5e-324, 0.5, "", "x" * 3000),
    *("\x00", "\ud800", "٣", "🧑‍🚀", "<|im_end|>", [], {}, [None], [[]], [[1], "a"]),
    *({"type": "json_schema"}, {"a": {"b": {}}}, {"$ref": "#"}, {"regex": "("}, [{"role": "x"}]),
]

# JSON that other readers take and we do not, that is barely JSON, or that is none.
MALFORMED: list[bytes] = [
    *rb"""
    [ ] { } [[ [] {} []] {}} [1,,2] [1,] [,1] [,] [1:2] 1] [1 [1, ["a" ["a {"a" {"a": {"a":1 {,}
    {"a":1,} {"a"::1} {"a":1,,"b":2} {a:1} {1:1} {'a':1} {"a":1}# {"a":1}// {"a":/**/1} {[]:1} {*}
    {"a":1}{"b":2} {"a":1,"a":2} {"":0} {"\u0000":0} {null:null} [+1] [01] [-01] [-] [--1] [.5]
    [-.5] [1.] [1.e1] [1e] [1e+] [1E-] [0x1] [0b1] [1_000] [0e1] [-0] [1e400] [-1e400] [1e-400]
    [NaN] [-NaN] [Infinity] [-Infinity] [Inf] [nan] [1a] [1.2a] [2.e3] [1+2] [0.e1] [9.e+] [true
    [tru] [True] [nul] nulll truee [None] [undefined] null true 1 "text" ["\x41"] ["\u"] ["\u12"]
    ["\u00G0"] ["\"] ["\a"] ["\ud800"] ["\udc00"] ["\ud800\ud800"] ["\ud83d\ude00"] ["\uDFAA"]
    ["\u0000"] ["\U0041"] ['a'] " "a \ * <null> <?xml?> a=1&b=2
    """.split(),
    *(
        b"",
        b" ",
        b"\n",
        b"[1 2]",
        b'{"a" 1}',
        b'{"a":1 "b":2}',
        b'{"a":"a" 1}',
        b"[1 000]",
        b"[- 1]",
    ),
    *(b'["\x00"]', b'["\x1f"]', b'["\n"]', b'["\t"]', b'["\x7f"]', b"\x00", b"{\x00}", b"\x0c{}"),
    *(b'["\\\xe9"]', b'["\xff"]', b'["\xc0\xaf"]', b'["\xe2\x82"]', b'["\xed\xa0\x80"]', b"\xa0{}"),
    *(
        b'["\xf4\x90\x80\x80"]',
        b'["\xf8\x88\x80\x80\x80"]',
        b'["\x80"]',
        b"[\xff]",
        b"\xe9",
        b"{}\xe5",
    ),
    *("{}".encode("utf-8-sig"), "{}".encode("utf-16"), "[1]".encode("utf-32-be"), b"\x1f\x8b\x08"),
    *(b"[" + b"9" * 5000 + b"]", b"[0." + b"3" * 5000 + b"]", b"[1e" + b"9" * 500 + b"]"),
    *(b"[" * 70, b"[" * 60 + b"]" * 60, b"[" * 70 + b"]" * 70, b"[" * 100_000 + b"]" * 100_000),
    *(b'{"a":' * 50_000, b"[" + b"[]," * 20_000 + b"[]]", b'["' + b"\\u0041" * 20_000 + b'"]'),
]
NAUGHTY: list[str] = [
    *(
        "null",
        "undefined",
        "NaN",
        "Infinity",
        "-0",
        "true",
        "1e309",
        "0x1F",
        "1/0",
        "1,000",
        "１２３",
    ),
    *("٣", "½", "<script>alert(1)</script>", "$(touch)", "`id`", "%s%n%x", "{{7*7}}", "${7*7}"),
    *("{0.__class__}", "%(a)s", "../../etc/passwd", "file:///", "CON", "http://169.254.169.254/"),
    *("👩‍👩‍👧‍👦", "🇩🇪🇩", "﷽", "ＡＢＣ", "日本語", "עברית", "اَلْعَرَبِيَّةُ", "𝔘𝔫𝔦", "ß", "İ", "ǅ"),
    *("<|im_end|>", "<|im_start|>system", "<|endoftext|>", "</s>", "<tool_call>", "[TOOL_CALLS]"),
    *("<think>", "<|channel|>final<|message|>", "nbllm-demo/../x", "system", "\\\\a\\b"),
    *("", " ", "\t", "\u00a0", "\u200b", "\ufeff", "\u2028", "\u202e", "\ufffe", "\x7f", "\x1b[2J"),
    *("\x00", "a\x00b", "\ud800", "\udfff", "a\ud83d", "\U0010ffff", "\U000e0041", "\r\n\r\n"),
    *("' OR 1=1 --", '"; DROP TABLE x', "{% for %}", "data: [DONE]", "a\r\nX: y", "9" * 400),
    *("a" * 5000, "e\u0301" * 200, "Z\u0335\u0322" * 90, "ﷺ" * 50),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with LLM(device="cpu", dtype="float32", max_model_len=96) as llm:
        # A limit for everybody: also for those whose `max_tokens` has become something else.
        llm.model_config.generation_config["max_new_tokens"] = 2
        with llm.serve() as server:
            yield server


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_in(item, (*path, key))


def replaced(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(body))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def mutate(rng: random.Random, body: dict[str, Any]) -> bytes:
    """One value of the body made odd or dropped, or some bytes of its text."""
    kind = rng.randrange(4)
    path = rng.choice([path for path in paths_in(body) if path])
    changed = body
    if kind == 0:
        changed = replaced(body, path, rng.choice(ODD + NAUGHTY))
    elif kind == 1:
        changed = replaced(body, path, rng.choice(ODD))
        changed = replaced(changed, path[:1], changed[path[0]])
    elif kind == 2:
        marked = json.dumps(replaced(body, path, "MARK"))
        return marked.encode().replace(b'"MARK"', rng.choice(MALFORMED), 1)
    text = bytearray(json.dumps(changed).encode())
    if kind == 3:
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        if rng.random() < 0.2:
            del text[rng.randrange(len(text)) :]
    return bytes(text)


def malformed_cases() -> Iterator[Case]:
    """Each malformed text as the body, as a value in a right body, and as a text in one."""
    for text, (route, body) in itertools.product(MALFORMED, BASIC.items()):
        yield route, text
        name = next(iter(body))
        value = json.dumps(body | {name: "MARK"}).encode()
        yield route, value.replace(b'"MARK"', text)
        yield route, json.dumps(body | {name: text.decode("latin-1")}).encode()


def naughty_cases() -> Iterator[Case]:
    """Each naughty text as the prompt, as another value, and as a name."""
    for text, (route, body) in itertools.product(NAUGHTY, BASIC.items()):
        name = next(iter(body))
        if name == "messages":
            yield route, json.dumps(replaced(body, ("messages", 0, "content"), text)).encode()
            yield route, json.dumps(replaced(body, ("messages", 0, "role"), text)).encode()
        yield route, json.dumps(body | {name: text}).encode()
        yield route, json.dumps(body | {"model": text}).encode()
        yield route, json.dumps(body | {"stop": [text], text: text, "request_id": text}).encode()


def mutated_cases(rng: random.Random) -> Iterator[Case]:
    while True:
        route, body = rng.choice(VALID)
        yield route, mutate(rng, body)


class Client:
    """One connection, which stays open; a new one if the server closes it."""

    def __init__(self, server: Server, *, asks_health: bool = False) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG_S)
        self._headers = {
            "Authorization": f"Bearer {server.api_key}",
            "Content-Type": "application/json",
        }
        self._asks_health = asks_health

    def send(self, case: Case) -> tuple[int, bytes]:
        route, body = case
        self._connection.request("POST", route, body, self._headers)
        reply = self._connection.getresponse()
        answer = reply.read()
        if self._asks_health:
            self._connection.request("GET", "/health")
            health = self._connection.getresponse()
            health.read()
            assert health.status == 200, case
        return reply.status, answer

    def close(self) -> None:
        self._connection.close()


def send_all(server: Server, cases: Iterable[Case], *, asks_health: bool) -> Counter[int]:
    """Send the cases over several connections; how many got which status."""
    queue = iter(list(enumerate(cases)))

    def work(client: Client) -> Counter[int]:
        counts: Counter[int] = Counter()
        for number, case in queue:
            try:
                status, answer = client.send(case)
            except OSError as error:
                raise AssertionError(f"{number}: {case[0]} {case[1][:500]!r}") from error
            assert status in (200, 400, 404), (number, case[0], case[1][:500], answer[:500])
            if status != 200:
                assert json.loads(answer)["error"]["message"]
            counts[status] += 1
        return counts

    clients = [Client(server, asks_health=asks_health) for _ in range(NUM_CLIENTS)]
    try:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            return sum(pool.map(work, clients), Counter())
    finally:
        for client in clients:
            client.close()


def check(server: Server, cases: Iterable[Case], *, asks_health: bool = False) -> None:
    counts = send_all(server, cases, asks_health=asks_health)
    assert min(counts[200], counts[400]) > counts.total() // 20, counts
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG_S)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def test_every_post_route_has_bodies() -> None:
    """A new route fails here until it is fuzzed, too."""
    from nbllm.server.app import _BODIES

    assert set(VARIANTS) == set(_BODIES)
    assert len(VALID) >= 200


def test_the_bodies_that_are_mutated_are_right_ones(server: Server) -> None:
    cases = [(route, json.dumps(body).encode()) for route, body in VALID]
    assert send_all(server, cases, asks_health=False) == {200: len(VALID)}


def test_no_body_is_answered_by_a_server_error(server: Server) -> None:
    rng = random.Random(0)
    every = [*malformed_cases(), *naughty_cases()]
    check(server, rng.sample(every, 150) + list(itertools.islice(mutated_cases(rng), 150)))


@pytest.mark.slow
def test_ten_thousand_bodies_are_answered_without_a_server_error(server: Server) -> None:
    cases = [*malformed_cases(), *naughty_cases()]
    num_more = 14_000 - len(cases)
    assert num_more > 8_000
    cases += itertools.islice(mutated_cases(random.Random(1)), num_more)
    check(server, cases, asks_health=True)
