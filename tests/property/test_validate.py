"""Bad inputs: each is refused with its field and a code, together with everything else that is wrong, and never a crash."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.api.bodies import CreateFlavor, CreateImage, CreateVms
from corral.errors import CorralError, Invalid, Problem
from corral.model import FlavorSpec, ImageSpec, VmSpec, strict
from corral.model.shape import read, to_tree
from corral.model.validate import (
    MAX_CPUS,
    MAX_USER_DATA,
    MIN_MEMORY,
    accept,
    label_problems,
    name_problems,
    problems_of,
    public_key,
    timeout_problems,
)  # fmt: skip
from corral.units import MIB

BODY = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"k" * 32).decode()
KEY = f"ssh-ed25519 {BODY} me@laptop"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def problems(spec: dict[str, Any]) -> dict[str, Problem]:
    """What is said about a VM's spec, by field."""
    found, wrong = read(VmSpec, {"image": "debian", **spec}, "spec")
    return {p.field: p for p in [*wrong, *problems_of(found)]}


def refused(tree: Any, cls: type[Any] = CreateVms) -> list[str]:
    with pytest.raises(Invalid) as caught:
        accept(cls, tree, "", lambda body: iter(problems_of(body.spec)))
    return [p.field for p in caught.value.problems]


# Reading JSON


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 1}}', b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 40 + b"1" + b"}" * 40,
        b'{"a": NaN}', b"[Infinity]", b"[-Infinity]", b"[1e999]", b"[" + b"9" * 5000 + b"]", b'"\xff"', b'"\\ud800"',
        b'{"\\udfff": 1}', b"", b"{", b"nonsense", b"{}{}", b"[1,]", b"'a'",
    ],
)  # fmt: skip
def test_what_is_no_json_is_malformed(body: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        strict.loads(body)
    assert caught.value.code == "malformed"
    assert caught.value.http_status == 400


def test_a_large_body_is_too_large() -> None:
    with pytest.raises(CorralError) as caught:
        strict.loads(b" " * (strict.MAX_BODY + 1))
    assert caught.value.http_status == 413


@given(json_values)
def test_what_is_json_is_read_as_it_is(value: Any) -> None:
    text = json.dumps(value)
    if any(word in text for word in ("NaN", "Infinity", "\\ud")) or not small(value):
        return  # may be refused: the cases above say what is
    assert strict.loads(text.encode()) == value


def small(value: Any) -> bool:
    """No number in it is beyond what is taken."""
    if isinstance(value, list | dict):
        return all(small(item) for item in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) < 1 << 63


def test_brackets_inside_strings_do_not_count_as_depth() -> None:
    assert strict.loads(json.dumps({"user_data": "[{" * 5000}).encode()) == {"user_data": "[{" * 5000}


# Shape


def test_all_problems_are_told_at_once_with_their_paths() -> None:
    fields = refused(
        {
            "name": 7, "status": {"phase": "running"}, "meta": {"id": "x"}, "spec": {
                "image": "debian", "host": "other", "epoch": 3, "cpu": {"count": True, "cores": 2},
                "memory": {"size": "512M"}, "nics": [{"mac": "zz"}, 4], "power": "on", "ssh_keys": "key",
            },
        }
    )  # fmt: skip
    expected = {
        "name", "status", "meta", "spec.host", "spec.epoch", "spec.cpu.count", "spec.cpu.cores", "spec.memory.size",
        "spec.nics[0].mac", "spec.nics[1]", "spec.power", "spec.ssh_keys",
    }  # fmt: skip
    assert expected <= set(fields)


@pytest.mark.parametrize("value", [0, -1, 1e308, 1.5, float("inf"), True, None, "2", 1 << 63, 1 << 70, [], {}])
def test_cpus_and_memory_must_be_sane_numbers(value: Any) -> None:
    assert "spec.cpu.count" in problems({"cpu": {"count": value}})
    assert "spec.memory.size" in problems({"memory": {"size": value}})


@pytest.mark.parametrize("value", [0, -1, 9, 1e308, 1.5, True, "500", "10M", 1 << 63, [], {}])
def test_limits_of_a_disk_must_be_sane_numbers(value: Any) -> None:
    fields = ("iops", "bandwidth", "iops_burst", "bandwidth_burst")
    told = problems({"disk": dict.fromkeys(fields, value)})
    assert {f"spec.disk.{field}" for field in fields} <= set(told)
    assert "spec.nics[0].rate" in problems({"nics": [{"rate": value}]})


@pytest.mark.parametrize(
    ("disk", "field"),
    [
        ({"iops_burst": 500}, "iops_burst"), ({"bandwidth_burst": MIB}, "bandwidth_burst"),
        ({"iops": 500, "iops_burst": 499}, "iops_burst"), ({"iops": 500, "iops_burst": 900, "burst_s": 1}, "burst_s"),
        ({"bandwidth": 2 * MIB, "bandwidth_burst": MIB}, "bandwidth_burst"), ({"burst_s": 3601}, "burst_s"),
    ],
)  # fmt: skip
def test_a_burst_goes_beyond_a_limit(disk: dict[str, int], field: str) -> None:
    assert list(problems({"disk": disk})) == [f"spec.disk.{field}"]
    plan = {"memory": MIN_MEMORY, **{f"disk_{name}": value for name, value in disk.items()}}
    found, wrong = read(FlavorSpec, plan, "spec")
    assert [p.field for p in [*wrong, *problems_of(found)]] == [f"spec.disk_{field}"]


def test_limits_of_a_disk_that_make_sense_are_fine() -> None:
    disk = {"iops": 10, "iops_burst": 10, "bandwidth": 64 << 10, "bandwidth_burst": 64 << 30, "burst_s": 3600}
    assert problems({"disk": disk, "nics": [{"rate": 64 << 10}]}) == {}


def test_limits_themselves_are_fine() -> None:
    assert not problems({"cpu": {"count": MAX_CPUS}, "memory": {"size": MIN_MEMORY}})
    assert "spec.cpu.count" in problems({"cpu": {"count": MAX_CPUS + 1}})
    assert "spec.memory.size" in problems({"memory": {"size": MIN_MEMORY - MIB}})
    assert "multiple" in problems({"memory": {"size": MIN_MEMORY + 1}})["spec.memory.size"].expected


@given(json_values)
def test_any_tree_is_either_accepted_or_refused(tree: Any) -> None:
    for cls in (CreateVms, CreateImage, CreateFlavor):
        found, wrong = read(cls, tree)
        told = [*wrong, *problems_of(found.spec)]
        assert all(p.field and p.message for p in told)
        msgspec.json.encode([p._asdict() for p in told])  # may be told to anybody


@given(st.dictionaries(st.sampled_from([f.name for f in msgspec.structs.fields(VmSpec)]), json_values))
def test_any_value_of_a_known_field_is_either_accepted_or_refused(spec: dict[str, Any]) -> None:
    found, wrong = read(VmSpec, {"image": "debian", **spec}, "spec")
    assert isinstance(found, VmSpec)
    if not wrong and not problems_of(found):
        assert read(VmSpec, to_tree(found), "spec") == (found, [])


def test_a_hundred_thousand_keys_are_one_problem() -> None:
    labels = {f"k{n}": "v" for n in range(100_000)}
    assert refused({"spec": {"image": "debian"}, "labels": labels}) == ["labels"]


# Meaning


@pytest.mark.parametrize(
    "name",
    [
        "", "a\nb", "a\0", "..", ".", "-a", "a-", "A", "a_b", "a.b", "a/b", "ä", "a\u202eb", "x" * 64, "x" * 1_000_000,
        "--force", "web,file=/dev/sda", "web\nruncmd:", " web", "00000000-0000-0000-0000-000000000000",
    ],
)  # fmt: skip
def test_bad_names(name: str) -> None:
    (problem,) = name_problems(name)
    assert problem.field == "name"
    assert len(str(problem)) < 200
    assert str(problem).isprintable()


@pytest.mark.parametrize("name", ["a", "web", "web-1", "0", "x" * 63, "brave-otter"])
def test_good_names(name: str) -> None:
    assert not list(name_problems(name))


@pytest.mark.parametrize("field", ["image", "flavor", "hostname"])
@pytest.mark.parametrize("text", ["a\nruncmd:", "a,file=/dev/sda", "-a", "a b", "a\0", "../x", "x" * 300, "$(id)"])
def test_strings_that_go_far_have_strict_patterns(field: str, text: str) -> None:
    assert f"spec.{field}" in problems({field: text})


def test_cpu_model_and_network_have_strict_patterns() -> None:
    assert "spec.cpu.model" in problems({"cpu": {"model": "host,+vmx"}})
    assert "spec.nics[0].network" in problems({"nics": [{"network": "user,hostfwd=tcp::1-:1"}]})


@pytest.mark.parametrize(
    "key",
    [
        "", "ssh-ed25519", f'command="sh" {KEY}', f"no-pty {KEY}", f"{KEY}\n{KEY}", f"{KEY}\n", f"ssh-rsa {BODY}",
        "ssh-ed25519 AAAA", "ssh-dss " + BODY, f"ssh-ed25519  {BODY}", f"ssh-ed25519 {BODY}\0", "x" * 20_000,
        f"ssh-ed25519 {BODY} a\tb",
    ],
)  # fmt: skip
def test_keys_with_options_or_anything_odd_are_refused(key: str) -> None:
    assert not public_key(key)
    assert "spec.ssh_keys[0]" in problems({"ssh_keys": [key]})


def test_a_plain_key_is_accepted() -> None:
    assert public_key(KEY)
    assert public_key(f"ssh-ed25519 {BODY}")
    assert not problems({"ssh_keys": [KEY]})


@pytest.mark.parametrize(
    ("mac", "word"),
    [("01:00:5e:00:00:01", "group"), ("ff:ff:ff:ff:ff:ff", "group"), ("00:00:00:00:00:00", "no card"),
     ("52:54:00:12:34", "no MAC"), ("52-54-00-12-34-56", "no MAC"), ("52:54:00:12:34:56,id=x", "no MAC")],
)  # fmt: skip
def test_macs_are_single_cards(mac: str, word: str) -> None:
    assert word in problems({"nics": [{"mac": mac}]})["spec.nics[0].mac"].message


def test_two_cards_have_two_addresses() -> None:
    mac = "52:54:00:12:34:56"
    assert "spec.nics[1].mac" in problems({"nics": [{"mac": mac}, {"mac": mac.upper()}]})


@pytest.mark.parametrize(
    ("one", "two", "clash"),
    [
        ({"host": 80, "guest": 1}, {"host": 80, "guest": 2}, True),
        ({"host": 80, "guest": 1, "address": "0.0.0.0"}, {"host": 80, "guest": 2}, True),
        ({"host": 80, "guest": 1, "address": "127.0.0.2"}, {"host": 80, "guest": 2}, False),
        ({"host": 80, "guest": 1}, {"host": 80, "guest": 1, "protocol": "udp"}, False),
        ({"host": 0, "guest": 80}, {"host": 0, "guest": 80}, False),
    ],
)  # fmt: skip
def test_published_ports_do_not_overlap(one: dict[str, Any], two: dict[str, Any], clash: bool) -> None:
    assert ("spec.nics[0].publish[1].host" in problems({"nics": [{"publish": [one, two]}]})) is clash
    assert ("spec.nics[1].publish[0].host" in problems({"nics": [{"publish": [one]}, {"publish": [two]}]})) is clash


@pytest.mark.parametrize(
    ("port", "field"),
    [({"host": 65536, "guest": 1}, "host"), ({"host": -1, "guest": 1}, "host"), ({"host": 1, "guest": 0}, "guest"),
     ({"host": 1, "guest": 1, "address": "::1"}, "address"), ({"host": 1, "guest": 1, "address": "127.0.0.1/8"}, "address"),
     ({"host": 1, "guest": 1, "address": "1.2.3"}, "address"), ({"host": 1, "guest": 1, "protocol": "icmp"}, "protocol")],
)  # fmt: skip
def test_ports_and_addresses(port: dict[str, Any], field: str) -> None:
    assert f"spec.nics[0].publish[0].{field}" in problems({"nics": [{"publish": [port]}]})


def test_user_data_has_a_bound_in_bytes_and_no_nul() -> None:
    assert not problems({"user_data": "x" * MAX_USER_DATA})
    assert "spec.user_data" in problems({"user_data": "ä" * (MAX_USER_DATA // 2 + 1)})
    assert "spec.user_data" in problems({"user_data": "a\0b"})
    assert "spec.user_data" in problems({"user_data": "x" * 10_000_000})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e9])
def test_time_limits_are_positive_and_finite(value: float) -> None:
    assert list(timeout_problems(value))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"source": "url", "format": "qcow2", "url": "http://example.org/x"}, "url"),
        ({"source": "url", "format": "qcow2", "url": "file:///etc/shadow"}, "url"),
        ({"source": "url", "format": "qcow2", "url": "https://a:b@example.org/x"}, "url"),
        ({"source": "url", "format": "qcow2", "url": "https://[::1"}, "url"),
        ({"source": "url", "format": "qcow2", "url": "https://x/\nHost: y"}, "url"),
        ({"source": "url", "format": "qcow2", "url": "https://example.org:99999/"}, "url"),
        ({"source": "url", "format": "qcow2", "url": ""}, "url"),
        ({"source": "url", "url": "https://example.org/x"}, "format"),
        ({"source": "upload", "format": "vdi"}, "format"),
        ({"source": "upload", "format": "raw", "url": "https://example.org/x"}, "url"),
        ({"source": "upload", "format": "raw", "recipe": "micro"}, "recipe"),
        ({"source": "upload", "format": "raw", "checksum": "md5:00"}, "checksum"),
        ({"source": "upload", "format": "raw", "checksum": "sha256:" + "G" * 64}, "checksum"),
        ({"source": "upload", "format": "raw", "description": "a\nb"}, "description"),
        ({"source": "build", "recipe": "../x"}, "recipe"),
        ({"source": "build", "recipe": "micro", "format": "raw"}, "format"),
    ],
)  # fmt: skip
def test_images_say_exactly_where_they_come_from(spec: dict[str, Any], field: str) -> None:
    found, wrong = read(ImageSpec, spec, "spec")
    assert f"spec.{field}" in [p.field for p in [*wrong, *problems_of(found)]]


def test_good_images() -> None:
    for spec in (
        ImageSpec(source="build", recipe="micro"),
        ImageSpec(source="catalogue", recipe="debian-13"),
        ImageSpec(source="url", url="https://example.org/a.qcow2", format="qcow2", checksum="sha512:" + "a" * 128),
        ImageSpec(source="url", url="http://127.0.0.1:8000/a.raw", format="raw"),
        ImageSpec(source="upload", format="iso"),
    ):
        assert problems_of(spec) == []


def test_flavors_have_the_limits_of_vms() -> None:
    assert [p.field for p in problems_of(FlavorSpec(cpus=0, memory=1, disk=-1))] == [
        "spec.cpus", "spec.memory", "spec.disk",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "labels", [{"": "x"}, {"a b": "x"}, {"a": "x\n"}, {"a": "x" * 300}, {"a\0": ""}, {"a": "\u202e"}]
)
def test_labels_are_words(labels: dict[str, str]) -> None:
    assert list(label_problems(labels))


@pytest.mark.parametrize(
    ("cpu", "refused"),
    [
        ({"burst": 60.0, "limit": 0.5}, False), ({"burst": 0.0}, False), ({"burst": 60.0}, True),
        ({"burst": -1.0, "limit": 0.5}, True), ({"burst": 1e9, "limit": 0.5}, True),
    ],
)  # fmt: skip
def test_a_burst_needs_a_limit_below_which_it_is_saved(cpu: dict[str, Any], refused: bool) -> None:
    assert ("spec.cpu.burst" in problems({"cpu": cpu})) == refused
