"""The endpoints around generation: which models there are, whether the service lives, what it counts, tokens of a
text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from starlette.requests import Request
from starlette.responses import Response

from core.errors import InvalidRequest, NoCapacity
from router.cluster_view import ClusterView
from router.exposition import merge
from router.limits import Limits, ServedModel
from router.metrics import RouterMetrics
from router.model_names import check_model
from router.openai_chat import conversation
from router.path_survey import PathSurvey
from router.prompts import Prompts
from router.reply import json_text
from router.sampling_fields import refuse_unsupported
from router.validation import Fields, token_ids

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def json_response(value: object) -> Response:
    return Response(json_text(value), media_type="application/json")


@dataclass(frozen=True, slots=True)
class Models:
    """GET /v1/models and /v1/models/{id}"""

    model: ServedModel

    async def every(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._card(name) for name in self.model.names]})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_model(name, self.model)
        return json_response(self._card(name))

    def _card(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "baton",
            "root": self.model.names[0],
            "parent": None,
            "max_model_len": self.model.context_tokens,
        }


@dataclass(frozen=True, slots=True)
class Operations:
    """GET /health, /metrics, /version. `health` goes through the workers' engine loops, and raises when they fail."""

    health: Callable[[], Awaitable[None]]
    worker_metrics: Callable[[], Awaitable[Sequence[str]]]
    metrics: RouterMetrics
    version: str
    limits: Limits

    async def get_health(self, _: Request) -> Response:
        try:
            async with asyncio.timeout(self.limits.health_timeout_s):
                await self.health()
        except TimeoutError:
            raise NoCapacity("the workers did not answer in time") from None
        return Response()

    async def get_metrics(self, _: Request) -> Response:
        """Workers that do not answer in time are left out: the router's own numbers always come."""
        pages: Sequence[str] = ()
        try:
            async with asyncio.timeout(self.limits.health_timeout_s):
                pages = await self.worker_metrics()
        except TimeoutError:
            pass
        return Response(merge([self.metrics.text(), *pages]), headers={"content-type": METRICS_TYPE})

    async def get_version(self, _: Request) -> Response:
        return json_response({"version": self.version})


@dataclass(frozen=True, slots=True)
class Paths:
    """GET /paths: how pages come from worker to worker. POST /paths/probe: the same, each path proved first."""

    survey: PathSurvey

    async def get_known(self, _: Request) -> Response:
        return json_response(asdict(await self.survey.known()))

    async def probe(self, _: Request) -> Response:
        return json_response(asdict(await self.survey.probed()))


@dataclass(frozen=True, slots=True)
class Cluster:
    """GET /cluster: routers, tiers, workers, hand-offs and latencies, as this router sees them."""

    look: Callable[[], Awaitable[ClusterView]]

    async def get(self, _: Request) -> Response:
        return Response(json.dumps((await self.look()).plain(), allow_nan=False), media_type="application/json")


@dataclass(frozen=True, slots=True)
class Tokens:
    """POST /tokenize and /detokenize, in vLLM's shapes. `model` may be left out here."""

    model: ServedModel
    limits: Limits
    prompts: Prompts

    async def tokenize(self, fields: Fields) -> object:
        self._check(fields)
        if fields.raw("messages") is not None:
            prompt = conversation(fields, self.limits)
            ids = await self.prompts.ids(prompt, fields.flag("add_special_tokens"), "messages")
        elif fields.raw("prompt") is not None:
            text = fields.text("prompt")
            ids = await self.prompts.tokenizer.encode(text, fields.flag("add_special_tokens", True))
        else:
            raise InvalidRequest("prompt: either prompt or messages is needed", param="prompt")
        spelled = None
        if fields.flag("return_token_strs"):
            spelled = [self.prompts.tokenizer.token_text(token_id) for token_id in ids]
        return {
            "count": len(ids),
            "max_model_len": self.model.context_tokens,
            "tokens": list(ids),
            "token_strs": spelled,
        }

    async def detokenize(self, fields: Fields) -> object:
        self._check(fields)
        ids = token_ids(fields.raw("tokens"), "tokens", self.model)
        return {"prompt": self.prompts.tokenizer.decode(ids, skip_special_tokens=False)}

    def _check(self, fields: Fields) -> None:
        refuse_unsupported(fields)
        if fields.raw("model") is not None:
            check_model(fields.text("model"), self.model)
