"""Chunks, and how a reading goes on, message by message."""

from __future__ import annotations

import time

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from jobworker.client.output import (
    LONGEST_PAUSE_SECONDS,
    Chunk,
    Collector,
    Patience,
    Reading,
    Run,
    Stream,
    split_payload,
)
from jobworker.errors import (
    DeadlineError,
    RejectedError,
    UnknownJobError,
    UnreachableError,
    UnsupportedError,
)
from jobworker.job import Job, JobSpec, Status
from jobworker.pb import job_worker_pb2 as pb

RUNNING = Job(1, JobSpec("/bin/true"), Status.RUNNING, created_ns=1)
ENDED = Job(1, JobSpec("/bin/true"), Status.COMPLETED, created_ns=1)
BROKEN = UnreachableError("GetJobsStream", "UNAVAILABLE", "broken", was_connected=True)
NOBODY = UnreachableError("GetJobsStream", "UNAVAILABLE", "nobody listens")


def reading(from_offset: int = 0, follow: bool = True, patience_seconds: float = 60) -> Reading:
    return Reading(1, Patience(patience_seconds), from_offset, follow)


def new(payload: bytes, offset: int) -> bytes:
    chunk = pb.DataChunk(payload=payload, offset=offset, next_offset=offset + len(payload))
    return chunk.SerializeToString()


def old(payload: bytes) -> bytes:
    return pb.DataChunk(payload=payload).SerializeToString()


def last(offset: int) -> bytes:
    ending = pb.Job(id="1", status="COMPLETED")
    return pb.DataChunk(offset=offset, next_offset=offset, ending=ending).SerializeToString()


def taken(reader: Reading, *messages: bytes) -> bytes:
    chunks = [reader.take(message) for message in messages]
    return b"".join(chunk.payload for chunk in chunks if chunk)


# Messages


@given(
    st.binary(max_size=300),
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**32 - 1), max_size=3),
    st.booleans(),
)
def test_a_payload_is_found_without_decoding_it(
    payload: bytes, offset: int, lengths: list[int], has_ending: bool
) -> None:
    chunk = pb.DataChunk(payload=payload, offset=offset, next_offset=offset, lost_bytes=offset)
    chunk.runs.extend(pb.DataChunk.Run(stream="STDERR", length=length) for length in lengths)
    if has_ending:
        chunk.ending.id = "1"
    view, rest = split_payload(chunk.SerializeToString())
    assert view == payload
    rest.payload = payload
    assert rest == chunk


def test_a_payload_that_does_not_stand_first_is_found_too() -> None:
    behind = pb.DataChunk(offset=3).SerializeToString() + old(b"abc")
    twice = old(b"first") + old(b"second")  # the last one counts
    for message, payload in ((behind, b"abc"), (twice, b"second"), (b"", b"")):
        assert bytes(split_payload(message)[0]) == payload


@pytest.mark.parametrize("message", [b"\x0a\xff", b"\x0a\x05abc", b"\x0a", b"\xff\xff"])
def test_what_is_no_message(message: bytes) -> None:
    with pytest.raises(Exception, match="parsing"):
        split_payload(message)


def test_a_length_without_an_end_takes_no_time() -> None:
    """As a number, half a MiB of it took 8 s."""
    before = time.thread_time()
    with pytest.raises(DecodeError):
        reading().take(b"\x0a" + b"\xff" * (512 << 10))
    assert time.thread_time() - before < 1


def test_a_chunk_tells_what_came_from_where() -> None:
    message = pb.DataChunk(payload=b"abc", offset=5, next_offset=8, lost_bytes=2)
    message.runs.add(stream="STDOUT", length=1, time_ns=10)
    message.runs.add(stream="STDERR", length=2, time_ns=20)
    chunk = reading().take(message.SerializeToString())
    assert chunk
    assert (chunk.offset, chunk.next_offset, chunk.lost_bytes) == (5, 8, 2)
    assert chunk.runs == (Run(Stream.STDOUT, 1, 10), Run(Stream.STDERR, 2, 20))
    assert repr(chunk) == "<Chunk 5..8, 3 bytes>"
    collector = Collector()
    assert collector.add(chunk) is None
    result = collector.add(Chunk(memoryview(b""), 8, 8, ending=ENDED))
    assert result
    assert (result.output, result.stdout, result.stderr) == (b"abc", b"a", b"bc")


def test_a_result_of_nothing_has_two_empty_streams() -> None:
    result = Collector().add(Chunk(memoryview(b""), 0, 0, ending=ENDED))
    assert result
    assert (result.stdout, result.stderr) == (b"", b"")


def test_a_result_whose_streams_are_not_known() -> None:
    collector = Collector()
    collector.add(Chunk(memoryview(b"both"), 0, 4))
    result = collector.add(Chunk(memoryview(b""), 4, 4, ending=ENDED))
    assert result
    with pytest.raises(UnsupportedError):
        _ = result.stderr


# Going on


def test_a_new_server_is_asked_for_what_is_missing() -> None:
    reader = reading()
    assert reader.request() == pb.GetJobsStreamReq(id="1")
    assert taken(reader, new(b"abc", 0), new(b"de", 3)) == b"abcde"
    reader.failed(BROKEN)
    assert reader.request() == pb.GetJobsStreamReq(id="1", from_offset=5)
    assert taken(reader, new(b"f", 5)) == b"f"
    chunk = reader.take(last(6))
    assert chunk
    assert chunk.ending
    assert reader.is_over


def test_what_an_old_server_sends_again_is_skipped() -> None:
    reader = reading(from_offset=2)
    reader.request()
    assert taken(reader, old(b"a"), old(b"bcd"), old(b"ef")) == b"cdef"
    for again in ([b"abcdef", b"g"], [b"abc", b"defg", b"h"], [b"abcdefghi"]):
        reader.failed(BROKEN)
        reader.request()
        assert len(taken(reader, *map(old, again))) == 1
    assert reader.ended()
    chunk = reader.conclude(ENDED)
    assert chunk
    assert (chunk.offset, chunk.next_offset, chunk.ending) == (9, 9, ENDED)
    assert reader.is_over


def test_an_old_server_is_replaced_by_a_new_one_and_back() -> None:
    reader = reading()
    reader.request()
    assert taken(reader, old(b"abc")) == b"abc"
    reader.request()
    assert taken(reader, new(b"de", 3)) == b"de"
    reader.request()
    assert taken(reader, old(b"abcdef")) == b"f"


def test_a_stream_that_is_cut_off_goes_on() -> None:
    reader = reading()
    reader.request()
    assert reader.ended()
    assert reader.conclude(RUNNING) is None
    assert not reader.is_over
    assert reader.pause_seconds > 0


def test_an_old_servers_output_that_is_shorter_than_what_was_read() -> None:
    reader = reading(from_offset=10)
    reader.request()
    taken(reader, old(b"abc"))
    with pytest.raises(RejectedError, match="no more than 3 bytes"):
        reader.conclude(ENDED)


def test_without_following_the_end_of_the_stream_is_the_end() -> None:
    reader = reading(follow=False)
    assert reader.needs == ("follow=False",)
    assert not reader.ended()
    assert reader.is_over


# Patience


def test_a_server_that_was_never_there_is_not_waited_for() -> None:
    with pytest.raises(UnreachableError):
        reading().failed(NOBODY)


def test_other_errors_are_final() -> None:
    reader = reading()
    taken(reader, new(b"a", 0))
    with pytest.raises(UnknownJobError):
        reader.failed(UnknownJobError("GetJobsStream", "NOT_FOUND", "gone"))


def test_pauses_grow_until_something_comes() -> None:
    patience = Patience(60)
    patience.connected()
    pauses = [patience.failed(NOBODY) for _ in range(10)]
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[1]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    patience.progressed()
    assert patience.failed(BROKEN) == pauses[0]


def test_patience_counts_from_the_break() -> None:
    patience = Patience(0.05)
    patience.connected()
    time.sleep(0.06)
    patience.failed(BROKEN)
    time.sleep(0.06)
    with pytest.raises(UnreachableError):
        patience.failed(NOBODY)


def test_no_patience() -> None:
    reader = reading(patience_seconds=0)
    with pytest.raises(UnreachableError):
        reader.failed(BROKEN)


def test_the_time_for_all_is_over() -> None:
    patience = Patience(60, timeout_seconds=0.01)
    patience.connected()
    with pytest.raises(DeadlineError):
        patience.failed(BROKEN)
    assert Patience(60).left_seconds() is None


def test_bytes_of_an_unknown_stream_are_no_chunk() -> None:
    run = pb.DataChunk.Run(stream=7, length=3)  # type: ignore[arg-type]
    message = pb.DataChunk(payload=b"abc", next_offset=3, runs=[run]).SerializeToString()
    with pytest.raises(ValueError, match="unknown stream"):
        reading().take(message)


@pytest.mark.parametrize(
    "message",
    [
        new(b"a", 4),
        pb.DataChunk(payload=b"a", offset=7, next_offset=6).SerializeToString(),
        last(0),
    ],
)
def test_a_stream_does_not_go_back(message: bytes) -> None:
    reader = reading(from_offset=2)
    taken(reader, new(b"abc", 2))
    with pytest.raises(ValueError, match=r"from 5 on it goes back to .\.\.."):
        reader.take(message)
    assert taken(reader, new(b"d", 5)) == b"d"


def test_the_ending_of_another_job_is_none() -> None:
    reader = Reading(2, Patience(60))
    with pytest.raises(ValueError, match="it is about job 1, not 2"):
        reader.take(last(0))
    assert not reader.is_over
