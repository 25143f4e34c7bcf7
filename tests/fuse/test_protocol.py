"""manta.fuse.protocol: layouts as in linux/fuse.h, and whatever bytes come are answered by a value or by Malformed."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.fuse import protocol
from manta.fuse.protocol import Init, InitRequest, Inode, Malformed, Negotiated, Opcode, Request

HEADER = Path("/usr/include/linux/fuse.h")
FILE = Inode(number=7, mode=0o100444, size=5000, time_ns=3 * 10**9 + 4, uid=1, gid=2, block_bytes=1 << 20)


def request(opcode: int, body: bytes, *, nodeid: int = 5, unique: int = 9) -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, nodeid, 0, 0, 77, 0, 0) + body


def entries(listing: bytes, *, plus: bool) -> Iterator[tuple[bytes, int, int]]:
    """Names, inode numbers and following positions in a listing."""
    at = 0
    while at < len(listing):
        at += 128 if plus else 0
        number, following, length, _kind = struct.unpack_from("<QQII", listing, at)
        yield listing[at + 24 : at + 24 + length], number, following
        at += 24 + length + -(24 + length) % 8


def test_a_request_is_read() -> None:
    assert protocol.parse(request(Opcode.LOOKUP, b"name\0")) == Request(Opcode.LOOKUP, 9, 5, 77, b"name\0")


@pytest.mark.parametrize("message", [b"", bytes(39), request(1, b"x")[:-1], request(1, b"x") + b"y"])
def test_what_is_too_short_or_lies_about_its_length_is_malformed(message: bytes) -> None:
    with pytest.raises(Malformed):
        protocol.parse(message)


def test_names_end_with_nul_and_have_no_slash() -> None:
    assert protocol.parse_name(b"a b\xff\0") == b"a b\xff"
    for body in (b"", b"\0", b"abc", b"a/b\0"):
        with pytest.raises(Malformed):
            protocol.parse_name(body)


def test_forgets_come_alone_and_in_batches() -> None:
    alone = protocol.parse(request(Opcode.FORGET, struct.pack("<Q", 3)))
    assert protocol.parse_forgets(alone) == [(5, 3)]
    many = protocol.parse(request(Opcode.BATCH_FORGET, struct.pack("<IIQQQQ", 2, 0, 11, 1, 12, 2)))
    assert protocol.parse_forgets(many) == [(11, 1), (12, 2)]
    short = protocol.parse(request(Opcode.BATCH_FORGET, struct.pack("<IIQQ", 2, 0, 11, 1)))
    with pytest.raises(Malformed):
        protocol.parse_forgets(short)


def test_both_halves_of_the_flags_are_negotiated() -> None:
    offered = Init.PASSTHROUGH | Init.HAS_RESEND | Init.EXT | Init.MAX_PAGES | 1 << 16
    body = struct.pack("<IIIII", 7, 45, 131072, offered & 0xFFFFFFFF, offered >> 32)
    asked = protocol.parse_init(body)
    assert asked == InitRequest(7, 45, 131072, offered)
    agreed = protocol.negotiate(asked)
    assert agreed.has(Init.PASSTHROUGH)
    assert agreed.has(Init.HAS_RESEND)
    assert not agreed.flags & 1 << 16, "a writeback cache was not wanted"
    out = struct.unpack("<IIIIHHIIHHII24x", protocol.init_out(agreed, 4096))
    assert out[:3] == (7, 45, 131072)
    assert out[3] | out[10] << 32 == agreed.flags
    assert out[11] == 1, "one level of stacked filesystems"
    masked = protocol.negotiate(asked, Init.PASSTHROUGH | Init.HAS_RESEND)
    assert not masked.has(Init.PASSTHROUGH)
    assert not masked.has(Init.HAS_RESEND)
    assert struct.unpack("<IIIIHHIIHHII24x", protocol.init_out(masked, 1))[11] == 0


def test_flags2_count_only_where_the_kernel_says_that_they_are_there() -> None:
    body = struct.pack("<IIIII", 7, 31, 131072, Init.MAX_PAGES, 0xFFFFFFFF)
    assert protocol.parse_init(body).flags == Init.MAX_PAGES
    assert protocol.parse_init(body[:16]).flags == Init.MAX_PAGES


def test_a_kernel_that_is_too_old_is_refused_and_an_older_one_gets_its_version() -> None:
    with pytest.raises(Malformed):
        protocol.negotiate(InitRequest(7, 26, 0, 0))
    with pytest.raises(Malformed):
        protocol.negotiate(InitRequest(6, 99, 0, 0))
    assert protocol.negotiate(InitRequest(7, 31, 0, 0)).minor == 31
    assert protocol.negotiate(InitRequest(7, 99, 0, 0)).minor == protocol.MINOR


def test_answers_name_their_request() -> None:
    assert protocol.answer(9, b"abc") == struct.pack("<IiQ", 19, 0, 9) + b"abc"
    assert protocol.header(9, 3) + b"abc" == protocol.answer(9, b"abc")
    assert protocol.failure(1 << 63 | 4, errno.ENOENT) == struct.pack("<IiQ", 16, -errno.ENOENT, 1 << 63 | 4)


def test_entries_and_attributes_have_the_kernels_layout() -> None:
    entry = protocol.entry_out(99, FILE, 1.5, 2.25)
    assert struct.unpack("<QQQQII", entry[:40]) == (99, 0, 1, 2, 500_000_000, 250_000_000)
    attributes = (7, 5000, 10, 3, 3, 3, 4, 4, 4, 0o100444, 1, 1, 2, 0, 1 << 20, 0)
    assert struct.unpack("<6Q10I", entry[40:]) == attributes
    assert protocol.attr_out(FILE, 2.25)[16:] == entry[40:]
    assert struct.unpack("<QQQQII", protocol.absent_out(3.0)[:40]) == (0, 0, 3, 0, 0, 0)
    assert len(protocol.absent_out(3.0)) == len(entry) == 128


def test_statx_has_the_kernels_layout() -> None:
    out = protocol.statx_out(FILE, 2.25)
    assert len(out) == 288
    mask, block, _, links, uid, gid, mode, _, number, size, blocks = struct.unpack_from("<IIQIIIHHQQQ", out, 32)
    assert (mask, block, links, uid, gid, mode) == (0x7FF, 1 << 20, 1, 1, 2, 0o100444)
    assert (number, size, blocks) == (7, 5000, 10)
    assert struct.unpack_from("<qI", out, 32 + 64 + 48) == (3, 4)


@given(
    st.lists(st.binary(min_size=1, max_size=255).filter(lambda n: b"/" not in n and b"\0" not in n), max_size=40),
    st.booleans(),
)
def test_a_listing_holds_what_fits_and_says_where_it_goes_on(names: list[bytes], plus: bool) -> None:
    listing = protocol.Listing(2000, plus=plus)
    taken = 0
    for at, name in enumerate(names):
        if not listing.add(name, 100 + at, FILE, at + 1, 1.0, 1.0):
            break
        taken += 1
    assert len(listing.content) <= 2000
    assert len(listing.content) % 8 == 0
    found = list(entries(bytes(listing.content), plus=plus))
    assert found == [(name, FILE.number, at + 1) for at, name in enumerate(names[:taken])]
    if taken < len(names):
        assert len(listing.content) + 24 + len(names[taken]) + 7 + 128 > 2000


PARSERS = (
    protocol.parse_init,
    protocol.parse_name,
    protocol.parse_open,
    protocol.parse_read,
    protocol.parse_handle,
    protocol.parse_interrupt,
    protocol.parse_getxattr,
    protocol.parse_listxattr,
)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_malformed(content: bytes) -> None:
    for attempt in (content, request(Opcode.BATCH_FORGET, content), request(Opcode.FORGET, content)):
        try:
            parsed = protocol.parse(attempt)
        except Malformed:
            continue
        for parse in (*PARSERS, lambda _, parsed=parsed: protocol.parse_forgets(parsed)):
            with contextlib.suppress(Malformed):
                parse(parsed.body)


def test_a_batch_that_claims_billions_takes_no_memory() -> None:
    with pytest.raises(Malformed):
        protocol.parse_forgets(Request(Opcode.BATCH_FORGET, 1, 1, 0, struct.pack("<II", 0xFFFFFFFF, 0) + bytes(64)))


def test_requests_that_are_not_known_are_told_from_those_that_write() -> None:
    assert protocol.unknown(16) == errno.EROFS
    assert protocol.unknown(4242) == errno.ENOSYS
    rng = random.Random(4)
    assert all(protocol.unknown(rng.randrange(1 << 32)) in {errno.EROFS, errno.ENOSYS} for _ in range(100))
    assert not protocol.WRITING & set(Opcode)


@pytest.mark.skipif(not HEADER.exists(), reason="linux/fuse.h is not installed")
def test_numbers_are_those_of_the_kernels_header() -> None:
    text = HEADER.read_text()
    opcodes = dict(re.findall(r"\bFUSE_(\w+)\s*=\s*(\d+),", text))
    for opcode in Opcode:
        if opcode.name in opcodes:  # the installed header may be older than the kernel
            assert int(opcodes[opcode.name]) == opcode
    flags = {name: int(bit) for name, bit in re.findall(r"#define FUSE_(\w+)\s+\(1(?:ULL)? << (\d+)\)", text)}
    flags["EXT"] = flags["INIT_EXT"]
    for flag in Init:
        if flag.name in flags:
            assert 1 << flags[flag.name] == flag, flag.name


def test_structures_are_as_long_as_a_compiler_says(tmp_path: Path) -> None:
    """Against the installed header, where there is a compiler."""
    source = tmp_path / "sizes.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/fuse.h>\n"
        'int main(void) { printf("%zu %zu %zu %zu %zu %zu", sizeof(struct fuse_entry_out), sizeof(struct fuse_attr_out),'
        " sizeof(struct fuse_open_out), sizeof(struct fuse_init_out), sizeof(struct fuse_kstatfs), FUSE_NAME_OFFSET); }\n"
    )
    try:
        subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True, capture_output=True, timeout=60)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("there is no compiler, or no linux/fuse.h")
    printed = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True, timeout=10).stdout
    agreed = Negotiated(45, 0, 0)
    ours = [
        len(protocol.absent_out(1.0)),
        len(protocol.attr_out(FILE, 1.0)),
        len(protocol.open_out(1, protocol.Open(0))),
        len(protocol.init_out(agreed, 1)),
        len(protocol.statfs_out(1, 1, 4096, 255)),
        24,
    ]
    assert [int(size) for size in printed.split()] == ours
