"""extract: typed columns by a schema that the engine enforces, however the schema is written."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import json
from typing import Any, Literal, TypedDict

import pandas as pd
import pydantic
import pytest
import typing_extensions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbllm
from nbllm import LLM, InvalidRequestError, SamplingParams
from nbllm.dataframe.schemas import parse, read_schema, schema_fields

TEXTS = [
    "Anna Keller lives in Oslo and works as a teacher.",
    "My name is Ben and I live in Rome.",
]


class Person(pydantic.BaseModel):
    name: str
    city: str | None


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Node(pydantic.BaseModel):
    value: int
    next: Node | None = None


@dataclasses.dataclass
class Size:
    width: int
    unit: str = "cm"


class PlainDict(TypedDict):
    name: str
    note: typing_extensions.NotRequired[str]


class Everything(pydantic.BaseModel):
    person: Person
    maybe: Person | None
    colour: Colour
    stars: Literal[1, 2, "many"] | None
    count: int
    share: float | None
    is_open: bool = True
    day: datetime.date
    moment: datetime.datetime
    tags: list[str]
    counts: dict[str, int]
    either: int | str
    size: Size


@pytest.fixture
def frame() -> pd.DataFrame:
    """Four rows, of which one is missing and one is too long; labels of the index occur twice."""
    return pd.DataFrame({"text": [*TEXTS, None, "word " * 2000]}, index=[5, 5, 1, 2])


def dtypes_of(schema: Any) -> dict[str, str]:
    return {field.name: field.dtype for field in schema_fields(read_schema(schema)[0])}


# -- schemas ---------------------------------------------------------------------------------------

UTC = "datetime64[ns, UTC]"


def test_every_type_has_its_dtype() -> None:
    assert dtypes_of(Everything) == {
        "person.name": "string",
        "person.city": "string",
        "maybe.name": "string",
        "maybe.city": "string",
        "colour": "category",
        "stars": "category",
        "count": "Int64",
        "share": "Float64",
        "is_open": "boolean",
        "day": "date",
        "moment": UTC,
        "tags": "object",
        "counts": "object",
        "either": "object",
        "size.width": "Int64",
        "size.unit": "string",
    }
    choices = {f.name: f.categories for f in schema_fields(read_schema(Everything)[0])}
    assert choices["colour"] == ("red", "blue")
    assert choices["stars"] == (1, 2, "many")


@pytest.mark.parametrize(
    "schema",
    [
        Person,
        dataclasses.make_dataclass("Person", [("name", str), ("city", str | None)]),
        TypedDict("Person", {"name": str, "city": str | None}),  # type: ignore[misc]
        typing_extensions.TypedDict("Person", {"name": str, "city": str | None}),  # type: ignore[misc]
        {"name": str, "city": str | None},
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "city": {"type": ["string", "null"]}},
            "required": ["name", "city"],
        },
    ],
)
def test_a_schema_may_be_written_in_many_ways(schema: Any) -> None:
    read, _ = read_schema(schema)
    assert read["required"] == ["name", "city"]
    assert dtypes_of(schema) == {"name": "string", "city": "string"}


def test_keys_that_may_be_left_out_stay_so() -> None:
    read, check = read_schema(PlainDict)
    assert read["required"] == ["name"] and check is not None
    assert dtypes_of(PlainDict) == {"name": "string", "note": "string"}
    fields = schema_fields(read_schema(Size)[0])
    assert parse('{"width": 3}', fields) == [3, "cm"]  # the default of the schema
    assert dtypes_of({"json": str, "first name": Colour}) == {
        "json": "string",
        "first name": "category",
    }


def test_a_schema_that_holds_itself_ends_in_an_object_column() -> None:
    assert dtypes_of(Node) == {"value": "Int64", "next": "object"}
    fields = schema_fields(read_schema(Node)[0])
    assert parse('{"value": 1, "next": {"value": 2}}', fields) == [1, {"value": 2}]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (int, "must be a pydantic model"),
        (7, "must be a pydantic model"),
        (list[int], "must be a pydantic model"),
        ({"a": object()}, "must be a pydantic model"),
        ({}, "named properties"),
        ({"type": "object"}, "named properties"),
        ({"type": "array", "items": {"type": "string"}}, "named properties"),
        ({"$ref": "#/$defs/none"}, "can't be read"),
        ({"properties": {"a.b": {}, "a": {"properties": {"b": {}}}}}, "named 'a.b'"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        dtypes_of(schema)
    assert caught.value.parameter == "schema"


@pytest.mark.parametrize(
    ("type_", "cell", "message"),
    [
        (int, str(2**63), "64 bits"),
        (int, "9" * 5000, "digits"),
        (datetime.datetime, '"3000-01-01T00:00:00Z"', "x: "),
        (datetime.date, '"2024-02-31"', "x: "),
        (Colour, '"green"', "none of the choices"),
    ],
)
def test_what_a_column_cannot_hold_is_an_error(type_: Any, cell: str, message: str) -> None:
    fields = schema_fields(read_schema({"x": type_})[0])
    with pytest.raises(ValueError, match=message):
        parse(f'{{"x": {cell}}}', fields)


MOMENT = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.timezone.utc)
VALUES: dict[str, tuple[Any, st.SearchStrategy[Any], str]] = {
    "text": (str, st.text(max_size=5), "string"),
    "number": (int, st.integers(-(2**63), 2**63 - 1), "Int64"),
    "share": (float, st.floats(allow_nan=False, allow_infinity=False), "Float64"),
    "flag": (bool, st.booleans(), "boolean"),
    "colour": (Literal["red", "blue"], st.sampled_from(["red", "blue"]), "category"),
    "day": (datetime.date, st.dates(), "object"),
    "moment": (datetime.datetime, st.just(MOMENT), UTC),
    "tags": (list[str], st.lists(st.text(max_size=2), max_size=2), "object"),
}


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_documents_come_back_as_columns(data: st.DataObject) -> None:
    """Any mix of types, plain, nullable or nested, and any values: what was written is read."""
    shape = st.sampled_from(["plain", "nullable", "nested"])
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, unique=True))
    shapes = {name: data.draw(shape) for name in names}
    types: dict[str, Any] = {}
    for name in names:
        kind = VALUES[name][0]
        inner = pydantic.create_model("Inner", it=(kind, ...))
        types[name] = {"plain": kind, "nullable": kind | None, "nested": inner}[shapes[name]]
    model = pydantic.create_model("Drawn", **{name: (t, ...) for name, t in types.items()})
    rows = data.draw(st.lists(st.fixed_dictionaries({n: VALUES[n][1] for n in names}), max_size=3))
    for row in rows:
        for name in names:
            if shapes[name] == "nullable" and data.draw(st.booleans()):
                row[name] = None
    documents = [
        model(**{n: {"it": v} if shapes[n] == "nested" else v for n, v in row.items()})
        for row in rows
    ]
    fields = schema_fields(read_schema(model)[0])
    assert [f.name for f in fields] == [f"{n}.it" if shapes[n] == "nested" else n for n in names]
    index = pd.Index([0] * len(rows))
    cells = [parse(document.model_dump_json(), fields) for document in documents]
    for place, (name, field) in enumerate(zip(names, fields, strict=True)):
        column = field.column([row[place] for row in cells], index)
        assert str(column.dtype) == VALUES[name][2]
        for value, row in zip(column.tolist(), rows, strict=True):
            assert (pd.isna(value) is True) if row[name] is None else value == row[name]


def test_half_a_surrogate_pair_does_not_spoil_the_column() -> None:
    (field,) = schema_fields(read_schema({"x": str})[0])
    cells = [parse(text, [field])[0] for text in ('{"x": "\\ud83d"}', '{"x": "\\ud83d\\udc4d"}')]
    column = field.column(cells, pd.RangeIndex(2))
    assert column.tolist() == ["\ufffd", "👍"]


# -- extract ---------------------------------------------------------------------------------------


def test_rows_become_typed_columns(llm: LLM, frame: pd.DataFrame) -> None:
    before = frame.copy()
    result = frame.llm.extract("text", Person)
    assert list(result.columns) == ["text", "name", "city", "extract_error"]
    assert result["name"].tolist() == ["Anna Keller", "Ben", pd.NA, pd.NA]
    assert result["city"].tolist() == ["Oslo", "Rome", pd.NA, pd.NA]
    assert str(result["name"].dtype) == "string"
    assert result["extract_error"].isna().tolist() == [True, True, True, False]
    assert "1024" in result["extract_error"].iloc[3]
    assert result.index.equals(frame.index)
    pd.testing.assert_frame_equal(frame, before)


def test_every_row_is_valid_whatever_the_model_would_say(llm: LLM, frame: pd.DataFrame) -> None:
    class Narrow(pydantic.BaseModel):
        city: Literal["Oslo", "Rome", "Paris"]
        is_person: bool
        stars: Literal[1, 2, 3] | None
        colour: Colour

    params = SamplingParams(temperature=1.5, seed=3, max_tokens=200)
    rows = pd.DataFrame({"text": TEXTS * 4})
    result = rows.llm.extract(
        "text", Narrow, sampling_params=params, include=("json", "finish"), dedupe=False
    )
    done = result[result["extract_error"].isna()]
    assert len(done) >= 4
    for text, row in zip(done["extract_json"], done.itertuples(), strict=True):
        document = Narrow.model_validate_json(text)
        assert (row.city, row.is_person, row.colour) == (
            document.city,
            document.is_person,
            document.colour.value,
        )
    assert list(result["city"].cat.categories) == ["Oslo", "Rome", "Paris"]
    assert list(result["stars"].cat.categories) == [1, 2, 3]
    assert str(result["is_person"].dtype) == "boolean"
    assert set(done["extract_finish"]) == {"stop"}


def test_a_document_that_is_cut_is_an_error_of_its_row(frame: pd.DataFrame) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (60, 5, 60, 60)]
    result = frame.llm.extract("text", Person, sampling_params=params)
    assert result["name"].isna().tolist() == [False, True, True, True]
    assert "cut by length after 5 tokens" in result["extract_error"].iloc[1]
    with pytest.raises(nbllm.RequestFailedError, match="cut by length"):
        frame.iloc[:2].llm.extract(
            "text", Person, sampling_params={"max_tokens": 5}, errors="raise"
        )


def test_validators_of_a_model_are_heard(frame: pd.DataFrame) -> None:
    class Northern(Person):
        @pydantic.field_validator("city")
        @classmethod
        def is_northern(cls, city: str) -> str:
            if city != "Oslo":
                raise ValueError("too far south")
            return city

    result = frame.iloc[:2].llm.extract("text", Northern)
    assert result["city"].tolist() == ["Oslo", pd.NA]
    assert "too far south" in result["extract_error"].iloc[1]


def test_it_is_greedy_unless_the_parameters_say_otherwise(llm: LLM, frame: pd.DataFrame) -> None:
    rows = frame.iloc[:2]
    plain = rows.llm.extract("text", Person, include=("json",))
    fields = rows.llm.extract(
        "text", Person, include=("json",), sampling_params={"max_tokens": 100}
    )
    pd.testing.assert_frame_equal(plain, fields)
    hot = {"temperature": 30.0, "seed": 1, "max_tokens": 30}
    other = rows.llm.extract("text", Person, include=("json",), sampling_params=hot)
    assert not other.equals(plain)


def test_names_may_have_a_prefix_and_more_columns_come_along(frame: pd.DataFrame) -> None:
    result = frame.llm.extract(
        "text", Person, prefix="who.", out="found", include=("json", "usage", "conf", "logprobs")
    )
    added = ["who.name", "who.city", "found_json", "found_error"]
    added += [f"found_{kind}_tokens" for kind in ("prompt", "cached", "completion")]
    added += ["found_conf", "found_logprobs"]
    assert list(result.columns) == ["text", *added]
    document = json.loads(result["found_json"].iloc[0])
    assert document == {"name": "Anna Keller", "city": "Oslo"}
    assert ((result["found_conf"] > 0.5) | result["found_conf"].isna()).all()


def test_an_instruction_asks_for_what_the_schema_names(
    llm: LLM, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    call = llm._call

    def spy(rows: Any) -> Any:
        rows = list(rows)
        seen.extend(prompt.text for prompt, _, _ in rows)
        return call(rows)

    monkeypatch.setattr(llm, "_call", spy)
    rows = frame.iloc[:1]
    rows.llm.extract("text", {"name": str, "city": str}, llm=llm)
    assert f"user\nExtract name and city from the text, as JSON.\n\n{TEXTS[0]}<" in seen.pop()
    rows.llm.extract("text", {"colour": Colour}, llm=llm, chat=False)
    assert '["red", "blue"]' in seen[0].split("\n\n")[0] and seen.pop().endswith(TEXTS[0])
    rows.llm.extract("Q: {text}", Person, llm=llm, chat=False, instruction="")
    assert seen.pop() == f"Q: {TEXTS[0]}"


def test_a_series_gives_a_frame(frame: pd.DataFrame) -> None:
    with pytest.warns(UserWarning, match="1 of 3 rows failed"):
        result = frame["text"].llm.extract(Person, template="{}")
    expected = frame.llm.extract("text", Person)
    pd.testing.assert_frame_equal(result, expected[["name", "city"]])


def test_the_twins_for_event_loops_give_the_same(frame: pd.DataFrame) -> None:
    rows = frame.iloc[:2]

    async def both() -> list[Any]:
        return [
            await rows.llm.aextract("text", Person),
            await rows["text"].llm.aextract(Person, errors="column"),
        ]

    whole, columns = asyncio.run(both())
    expected = rows.llm.extract("text", Person)
    pd.testing.assert_frame_equal(whole, expected)
    pd.testing.assert_frame_equal(columns, expected.drop(columns="text"))


def test_rows_are_found_in_the_journal_and_by_resume(llm: LLM, frame: pd.DataFrame) -> None:
    first = frame.llm.extract("text", Person, journal="people", include=("json",))
    before = llm.get_metrics()["generation_tokens"]
    again = nbllm.resume("people")
    assert llm.get_metrics()["generation_tokens"] == before
    assert nbllm.reproduce(again, "name")["same"].all()
    before = llm.get_metrics()["generation_tokens"]
    pd.testing.assert_frame_equal(again, first, check_dtype=False)
    again = frame.llm.extract("{text}", Person, journal="people", include=("json",))
    pd.testing.assert_frame_equal(again, first)
    assert llm.get_metrics()["generation_tokens"] == before


def test_overwrite_answers_only_rows_without_an_answer(llm: LLM, frame: pd.DataFrame) -> None:
    schema = {"name": str, "city": Literal["Oslo", "Rome"]}
    done = frame.llm.extract("text", schema)
    with pytest.raises(InvalidRequestError, match="prefix=") as caught:
        done.llm.extract("text", schema)
    assert caught.value.parameter == "prefix"
    done.iloc[0, done.columns.get_loc("name")] = "Corrected"
    done.iloc[3, 0] = TEXTS[1]
    before = llm.get_metrics()["num_steps"]
    again = done.llm.extract("text", schema, overwrite=True)
    assert llm.get_metrics()["num_steps"] > before
    assert again["name"].tolist() == ["Corrected", "Ben", pd.NA, "Ben"]
    assert again["city"].astype(object).tolist()[:2] == ["Oslo", "Rome"]
    assert again["extract_error"].isna().all() and again.dtypes.equals(done.dtypes)
    with pytest.raises(InvalidRequestError, match="'city'") as caught:
        done.llm.extract("text", {"name": str, "city": int}, overwrite=True)
    assert caught.value.parameter == "overwrite"


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"sampling_params": SamplingParams(n=2)}, "sampling_params"),
        ({"sampling_params": {"n": 2, "temperature": 1.0}}, "sampling_params"),
        ({"sampling_params": [SamplingParams()]}, "sampling_params"),
        ({"include": ("jsn",)}, "include"),
        ({"schema": {"type": "object", "properties": {"a": {"pattern": "(?=x)"}}}}, "schema"),
        ({"chat": "maybe"}, "chat"),
        ({"column_or_template": "txt"}, "column_or_template"),
    ],
)
def test_a_wrong_argument_is_named(
    frame: pd.DataFrame, options: dict[str, Any], parameter: str
) -> None:
    arguments = {"column_or_template": "text", "schema": Person} | options
    with pytest.raises(InvalidRequestError) as caught:
        frame.llm.extract(**arguments)
    assert caught.value.parameter == parameter


@given(data=st.data())
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_columns_stand_at_their_rows_whatever_the_frame(llm: LLM, data: st.DataObject) -> None:
    cells = st.sampled_from([*TEXTS, None, float("nan"), "\ud800"])
    values = data.draw(st.lists(cells, max_size=5))
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    frame = pd.DataFrame({"t": pd.Series(values, dtype=object), "x": 1, "y": 2})
    frame.index = pd.MultiIndex.from_arrays([labels, labels[::-1]], names=["a", "b"])
    frame.columns = ["t", "same", "same"]
    result = frame.llm.extract("t", Person)
    assert result.index.equals(frame.index) and result.index.names == ["a", "b"]
    known = dict(zip(TEXTS, ["Anna Keller", "Ben"], strict=True))
    expected = [known.get(value, pd.NA) for value in values]
    assert result["name"].tolist() == expected
    assert result["extract_error"].notna().tolist() == [value == "\ud800" for value in values]
