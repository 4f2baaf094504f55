"""Asks the service for one completion, as a client would; exits with 0 when it has come. Run by `helm test`."""

import json
import sys
import time
import urllib.error
import urllib.request

URL, PATIENCE_S = sys.argv[1], float(sys.argv[2])


def ask(path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def completion() -> str:
    model = ask("/v1/models")["data"][0]["id"]
    answer = ask("/v1/completions", {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0})
    tokens = answer["usage"]["completion_tokens"]
    if tokens < 1:
        raise ValueError(f"no token in {answer}")
    return f"{model}: {tokens} tokens: {answer['choices'][0]['text']!r}"


until_s = time.monotonic() + PATIENCE_S
while True:
    try:
        print(completion())
        sys.exit(0)
    except (OSError, ValueError, LookupError) as error:
        print(f"not yet: {type(error).__name__}: {error}", flush=True)
    if time.monotonic() > until_s:
        sys.exit(f"{URL} gave no completion within {PATIENCE_S:.0f} s")
    time.sleep(2)
