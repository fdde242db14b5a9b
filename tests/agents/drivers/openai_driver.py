"""Sends one message with the default OpenAI client: everything comes from the environment."""
import sys

import openai

MESSAGES = [{"role": "user", "content": "hello"}]
try:
    if hasattr(openai, "OpenAI"):
        client = openai.OpenAI().with_options(timeout=5.0, max_retries=0)
        answer = client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        print(answer.choices[0].message.content)
    else:
        answer = openai.ChatCompletion.create(model="gpt-4o", messages=MESSAGES, request_timeout=5)
        print(answer["choices"][0]["message"]["content"])
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
