"""The API is what its OpenAPI document says: generated requests, on a pretended host, find nothing else.

Requests are drawn from the document (well-formed ones and mutilated ones), half of them about objects that exist. Every
answer must have a documented status, content type and body; none may be a 5xx, and a wrong request must be refused.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from corral import sync
from corral.client import local
from tests.integration.platform import wait_until

pytestmark = pytest.mark.timeout(400)
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance, negative_data_rejection, unsupported_method,
]  # fmt: skip
ENDLESS = ("/v1/watch", "/v1/vms/{ref}/hold")
"""What never ends by itself; everything else is asked for."""
EXAMPLES = 5
"""For each operation, well-formed and mutilated."""
NAMES = {"vms": "web", "images": "debian", "flavors": "small", "networks": "user", "projects": "default"}


def serving(state: Path, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, (state / "daemon.log").read_text()
    return local.listening(state)


@pytest.fixture(scope="module")
def daemon() -> Iterator[tuple[str, Path]]:
    """A daemon on a pretended host, with an image and a VM; its URL and log."""
    state = Path(tempfile.mkdtemp(prefix="corral-schema-", dir="/tmp"))
    state.chmod(0o711)
    with (state / "daemon.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "corral.server", "--state", str(state), "--listen", "127.0.0.1:0"],
            env={**os.environ, "CORRAL_ENGINE": "fake", "CORRAL_TEMPLATES": "off"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(lambda: serving(state, process), 30, "the daemon to serve")  # or connecting would start another
        with sync.connect(state=state) as client:
            (address,) = client.version()["listen"]
            client.tasks.wait(client.images.build("debian").tasks[0].id, timeout=20)
            client.vms.launch("debian", name="web", memory="128M")
        yield f"http://{address}", state / "daemon.log"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(state)


def about_what_exists(case: schemathesis.Case) -> None:
    """Have half of the requests go to objects that are there."""
    noun = re.match(r"/v1/(\w+)/\{ref\}", case.path)
    reference = str((case.path_parameters or {}).get("ref", ""))
    if noun and noun[1] in NAMES and reference and sum(reference.encode()) % 2 and case.method != "DELETE":
        case.path_parameters["ref"] = NAMES[noun[1]]
        case.query = {k: v for k, v in (case.query or {}).items() if k not in ("project", "follow")}


def expressible(case: schemathesis.Case) -> bool:
    """A query string has no lists in lists and no objects: what is one of these becomes another, valid request."""
    given = dict(case.query or {}).items()
    return not any(isinstance(v, dict) or (isinstance(v, list) and k != "label") for k, v in given)


def examples(operation: schemathesis.APIOperation, mode: GenerationMode) -> int:
    """How many. Where ``project`` is all that can be mutilated, which is in the same way everywhere, one: most of what
    is drawn of that is not expressible, and drawing is what takes the time."""
    plain = len(operation.query) <= 1 and all(body.media_type != "application/json" for body in operation.body)
    return 1 if plain and mode is GenerationMode.NEGATIVE else EXAMPLES


def test_every_answer_is_documented(daemon: tuple[str, Path]) -> None:
    schema = schemathesis.openapi.from_url(f"{daemon[0]}/openapi.json")
    schema.config.update(base_url=daemon[0])
    asked, failures = 0, []
    for found in schema.exclude(path=list(ENDLESS)).get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=examples(operation, mode), deadline=None, phases=[Phase.generate], derandomize=True, database=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                nonlocal asked
                assume(expressible(case))
                asked += 1
                about_what_exists(case)
                case.call_and_validate(checks=CHECKS, timeout=20)

            try:
                ask()
            except (schemathesis.errors.InvalidSchema, Unsatisfiable):
                continue  # nothing in this operation can be mutilated
            except BaseExceptionGroup as group:
                failures += [f"{operation.label} ({mode.value}): {error}" for error in group.exceptions]
            except Exception as error:
                failures.append(f"{operation.label} ({mode.value}): {type(error).__name__}: {error}")
    assert asked > 300
    assert not failures, "\n\n".join(failures)


def test_nothing_was_logged_as_a_bug(daemon: tuple[str, Path]) -> None:
    text = daemon[1].read_text()
    assert "Traceback" not in text, text[-4000:]
    assert "request failed" not in text, text[-4000:]
