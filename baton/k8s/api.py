"""The API server, as plain JSON by path: bounded calls, errors of ours. The one file that imports `kubernetes`."""

from __future__ import annotations

import json
from typing import Any

from core.errors import ConfigError

TIMEOUT_S = 10.0
EXTRA = "it needs the extra `kubernetes`: pip install 'baton[kubernetes]'"


class Unreadable(Exception):
    """The API server did not answer with what was asked for. `status`: 0 when it did not answer at all."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Api:
    """Blocking. Made by `outside` or `inside`, or over a client of one's own."""

    def __init__(self, client: Any, timeout_s: float = TIMEOUT_S) -> None:
        self._client = client
        self._timeout_s = timeout_s

    def read(self, path: str) -> dict[str, Any]:
        """Raises Unreadable."""
        return self._call("GET", path, None)

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises Unreadable."""
        return self._call("POST", path, body)

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        client = self._client
        try:
            method, url, headers, sent, _ = client.param_serialize(
                method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            answer = client.call_api(method, url, headers, sent, _request_timeout=self._timeout_s)
            text = answer.read()
        except ApiException as error:
            raise Unreadable(int(error.status or 0), f"{error.status} {error.reason}") from error
        except (HTTPError, OSError) as error:
            raise Unreadable(0, f"{type(error).__name__}: {error}") from error
        if not 200 <= answer.status < 300:
            raise Unreadable(int(answer.status), f"{answer.status} {answer.reason}")
        return _object(text)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unreadable(0, "the answer is no JSON object")
    return found


def outside(context: str, timeout_s: float = TIMEOUT_S) -> tuple[Api, str]:
    """As kubectl would, and its namespace; inside a pod as that pod. Raises ConfigError."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ConfigError(f"{EXTRA} ({error})") from error
    settings = client.Configuration()
    settings.retries = False
    try:
        config.load_kube_config(context=context or None, client_configuration=settings)
        contexts, active = config.list_kube_config_contexts()
        chosen = next((item for item in contexts if item["name"] == context), active) if context else active
        namespace = str(chosen["context"].get("namespace", "default"))
    except config.ConfigException as error:
        if context:
            raise ConfigError(f"--context {context}: {error}") from error
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            raise ConfigError(f"no cluster: {error}; set KUBECONFIG, or run it in a pod") from error
        namespace = "default"
    return Api(client.ApiClient(settings), timeout_s), namespace


def inside(timeout_s: float) -> Api | None:
    """As the pod that this process runs in. None outside of one, or without the library."""
    try:
        from kubernetes import client, config
    except ImportError:
        return None
    settings = client.Configuration()
    settings.retries = False
    try:
        config.load_incluster_config(client_configuration=settings)
    except config.ConfigException:
        return None
    return Api(client.ApiClient(settings), timeout_s)
