"""Structured outputs: every text follows its grammar, and nobody else notices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nbllm import LLM, InvalidRequestError, SamplingParams
from nbllm.errors import RequestFailedError
from nbllm.outputs import RequestOutput
from nbllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from nbllm.structured import grammar

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"const": 7}]},
    {
        "$defs": {"list": {"anyOf": [{"enum": [1, 2]}, {"items": {"$ref": "#/$defs/list"}}]}},
        "$ref": "#/$defs/list",
    },
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_model_len=512) as llm:
        yield llm


def params(structured: StructuredOutputsParams, **options: Any) -> SamplingParams:
    options = {"temperature": 1.0, "seed": 1, "max_tokens": 60} | options
    return SamplingParams(structured_outputs=structured, **options)


def generate(llm: LLM, structured: StructuredOutputsParams, **options: Any) -> RequestOutput:
    (output,) = llm.generate(["Say:"], params(structured, **options), use_tqdm=False)
    assert output.error is None, output.error
    return output


def text_of(llm: LLM, structured: StructuredOutputsParams, **options: Any) -> str:
    return generate(llm, structured, **options).outputs[0].text


def accepts(llm: LLM, schema: dict[str, Any], text: str) -> bool:
    """Whether a text is one that may be generated."""
    tokenizer = llm.get_tokenizer()
    assert llm._factory._make_constraint is not None and tokenizer.eos_token_id is not None
    constraint = llm._factory._make_constraint(StructuredOutputsParams(json=schema))
    try:
        for token_id in [*tokenizer.encode(text, False), tokenizer.eos_token_id]:
            constraint.accept(token_id)
    except RequestFailedError:
        return False
    return True


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:30])
def test_every_finished_text_is_valid_json_of_its_schema(llm: LLM, schema: dict[str, Any]) -> None:
    structured = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    outputs = llm.generate(
        ["Say:"] * 12, [params(structured, seed=seed) for seed in range(12)], use_tqdm=False
    )
    finished = [o.outputs[0] for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert finished
    for completion in finished:
        jsonschema.validate(json.loads(completion.text), schema)


def test_a_choice_is_one_of_its_texts(llm: LLM) -> None:
    choices = ["positive", "negative", "neither of the two"]
    structured = StructuredOutputsParams(choice=choices)
    texts = {text_of(llm, structured, seed=seed) for seed in range(8)}
    assert texts <= set(choices) and len(texts) > 1
    output = generate(llm, structured).outputs[0]
    assert output.finish_reason == "stop"


def test_a_regex_is_matched_as_a_whole(llm: LLM) -> None:
    text = text_of(llm, StructuredOutputsParams(regex=r"\d{3}-\d{4}"))
    assert re.fullmatch(r"\d{3}-\d{4}", text)


@pytest.mark.parametrize(
    "text",
    ['start: NUMBER ("+" NUMBER)+\nNUMBER: /[0-9]/', 'root ::= [0-9] ("+" [0-9])+'],
    ids=["lark", "gbnf"],
)
def test_a_grammar_may_be_lark_or_gbnf(llm: LLM, text: str) -> None:
    output = generate(llm, StructuredOutputsParams(grammar=text), max_tokens=40).outputs[0]
    assert re.fullmatch(r"\d(\+\d)*\+?", output.text)
    if output.finish_reason == "stop":
        assert re.fullmatch(r"\d(\+\d)+", output.text)


def test_a_json_object_is_any_object(llm: LLM) -> None:
    structured = StructuredOutputsParams(json_object=True)
    outputs = [generate(llm, structured, seed=seed).outputs[0] for seed in range(6)]
    assert all(output.text.lstrip().startswith("{") for output in outputs)
    for output in outputs:
        if output.finish_reason == "stop":
            assert isinstance(json.loads(output.text), dict)


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "has_more"),
    [
        (OPEN, False),
        ({"type": "array", "items": OPEN}, False),
        (OPEN | {"additionalProperties": True}, True),
        ({"allOf": [OPEN, {"properties": {"b": {"type": "integer"}}}]}, True),
        ({"anyOf": [OPEN, {"type": "null"}]}, False),
        ({"properties": {}, "anyOf": [OPEN]}, True),
        ({"type": "object"}, True),
    ],
    ids=str,
)
def test_objects_have_the_properties_that_are_named_unless_others_are_spoken_of(
    llm: LLM, schema: dict[str, Any], has_more: bool
) -> None:
    def as_instance(value: Any) -> str:
        return json.dumps([value] if schema.get("type") == "array" else value)

    assert accepts(llm, schema, as_instance({"a": 1}))
    assert accepts(llm, schema, as_instance({"a": 1, "b": 2})) == has_more


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_json_may_be_on_one_line_or_indented(llm: LLM, indent: int | None) -> None:
    assert accepts(llm, PERSON, json.dumps({"name": "A", "age": 3, "tags": ["a"]}, indent=indent))


def test_blanks_do_not_go_on_without_end(llm: LLM) -> None:
    assert not accepts(llm, PERSON, '{"name":  "A", "age": 3}')
    structured = StructuredOutputsParams(json=PERSON)
    outputs = [generate(llm, structured, seed=seed).outputs[0] for seed in range(4)]
    assert [output.finish_reason for output in outputs] == ["stop"] * 4


def test_a_structural_tag_constrains_what_is_between_its_tags(llm: LLM) -> None:
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {"const": 1}, "end": "</f>"}],
        "triggers": ["<f>"],
    }
    structured = StructuredOutputsParams(structural_tag=json.dumps(tag))
    bias = {llm._tokenizer.encode("<", add_special_tokens=False)[0]: 30.0}  # type: ignore[union-attr]
    text = text_of(llm, structured, logit_bias=bias, max_tokens=30)
    assert re.fullmatch(r"(?s)(<f>1</f>|(?!<f>).)*(<f>?1?(</?f?)?)?", text), text


def test_others_in_the_batch_are_as_without_it(llm: LLM) -> None:
    plain = SamplingParams(temperature=0.8, seed=3, max_tokens=12)
    (alone,) = llm.generate(["Once"], plain, use_tqdm=False)
    structured = params(StructuredOutputsParams(regex="[ab]{10,30}"))
    outputs = llm.generate(
        ["Once", "Once", "Once"], [structured, plain, structured], use_tqdm=False
    )
    assert outputs[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert outputs[0].outputs[0].text == outputs[2].outputs[0].text
    assert set(outputs[0].outputs[0].text) <= {"a", "b"}


def test_each_of_several_continuations_has_a_state_of_its_own(llm: LLM) -> None:
    output = generate(llm, StructuredOutputsParams(regex="[a-z]{6}"), n=4)
    texts = [completion.text for completion in output.outputs]
    assert all(re.fullmatch("[a-z]{6}", text) for text in texts) and len(set(texts)) > 1


def test_a_stream_adds_up_to_the_whole(llm: LLM) -> None:
    structured = StructuredOutputsParams(json=PERSON)
    whole = text_of(llm, structured, seed=4)
    options = params(structured, seed=4, output_kind=RequestOutputKind.DELTA)
    pieces = [output.outputs[0].text for output in llm.stream("Say:", options)]
    assert "".join(pieces) == whole and len(pieces) > 3


def test_a_text_that_is_preempted_goes_on_in_its_grammar() -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 8}
    rows = [params(StructuredOutputsParams(regex="[ab]{60}"), seed=seed) for seed in range(4)]
    prompts = ["Once upon a time"] * 4
    with LLM(max_model_len=128, **options) as roomy:
        expected = roomy.generate(prompts, rows, use_tqdm=False)
    with LLM(max_model_len=128, num_gpu_blocks_override=18, **options) as tight:
        outputs = tight.generate(prompts, rows, use_tqdm=False)
        assert tight.get_metrics()["num_preemptions"] > 0
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in expected]
    assert all(re.fullmatch("[ab]{60}", o.outputs[0].text) for o in outputs)


def test_the_end_of_a_grammar_ends_the_text_whatever_else_is_asked_for(llm: LLM) -> None:
    structured = StructuredOutputsParams(choice=["yes"])
    for options in ({"ignore_eos": True}, {"min_tokens": 20}):
        output = generate(llm, structured, **options).outputs[0]
        assert (output.text, output.finish_reason) == ("yes", "stop")


def generate_with_failures(llm: LLM, prompts: Any, rows: Any) -> list[RequestOutput]:
    with pytest.warns(UserWarning, match="prompts failed"):
        return llm.generate(prompts, rows, use_tqdm=False)


def test_a_text_that_is_left_no_token_fails_alone(llm: LLM) -> None:
    dead = params(StructuredOutputsParams(regex="b+"), bad_words=["b", "bb", "bbb", "bbbb"])
    alive = params(StructuredOutputsParams(regex="a{3}"))
    failed, fine = generate_with_failures(llm, ["x", "x"], [dead, alive])
    assert isinstance(failed.error, RequestFailedError) and "structured_outputs" in str(
        failed.error
    )
    assert fine.outputs[0].text == "aaa"


WRONG: dict[str, dict[str, Any]] = {
    "unclosed group": {"regex": "("},
    "foo": {"grammar": "start: foo"},
    "Invalid type": {"json": {"type": "zebra"}},
    "dependentSchemas": {"json": {"type": "object", "dependentSchemas": {}}},
    "no valid JSON": {"json": "{"},
    "number out of range": {"json": {"const": 10**400}},
    "hex escape": {"json": {"const": "\ud800"}},
    "must be a JSON object": {"json": "[1]"},
    "schemas deep": {"json": json.loads('{"not":' * 100 + "{}" + "}" * 100)},
    "brackets": {"regex": "(" * 129 + "a" + ")" * 129},
    "json_object": {"json_object": False},
    "structural_tag": {"structural_tag": "{}"},
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_grammar_fails_alone_and_says_why(llm: LLM, reason: str) -> None:
    wrong = params(StructuredOutputsParams(**WRONG[reason]))
    right = SamplingParams(max_tokens=2)
    failed, fine = generate_with_failures(llm, ["a", "b"], [wrong, right])
    assert isinstance(failed.error, InvalidRequestError)
    assert failed.error.parameter == "structured_outputs"
    assert reason in str(failed.error)
    assert fine.error is None


@pytest.mark.parametrize(
    ("kind", "limit", "make"),
    [
        ("regex", grammar.MAX_REGEX_BYTES, lambda size: "a" * size),
        ("grammar", grammar.MAX_GRAMMAR_BYTES, lambda size: 'start: "a" //'.ljust(size, "x")),
        (
            "json",
            grammar.MAX_SCHEMA_BYTES,
            lambda size: json.dumps({"type": "null", "title": "x" * (size - 29)}),
        ),
    ],
)
def test_sizes_are_bounded(llm: LLM, kind: str, limit: int, make: Callable[[int], str]) -> None:
    for size, fits in ((limit - 1, True), (limit, True), (limit + 1, False)):
        text = make(size)
        assert len(text) == size
        structured = StructuredOutputsParams(**{kind: text})
        run = llm.generate if fits else partial(generate_with_failures, llm)
        (output,) = run(["x"], params(structured, max_tokens=1))
        assert (output.error is None) == fits, output.error


def test_without_a_tokenizer_the_parameter_is_named(
    make_checkpoint: Callable[..., tuple[Path, Any]],
) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    with LLM(str(folder), skip_tokenizer_init=True, device="cpu") as llm:
        structured = params(StructuredOutputsParams(choice=["a"]))
        (output,) = generate_with_failures(llm, [[1, 2]], structured)
    assert isinstance(output.error, InvalidRequestError)
    assert output.error.parameter == "structured_outputs"


# Schema, instances that are valid, instances that are not: by the rules of JSON Schema.
CORPUS: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "integer"}, [0, -3, 12345678901234567890], ["0", 1.5, None, [], {}]),
    ({"type": "number", "minimum": 2, "exclusiveMaximum": 5}, [2, 4.5], [1, 5, 7]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü"], ["a", "abcd", 5]),
    ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", 2, False]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1}, [[1], [1, 2]], [[], ["a"]]),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, [[1]], [[2], [1, 2]]),
    (PERSON, [{"name": "A", "age": 3}], [{"name": "A"}, {"name": "A", "age": 121}, {}]),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["x", None], [1, []]),
    ({"allOf": [{"minimum": 2}, {"maximum": 3}], "type": "integer"}, [2, 3], [1, 4]),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), CORPUS, ids=lambda v: json.dumps(v)[:24])
def test_what_a_constraint_accepts_is_what_json_schema_accepts(
    llm: LLM, schema: dict[str, Any], valid: list[Any], invalid: list[Any]
) -> None:
    for instance in valid:
        jsonschema.validate(instance, schema)
        assert accepts(llm, schema, json.dumps(instance, ensure_ascii=False)), instance
    for instance in invalid:
        assert list(jsonschema.Draft202012Validator(schema).iter_errors(instance))
        assert not accepts(llm, schema, json.dumps(instance, ensure_ascii=False)), instance
