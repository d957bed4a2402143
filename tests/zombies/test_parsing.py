"""Parsers of what tenants have a hand in: right for every name, and no surprise for any bytes."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.checks.cgroups import ContainerRef, container_in_path, parse_membership
from exporter.checks.procfs import parse_loadavg, parse_stat, parse_status

UID = "0a1b2c3d-1111-2222-3333-444455556666"
ID = "c0ffee" * 10 + "beef"
INNER = "deadbeef" * 8
SLICE = f"pod{UID.replace('-', '_')}.slice"
TAIL = b" 4567 1 1 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 98765 0 0 18446744073709551615 0\n"

# Mostly of what a stat line is made of: plain random bytes hardly ever hold a parenthesis.
pieces = st.sampled_from([b"(", b")", b" ", b"\n", b") Z 1 1", b"Z", b"4567", b"x"])
comms = st.one_of(
    st.lists(pieces, max_size=6).map(b"".join).map(lambda comm: comm[:15]),
    st.binary(max_size=15).filter(lambda comm: b"\0" not in comm),
)


@given(comm=comms, state=st.sampled_from("RSDZTtXI"))
def test_z1_z2_a_stat_line_is_read_right_whatever_the_name(comm: bytes, state: str) -> None:
    stat = parse_stat(b"123 (" + comm + b") " + state.encode() + TAIL)
    assert (stat.pid, stat.comm, stat.state) == (123, comm, state)
    assert (stat.ppid, stat.threads, stat.starttime) == (4567, 1, 98765)


@given(raw=st.binary(max_size=400))
def test_z2_arbitrary_bytes_are_a_stat_line_or_an_error(raw: bytes) -> None:
    try:
        stat = parse_stat(raw)
    except ValueError:
        return
    assert stat.comm in raw


@given(raw=st.binary(max_size=400))
def test_z2_arbitrary_bytes_never_surprise_the_other_parsers(raw: bytes) -> None:
    for parse in (parse_status, parse_loadavg):
        with pytest.raises(ValueError):
            parse(raw)
    assert parse_membership(raw).container is None


def test_z5_a_leader_in_state_z_with_threads_is_no_zombie() -> None:
    line = b"1 (x) Z 0 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 %d 0 5 0\n"
    assert parse_stat(line % 1).zombie
    assert not parse_stat(line % 2).zombie


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/besteffort/pod{UID}/{ID}",
        f"/kubepods/pod{UID}/{ID}",
        f"/kubepods/burstable/pod{UID}/{ID} (deleted)",
        f"/kubelet/kubepods/pod{UID}/{ID}",
        f"/../../pod{UID}/{ID}",
        f"/kubepods.slice/kubepods-{SLICE}/cri-containerd-{ID}.scope",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-{SLICE}/crio-{ID}.scope",
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-{SLICE}/docker-{ID}.scope",
        f"/system.slice/containerd.service/kubepods-burstable-{SLICE}:cri-containerd:{ID}",
        f"/kubepods/pod{UID}/{ID}/docker/{INNER}",
        f"/kubepods.slice/kubepods-{SLICE}/crio-{ID}.scope/container",
        f"/kubepods/pod{UID}/{ID}/kubepods/pod{UID[::-1]}/{INNER}",
    ],
)
def test_z14_the_first_pod_and_container_of_a_path_count(path: str) -> None:
    assert container_in_path(path) == ContainerRef(UID, ID)
    membership = parse_membership(f"8:pids:{path}\n0::/\n".encode())
    assert membership.container == ContainerRef(UID, ID)
    assert membership.inner == (INNER in path)


def test_a_static_pod_has_the_hash_of_its_manifest_for_a_uid() -> None:
    digest = "0123456789abcdef" * 2
    assert container_in_path(f"/kubepods/burstable/pod{digest}/{ID}") == ContainerRef(digest, ID)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/init.scope",
        "/system.slice/ssh.service",
        f"/docker/{ID}",
        f"/kubepods/pod{UID}",
        f"/kubepods/pod{UID}/crio-conmon-{ID}.scope",
        f"/kubepods/pod{UID}/{ID[:12]}",
        f"/user.slice/{ID}/pod{UID}",
    ],
)
def test_z7_what_is_no_container_of_a_pod_belongs_to_the_host(path: str) -> None:
    assert container_in_path(path) is None


@given(name=st.text(alphabet=string.printable.replace("\n", ""), max_size=80))
def test_z14_nothing_a_tenant_makes_below_his_container_moves_it(name: str) -> None:
    path = f"/kubepods/pod{UID}/{ID}/{name}"
    assert container_in_path(path) == ContainerRef(UID, ID)


def test_a_zombie_of_cgroup_v1_is_told_from_a_process_of_v2() -> None:
    assert parse_membership(b"8:pids:/\n0::/\n").forgotten
    assert not parse_membership(b"0::/system.slice/cron.service\n").forgotten
