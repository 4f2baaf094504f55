"""HTTP and OpenAI gateway, admission, choice of workers, and the saga of one request. Never imports torch."""
