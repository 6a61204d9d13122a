"""Chat templates: rendered as by transformers, and bounded whatever they try."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest

from nbllm import InvalidRequestError, chat_template
from nbllm.chat_template import render_chat_template

# Templates in the styles of well-known families.
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last_query < 0 and message.role == "user" and message.content is string %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}{{- '<|im_start|>assistant\\n' ~ content }}{%- endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>' + content + '</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}
{%- endif %}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n' %}
{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{% set start = '[INST] ' ~ (system if loop.first else '') %}
{{ bos_token ~ start ~ message['content'].strip() ~ ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' '  ~ message['content'] | trim ~ ' ' ~ eos_token }}
{% endif %}
{% endfor %}"""
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- set loop_messages = messages %}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- for message in loop_messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- tool_call.name + '(' }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' ~ arg_val ~ '"' }}{%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
        {{- ')<|eom_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ message.content ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages | rejectattr("role", "equalto", "system") %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == user_messages[-1] %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" and message["content"] %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- macro turn(role, text) -%}
{{ '<start_of_turn>' + role + '\\n' + text | trim + '<end_of_turn>\\n' }}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {%- if message['content'] is iterable and message['content'] is not string -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}{{ turn(role, part['text']) }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ turn(role, message['content'] or '') }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
LISTS = """{%- set ns = namespace(lines=[], count=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {%- set ns.lines = ns.lines + [message.role ~ ': ' ~ (message.content or '')] %}
    {%- set ns.count = ns.count + 1 %}
    {%- if ns.count >= 50 %}{%- break %}{%- endif %}
{%- endfor %}
{{- ns.lines | join('\\n') }} ({{ ns.count }}) {{ "%s/%d" % ('x', 3) }} {{ '{}-{}'.format(1, 2) }}
{{- messages | map(attribute='role') | unique | list }} {{ {'a': 1, 'b': (1, 2.5)} }}
{{- range(3) | sum }}{{ 'a' * 3 }}{{ "a\\nb" | indent(2) }}{{ 'x'.replace('x', 'y') | upper }}"""

DEEPSEEK = """{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}
{%- endif %}{% set ns = namespace(is_first=false, is_tool=false, system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}
{{'<|User|>' + message['content']}}
{%- elif message['role'] == 'assistant' and message['tool_calls'] is defined %}
{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls'] %}
{%- if not ns.is_first %}{{'<|Assistant|>'}}{%- set ns.is_first = true -%}{%- endif %}
{{'<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n```json\\n'}}
{{- tool['function']['arguments'] }}{%- endfor %}
{%- elif message['role'] == 'assistant' and message['content'] is not none %}
{%- if ns.is_tool %}{{'<|outputs|>' + message['content']}}{%- set ns.is_tool = false -%}
{%- else %}{{'<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token}}{%- endif %}
{%- elif message['role'] == 'tool' %}{%- set ns.is_tool = true -%}
{{'<|output|>' + message['content']}}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}"""
PHI = """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message
and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['tools'] }}
{% else %}{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}{% endif %}
{% endfor %}{{ '<|assistant|>' if add_generation_prompt else eos_token }}"""
VICUNA = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system = 'A chat between a user and an assistant.' %}{% endif %}
{% for message in loop_messages %}{% if loop.index0 == 0 %}{{ system ~ ' ' }}{% endif %}
{% if message['role'] == 'user' %}{{ 'USER: ' ~ message['content'] | trim ~ ' ' }}
{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'].strip() ~ '' }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
COMMAND = """{%- macro document(d) -%}{%- for key, value in d | items -%}
{{ key | title }}: {{ value | string | truncate(40) }}{{ "\\n" }}{%- endfor -%}{%- endmacro -%}
{{ bos_token }}{%- set names = [] -%}
{%- if tools -%}<|SYSTEM|>{% for tool in tools -%}
{%- set types = {"string": "str", "object": "dict"} -%}
{%- set p = tool.function.parameters -%}
def {{ tool.function.name }}({% for name, field in p.properties.items() | sort -%}
{{ name }}: {{ types[field.type] | default("Any", true) }}{{ ", " if not loop.last }}
{%- endfor %}) -> {{ types.get(p.type) }}: {{ tool.function.description | lower | wordcount }}
{% endfor %}{%- endif -%}
{%- for message in messages if message.role != "system" -%}
{%- filter replace("\\n\\n", "\\n") -%}
<|{{ message.role | upper }}|>{{ message.content | default("", true) }}
{%- if message.tool_calls %}{{ message.tool_calls[0] | tojson(indent=2) }}{% endif %}
{%- endfilter -%}
{%- endfor -%}{%- if documents %}{% for d in documents %}{{ document(d) }}{% endfor %}{% endif -%}
{{ messages | groupby("role") | map(attribute=0) | join(",") }}
{{- "<|CHATBOT|>" if add_generation_prompt else "" }}"""

STYLES = {
    "deepseek": DEEPSEEK,
    "phi": PHI,
    "vicuna": VICUNA,
    "command": COMMAND,
    "chatml": CHATML,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "lists": LISTS,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": "Größe <b>&</b> 'quotes'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "wetter", "arguments": {"city": "Köln", "n": 2}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "Hi! <ok> & 'so' 日本 👩‍👧"}],
    "system and turns": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " spaces "},
        {"role": "assistant", "content": "<think>\nhm</think>\n\nFine."},
        {"role": "user", "content": "And now?\n"},
    ],
    "tool round trip": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C", "name": "wetter"},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "part one"}]}],
    "two assistants": [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference(make_tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer("byte_level"), **SPECIAL)


def outcome(render: Any) -> str | None:
    try:
        return render()
    except Exception:
        return None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_template_gives_what_transformers_gives(
    style: str, conversation: str, reference: Any
) -> None:
    template, messages = STYLES[style], CONVERSATIONS[conversation]
    for tools in (None, TOOLS):
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": True, "enable_thinking": False, "date_string": "today"},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            expected = outcome(
                lambda tools=tools, options=options: reference.apply_chat_template(
                    messages, chat_template=template, tools=tools, tokenize=False, **options
                )
            )
            special = {"add_generation_prompt", "continue_final_message"}
            variables = {k: v for k, v in options.items() if k not in special}
            text = outcome(
                lambda tools=tools, options=options, variables=variables: render_chat_template(
                    template,
                    messages,
                    add_generation_prompt=options["add_generation_prompt"],
                    continue_final_message=options.get("continue_final_message", False),
                    tools=tools,
                    variables=SPECIAL | variables,
                )
            )
            assert text == expected, (tools is None, options)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_shows_a_question_and_most_show_tools(style: str) -> None:
    options: dict[str, Any] = {"add_generation_prompt": True, "variables": SPECIAL}
    for name in ("one question", "tool round trip"):
        messages = CONVERSATIONS[name]
        if name == "tool round trip" and style in ("llama 2", "vicuna"):
            with pytest.raises(InvalidRequestError, match=r"[Rr]oles"):
                render_chat_template(STYLES[style], messages, tools=TOOLS, **options)
        else:
            text = render_chat_template(STYLES[style], messages, tools=TOOLS, **options)
            assert messages[0]["content"] in text


def render(template: str, messages: Any = None) -> str:
    messages = messages or [{"role": "user", "content": "x" * 50}]
    return render_chat_template(template, messages, add_generation_prompt=True)


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "nested strings": "{% set s = 'a' * 90000 %}{% for a in s %}{% for b in s %}"
    "{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10**9) %}{% endfor %}",
    "range of a billion": "{{ range(1000000000) | list | length }}",
    "lipsum": "{{ lipsum(n=2000000) }}",
    "product": "{{ 'a' * 1000000000 }}",
    "product of a list": "{{ ['ab'] * 1000000000 }}",
    "padding": "{{ 'a'.ljust(1000000000) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent filter": "{{ '%1000000000d' | format(1) }}",
    "variable percent": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "variable format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "adding": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "unrolled": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "replacing": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}{{ ns.x }}",
    "replace filter": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}{{ ns.x }}",
    "joining": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}{% endfor %}{{ ns.x }}",
    "join filter": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}{{ ns.x }}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists as json": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "equal lists": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "dict calls": "{% set ns = namespace(x=1) %}{% for i in range(60) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "big numbers": "{% set ns = namespace(x=99) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "double recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(40) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "indentation": "{{ 'a\\nb' | indent(1000000000) }}",
    "json indentation": "{{ [1, [2]] | tojson(indent=100000000) }}",
    "batches": "{{ [1] | batch(1000000000, 0) | list }}",
    "slices": "{{ [1] | slice(1000000000, 0) | list }}",
    "sum of lists": "{{ ([[1] * 9000] * 9000) | sum(start=[]) | length }}",
    "much output": "{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attribute filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format attributes": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% for %}",
    "unknown filter": "{{ 1 | no_such_filter }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "{# " + "x" * 2_000_000 + " #}",
}


@pytest.mark.parametrize("is_short", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped_in_time_and_space(
    name: str, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_short:  # less than what users may take
        monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(InvalidRequestError) as caught:
        render(HOSTILE[name])
    assert time.perf_counter() - start < 2.0
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 256 * 1024
    assert len(str(caught.value)) < 1000


def test_a_template_can_be_hostile_again_and_again() -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            render(HOSTILE["product"])
    assert render("{{ messages[0].content }}") == "x" * 50


def test_reasoning_goes_by_all_its_names() -> None:
    template = "{{ messages[-1].reasoning_content }} {{ messages[-1].thinking }}"
    for name in ("reasoning", "thinking", "reasoning_content"):
        assert render(template, [{"role": "assistant", "content": "", name: "hm"}]) == "hm hm"


def test_long_conversations_are_no_problem() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    text = render_chat_template(CHATML, messages, add_generation_prompt=True)
    assert len(text) > 2_000_000
    assert render(LISTS, messages).count("user: word") == 50


def test_variables_cannot_replace_what_the_call_says() -> None:
    for name in ("messages", "tools", "add_generation_prompt", "chat_template", "tokenize"):
        with pytest.raises(InvalidRequestError, match=name):
            render_chat_template(
                "x", [{"role": "user"}], add_generation_prompt=True, variables={name: "y"}
            )


def test_messages_are_checked() -> None:
    for bad in ([], ["text"], [{"content": "no role"}]):
        with pytest.raises(InvalidRequestError) as caught:
            render_chat_template("x", bad, add_generation_prompt=True)  # type: ignore[arg-type]
        assert caught.value.parameter == "messages"


def test_the_templates_own_complaint_is_passed_on() -> None:
    with pytest.raises(InvalidRequestError, match="Roles must alternate"):
        render(LLAMA_2, CONVERSATIONS["two assistants"])


def test_the_last_message_can_be_continued() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "The answer is "},
    ]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert render_chat_template(CHATML, messages, **options).endswith("assistant\nThe answer is ")
    with pytest.raises(InvalidRequestError, match="exclude"):
        render_chat_template(
            CHATML, messages, add_generation_prompt=True, continue_final_message=True
        )
    with pytest.raises(InvalidRequestError, match="does not show"):
        render_chat_template("nothing", messages, **options)
