"""Sends one message with the default Anthropic client: everything comes from the environment."""
import sys

import anthropic

try:
    client = anthropic.Anthropic().with_options(timeout=5.0, max_retries=0)
    message = client.messages.create(
        model="claude-3-5-sonnet-latest",
        max_tokens=64,
        messages=[{"role": "user", "content": "hello"}],
    )
    print(message.content[0].text)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
