"""The official client of OpenAI's interface, unaltered, against the front: whatever it cannot read is an error here.

Usage: judge.py BASE_URL TOKEN. Prompts hold directives of the mock that stands behind the front.
"""

import asyncio
import json
import sys
import time

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

base_url, token = sys.argv[1:3]
client = OpenAI(base_url=base_url, api_key=token, max_retries=0, timeout=30)
MODEL = "mock/m"


def user(text):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Size(BaseModel):
    kilograms: int


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=user("[[say:Grüße 🥊]]"), max_tokens=50, temperature=0.5)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Grüße 🥊", "stop"), answer
    assert answer.usage.prompt_tokens > 0 and answer.usage.completion_tokens > 0, answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer
    assert answer.object == "chat.completion" and answer.id and answer.created > 1_700_000_000, answer


def chat_stream():
    text, finishes, usage, count = "", [], None, 0
    stream = client.chat.completions.create(
        model=MODEL, messages=user("[[say:one two three four five six]]"), stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk", chunk
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            count += 1
            if choice.finish_reason:
                finishes.append(choice.finish_reason)
    assert (text, finishes) == ("one two three four five six", ["stop"]) and count > 4, (text, finishes, count)
    assert usage and usage.completion_tokens > 0, usage


def chat_tools():
    question = '[[tool:weather {"city":"Oslo"}]]'
    answer = client.chat.completions.create(model=MODEL, messages=user(question), tools=[WEATHER], tool_choice="auto")
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls", answer
    call = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"}), answer
    again = user("[[say:It rains.]]")
    again[1:1] = [{"role": "user", "content": "How is it?"}, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    answer = client.chat.completions.create(model=MODEL, messages=again, tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains.", answer

    with client.chat.completions.stream(model=MODEL, messages=user(question), tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    call = final.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"}), final


def chat_shape():
    parsed = client.chat.completions.parse(
        model=MODEL, messages=user('[[say:{"kilograms": 90}]]'), response_format=Size
    )
    assert parsed.choices[0].message.parsed == Size(kilograms=90), parsed
    try:
        client.chat.completions.parse(model=MODEL, messages=user('[[say:{"pounds": 90}]]'), response_format=Size)
        raise AssertionError("an answer of another shape was passed on")
    except openai.APIStatusError as error:
        assert error.code == "schema_mismatch", error


def responses():
    answer = client.responses.create(model=MODEL, instructions="Be brief.", input="[[say:Grüße]]", max_output_tokens=50)
    assert (answer.output_text, answer.status) == ("Grüße", "completed"), answer
    assert answer.usage.input_tokens > 0 and answer.usage.total_tokens > answer.usage.input_tokens, answer
    tool = {"type": "function", **WEATHER["function"]}
    answer = client.responses.create(model=MODEL, input='[[tool:weather {"city":"Oslo"}]]', tools=[tool])
    call = next(item for item in answer.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"}), answer
    answer = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "How is it?"},
            {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
            {"role": "user", "content": "[[say:It rains.]]"},
        ],
        tools=[tool],
    )
    assert answer.output_text == "It rains.", answer
    parsed = client.responses.parse(model=MODEL, input='[[say:{"kilograms": 7}]]', text_format=Size)
    assert parsed.output_parsed == Size(kilograms=7), parsed


def responses_stream():
    kinds, text = [], ""
    for event in client.responses.create(model=MODEL, input="[[say:one two three four]]", stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == "one two three four", (text, kinds)
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    with client.responses.stream(
        model=MODEL, input='[[tool:weather {"city":"Oslo"}]]', tools=[{"type": "function", **WEATHER["function"]}]
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    call = next(item for item in final.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Oslo"}, final


def models():
    names = [model.id for model in client.models.list()]
    assert MODEL in names, names


def refused(kind, status, code, call):
    try:
        call()
    except kind as error:
        assert (error.status_code, error.code) == (status, code), (error.status_code, error.code, error)
        assert error.message and error.body, error
        return
    raise AssertionError(f"{kind.__name__} was expected")


def errors():
    # A provider that knows no key or no model is left alone for a while: each of those has a model of its own.
    def ask(text, of=client, model=MODEL, **more):
        return lambda: of.chat.completions.create(model=model, messages=user(text), **more)

    stranger = OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
    refused(openai.AuthenticationError, 401, "invalid_api_key", ask("x", stranger))
    refused(openai.BadRequestError, 400, "unsupported_parameter", ask("x", n=3))
    refused(openai.BadRequestError, 400, "invalid_request", ask("[[status:400]]"))
    refused(openai.BadRequestError, 400, "invalid_request", lambda: client.chat.completions.create(model=MODEL, messages=[]))
    refused(openai.NotFoundError, 404, "model_not_found", ask("[[status:404]]", model="mock/gone"))
    # What the provider refuses is not its caller's key.
    refused(openai.InternalServerError, 502, "provider_auth", ask("[[status:401]]", model="mock/locked"))
    # Whatever was worth trying again has been: the client must not do it once more.
    eager = OpenAI(base_url=base_url, api_key=token, max_retries=5)
    began = time.monotonic()
    refused(openai.BadRequestError, 400, "invalid_request", ask("[[status:400]]", eager))
    refused(openai.InternalServerError, 502, "provider_auth", ask("[[status:401]]", eager, "mock/closed"))
    assert time.monotonic() - began < 5
    blocked = client.chat.completions.create(model=MODEL, messages=user("[[blocked]]"))
    assert blocked.choices[0].finish_reason == "content_filter", blocked


async def many():
    async with AsyncOpenAI(base_url=base_url, api_key=token, max_retries=0) as several:
        calls = [several.chat.completions.create(model=MODEL, messages=user(f"[[say:answer {n}]]")) for n in range(50)]
        for n, answer in enumerate(await asyncio.gather(*calls)):
            assert answer.choices[0].message.content == f"answer {n}", (n, answer)


for check in [chat, chat_stream, chat_tools, chat_shape, responses, responses_stream, models, errors]:
    check()
    print("ok", check.__name__)
asyncio.run(many())
print("ok many")
