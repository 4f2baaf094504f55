"""Where a pod's node stands: zone and rack from the node's labels, for the worker's record.

It needs BATON_NODE_NAME (the downward API's spec.nodeName) and a service account that may get nodes. Placing work well
is worth a little; starting is worth more: whatever is wrong here is a log line, and no labels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from baton.k8s.api import Api, Unreadable, inside
from core.registry.records import MAX_LABELS

log = logging.getLogger(__name__)

NODE_NAME = "BATON_NODE_NAME"
RACK_LABEL = "BATON_RACK_LABEL"  # the variable that names the nodes' label
ZONE = "topology.kubernetes.io/zone"
RACK = "topology.kubernetes.io/rack"  # no standard: as many clusters call it
TIMEOUT_S = 2.0
MAX_CHARS = 63  # of a label's value in Kubernetes


def labels_from_node(environ: Mapping[str, str], open_api: Callable[[float], Api | None] = inside) -> dict[str, str]:
    """node, zone and rack as far as they are known; {} where this is no pod that asks for it. Takes 2 s at most."""
    node = environ.get(NODE_NAME, "")
    if not node:
        return {}
    api = open_api(TIMEOUT_S)
    if api is None:
        log.warning(
            "%s is set, but there is no service account or no `kubernetes` here: no labels of the node", NODE_NAME
        )
        return {"node": node[:MAX_CHARS]}
    try:
        found = api.read(f"/api/v1/nodes/{node}")
    except Unreadable as error:
        log.warning("no labels of the node %s: %s; may the service account get nodes?", node, error.reason)
        return {"node": node[:MAX_CHARS]}
    finally:
        api.close()
    of_node = (found.get("metadata") or {}).get("labels") or {}
    wanted = {"zone": ZONE, "rack": environ.get(RACK_LABEL) or RACK}
    known = {name: str(of_node[label])[:MAX_CHARS] for name, label in wanted.items() if of_node.get(label)}
    return {"node": node[:MAX_CHARS], **known}


def merged(given: Mapping[str, str], of_node: Mapping[str, str]) -> dict[str, str]:
    """What a flag says goes before what the node says. At most MAX_LABELS."""
    room = MAX_LABELS - len(given)
    more = [(name, value) for name, value in of_node.items() if name not in given][:room]
    return {**given, **dict(more)}
