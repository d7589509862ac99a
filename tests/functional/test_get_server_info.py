"""GetServerInfo: what this server is, what it can hold jobs to, and whom it takes us for."""

from __future__ import annotations

from functional.server import Client, Server


def test_who_and_where(server: Server, client: Client) -> None:
    info = client.info()
    assert (info.role, info.identity) == ("admin", "admin")
    assert info.state_directory == str(server.state)
    assert info.version
    assert info.start_time_ns
    with server.connect("viewer") as viewer:
        assert (viewer.info().role, viewer.info().identity) == ("viewer", "viewer")


def test_what_can_be_enforced(client: Client) -> None:
    info = client.info()
    assert {controller.name for controller in info.controllers} == {"cpu", "memory", "io", "pids"}
    assert all(controller.available != bool(controller.problem) for controller in info.controllers)
    assert (info.default_cpu, info.default_memory, info.default_iobps) == (100, 512, 0)


def test_how_much_there_is(client: Client) -> None:
    before = client.info()
    assert before.maximum_jobs > 10
    assert before.disk_room_bytes > 0
    running = client.create("sleep", "60")
    client.run("head -c 1000 /dev/zero")
    after = client.info()
    assert after.running_jobs == before.running_jobs + 1
    assert after.ended_jobs == before.ended_jobs + 1
    assert after.ended_log_bytes >= before.ended_log_bytes + 1000
    client.stop(running.id, grace_milliseconds=0)
