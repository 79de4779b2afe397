"""The HTTP application: routes from the table of kinds, problem bodies, OpenAPI at ``/openapi.json``."""

from __future__ import annotations

from collections.abc import Iterable

from litestar import Litestar
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from corral.api import hold, kinds, metrics, sockets, system, vms, watch
from corral.api.gate import LOOPBACK, Gate
from corral.api.live import Live
from corral.api.problems import handlers
from corral.api.request import Shapes, StrictRequest, is_body, read_body
from corral.api.service import Service
from corral.model.strict import MAX_BODY
from corral.version import __version__

DESCRIPTION = """\
Everything takes and gives JSON. What takes time answers 202 with tasks; POST takes an `Idempotency-Key`; objects have
an `ETag`, PATCH takes `If-Match`. Errors are problem bodies (RFC 9457) with a stable `code`. Two websockets are not
shown here: `/v1/vms/{ref}/exec` and `/v1/vms/{ref}/console`.\
"""


def build(service: Service, live: Live, about: system.About, *, hosts: Iterable[str] = LOOPBACK) -> Gate:
    """The application in front of a service and a living host. ``about`` gives the fields of ``/v1/version``."""
    counted = metrics.Metrics()
    app = Litestar(
        route_handlers=[
            *system.routes(service, live, about), watch.route(service), hold.route(service), *vms.routes(service, live),
            *sockets.routes(service, live), *kinds.routes(service), metrics.route(service, live, counted),
        ],
        request_class=StrictRequest,
        plugins=[Shapes()],
        type_decoders=[(is_body, read_body)],
        exception_handlers=handlers(),
        request_max_body_size=MAX_BODY,
        openapi_config=OpenAPIConfig(
            title="Corral", version=__version__, description=DESCRIPTION, path="/",
            render_plugins=[JsonRenderPlugin(path="/openapi.json")],
        ),
        logging_config=None,
    )  # fmt: skip
    return Gate(app, service.rt.clock, counted.answered, hosts=hosts)  # type: ignore[arg-type]
