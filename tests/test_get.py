"""`saefw get`: downloads that break off, archives that are not what they should be, folders that hold other things."""

import gzip
import hashlib
import io
import lzma
import os
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from PIL import Image

from saefw import archives, fetch
from saefw.archives import unpack
from saefw.errors import UserError
from saefw.fetch import Source
from saefw.get import WORK, get
from saefw.plugin import Dataset, DatasetConfig, Example, Place, open_image

Told = list[tuple[str, int, int]]


class Server:
    """Files over HTTP on this machine; each request may be cut after some bytes, or answered otherwise."""

    def __init__(self) -> None:
        """Start it."""
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        """After how many bytes the next answers break off."""
        self.errors: list[int] = []
        """What the next answers say instead of 200."""
        self.ranges = True
        self.asked: list[str | None] = []
        handler = type("Handler", (_Handler,), {"server_of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def url(self, name: str) -> str:
        """Return the address of a file."""
        return f"http://127.0.0.1:{self.http.server_address[1]}/{name}"

    def source(self, name: str, data: bytes, checksum: str = "") -> Source:
        """Serve a file; return it as a source."""
        self.files[name] = data
        return Source(self.url(name), len(data), checksum, "a list of theirs" if checksum else "")

    def close(self) -> None:
        """Stop it."""
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_of: ClassVar[Server]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer as the server of the test is told to."""
        server = self.server_of
        server.asked.append(self.headers.get("Range"))
        data = server.files.get(self.path[1:])
        if server.errors or data is None:
            self.send_error(server.errors.pop(0) if server.errors else 404)
            return
        tag, first = f'"{hashlib.md5(data).hexdigest()}"', 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") == tag:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("ETag", tag)
        self.end_headers()
        stop = server.cuts.pop(0) if server.cuts else len(data)
        self.wfile.write(data[first : max(first, stop)])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "WAIT", 0.001)
    monkeypatch.setattr(fetch, "BLOCK", 1000)
    server = Server()
    yield server
    server.close()


DATA = os.urandom(100_000)
SHA = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


def no_one(done: int, of: int) -> None:
    """Listen to no progress."""


def failing(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value)


# Downloading


def test_whole(server: Server, tmp_path: Path) -> None:
    source, told = server.source("a%20b.bin", DATA, SHA), list[tuple[int, int]]()
    source = source._replace(url=server.url("a%20b.bin"))
    path = fetch.fetch(source, tmp_path / "new", lambda done, of: told.append((done, of)))
    assert path == tmp_path / "new" / "a b.bin" and path.read_bytes() == DATA
    assert told[-1] == (len(DATA), len(DATA)) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert os.listdir(tmp_path / "new") == ["a b.bin"]
    fetch.fetch(source, tmp_path / "new", no_one)
    assert len(server.asked) == 1, "what is there is not downloaded again"


def test_cut_connections_go_on(server: Server, tmp_path: Path) -> None:
    source = server.source("x.bin", DATA, SHA)
    server.cuts = [30_000, 30_000, 70_500]
    assert fetch.fetch(source, tmp_path, no_one).read_bytes() == DATA
    assert server.asked == [None, "bytes=30000-", "bytes=30000-", "bytes=70500-"]


def test_cut_for_good(server: Server, tmp_path: Path) -> None:
    source = server.source("x.bin", DATA)
    server.cuts = [10_000] * fetch.TRIES
    assert failing(lambda: fetch.fetch(source, tmp_path, no_one)) == (
        f"{source.url}: broke off after 10,000 of 100,000 bytes (the connection was closed); run it again and it goes "
        f"on from there, or put the file at {tmp_path}/x.bin yourself"
    )
    assert fetch.fetch(source, tmp_path, no_one).read_bytes() == DATA
    assert server.asked[-1] == "bytes=10000-"


def test_nobody_listens(server: Server, tmp_path: Path) -> None:
    source = server.source("x.bin", DATA)
    server.close()
    assert failing(lambda: fetch.fetch(source, tmp_path, no_one)) == (
        f"{source.url}: cannot be reached ([Errno 111] Connection refused); run it again later, or put the file at "
        f"{tmp_path}/x.bin yourself"
    )


def test_another_file_meanwhile(server: Server, tmp_path: Path) -> None:
    source = server.source("x.bin", b"old" * 10_000)
    server.cuts = [5_000] * fetch.TRIES
    failing(lambda: fetch.fetch(source, tmp_path, no_one))
    source = server.source("x.bin", DATA, SHA)
    assert fetch.fetch(source, tmp_path, no_one).read_bytes() == DATA


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    source, server.ranges = server.source("x.bin", DATA, SHA), False
    server.cuts = [40_000]
    assert fetch.fetch(source, tmp_path, no_one).read_bytes() == DATA


def test_a_server_that_is_busy(server: Server, tmp_path: Path) -> None:
    source, server.errors = server.source("x.bin", DATA), [503, 429]
    assert fetch.fetch(source, tmp_path, no_one).read_bytes() == DATA


def test_not_found(server: Server, tmp_path: Path) -> None:
    source = server.source("x.bin", DATA)
    del server.files["x.bin"]
    assert failing(lambda: fetch.fetch(source, tmp_path, no_one)) == (
        f"{source.url}: the server says 404 Not Found; put the file at {tmp_path}/x.bin yourself and run it again"
    )


def test_what_came_is_something_else(server: Server, tmp_path: Path) -> None:
    source = server.source("x.bin", DATA, "md5:" + "0" * 32)
    found = hashlib.md5(DATA).hexdigest()
    assert failing(lambda: fetch.fetch(source, tmp_path, no_one)) == (
        f"{source.url}: its MD5 is {found}, and a list of theirs says {'0' * 32}; what came was deleted: try again "
        f"later, or put the file at {tmp_path}/x.bin"
    )
    assert not os.listdir(tmp_path)
    longer = source._replace(bytes=50_000)
    assert failing(lambda: fetch.fetch(longer, tmp_path, no_one)) == (
        f"{source.url}: is longer than the 50,000 bytes that it should have; put the file at {tmp_path}/x.bin yourself"
    )


def test_only_the_web(tmp_path: Path) -> None:
    assert failing(lambda: fetch.fetch(Source("file:///etc/passwd", 1), tmp_path, no_one)) == (
        "file:///etc/passwd: only http and https addresses are downloaded"
    )


# Unpacking


def tar(members: Sequence[tuple[str, bytes | None] | tarfile.TarInfo], mode: Literal["w", "w:gz"] = "w:gz") -> bytes:
    """Return a tar archive of files, folders (None) and whatever else."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as made:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                made.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                made.addfile(info)
            else:
                info.size, info.mode = len(data), 0o4777
                made.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    """Return a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return file.getvalue()


def test_a_tar_in_a_zip(tmp_path: Path) -> None:
    inner = tar([("images/ant", None), ("images/ant/1.jpg", DATA), ("images/bee/1.jpg", b"b")])
    (tmp_path / "x.zip").write_bytes(zipped({"set/images.tar.gz": inner, "set/list.txt": b"l"}))
    told: list[tuple[int, int]] = []
    unpack(tmp_path / "x.zip", tmp_path / "out", lambda done, of: told.append((done, of)))
    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")
    }
    assert found == {"set/images/ant/1.jpg": DATA, "set/images/bee/1.jpg": b"b", "set/list.txt": b"l"}
    assert not (tmp_path / "out/set/images/ant/1.jpg").stat().st_mode & 0o7000, "no set-user-id"
    assert told[-1][0] >= len(DATA) and sorted(os.listdir(tmp_path)) == ["out", "x.zip"]


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


BAD = {
    "traversal": (tar([("a/../../x", b"1")]), "holds 'a/../../x', which lies outside its folder; refused"),
    "absolute": (tar([("/tmp/x", b"1")]), "holds '/tmp/x', which lies outside its folder; refused"),
    "zip traversal": (zipped({"../x": b"1"}), "holds '../x', which lies outside its folder; refused"),
    "backslash": (tar([("..\\x", b"1")]), "holds '..\\\\x', which lies outside its folder; refused"),
    "drive": (zipped({"C:x": b"1"}), "holds 'C:x', which lies outside its folder; refused"),
    "symbolic link": (tar([link(tarfile.SYMTYPE)]), "holds 'link', which is a link or a device; refused"),
    "hard link": (tar([link(tarfile.LNKTYPE)]), "holds 'link', which is a link or a device; refused"),
    "device": (tar([link(tarfile.CHRTYPE)]), "holds 'link', which is a link or a device; refused"),
    "fifo": (tar([link(tarfile.FIFOTYPE)]), "holds 'link', which is a link or a device; refused"),
    "twice": (tar([("x", b"1"), ("x", b"2")]), "holds 'x' twice; refused"),
    "a file as a folder": (
        tar([("x", b"1"), ("x/y", b"2")]),
        "holds 'x/y' inside a file; refused",
    ),
    "a long name": (
        tar([("n" * 300, b"1")]),
        f"holds '{'n' * 80}', which cannot be written (File name too long); refused",
    ),
    "tar bomb": (
        tar([("zeros", bytes(300_000))]),
        "unpacks to more than 20 times its size, as no image archive does; refused",
    ),
    "zip bomb": (
        zipped({"zeros": bytes(300_000)}),
        "unpacks to more than 20 times its size, as no image archive does; refused",
    ),
    "nested bomb": (
        zipped({"inner.tar": tar([("zeros", bytes(60_000))]), "inner2.zip": zipped({"more": bytes(60_000)})}),
        "unpacks to more than 20 times its size, as no image archive does; refused",
    ),
    "many files": (tar([(f"{i}", b"") for i in range(60)]), "holds more than 50 files; refused"),
    "no archive": (b"<html>not found</html>", "is neither a zip nor a tar archive"),
    "cut short": (
        tar([("x", DATA)])[:-50_000],
        "is damaged or not a plain archive (Compressed file ended before the end-of-stream marker was reached); "
        "delete it and get it again",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_archives_that_nobody_should_unpack(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FILES", 50)
    monkeypatch.setattr(archives, "SLACK", 100_000)
    data, sentence = BAD[case]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.bin"
    path.write_bytes(data)
    assert failing(lambda: unpack(path, tmp_path / "in" / "out", no_one)) == f"{path}: {sentence}"
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["x.bin"], "nothing is left of it"


def test_flipped_bytes(tmp_path: Path) -> None:
    data = bytearray(zipped({"x": DATA}))
    data[5_000] ^= 1
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    said = failing(lambda: unpack(path, tmp_path / "out", no_one))
    assert said == f"{path}: is damaged or not a plain archive (Bad CRC-32 for file 'x'); delete it and get it again"
    packed = bytearray(gzip.compress(tar([("x", DATA)], "w"), 0))
    packed[50_000] ^= 1
    path.write_bytes(packed)
    said = failing(lambda: unpack(path, tmp_path / "out", no_one))
    with pytest.raises(gzip.BadGzipFile) as caught, gzip.open(path) as opened:
        opened.read()
    assert said == f"{path}: is damaged ({caught.value}); delete it and get it again"


def test_flipped_bytes_of_lzma(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as made:
        made.writestr("x", DATA)
    packed = {"x.zip": bytearray(file.getvalue()), "x.tar.xz": bytearray(lzma.compress(tar([("x", DATA)], "w")))}
    for name, data in packed.items():
        data[5_000:5_100] = bytes(100)
        (tmp_path / name).write_bytes(data)
        said = failing(lambda name=name: unpack(tmp_path / name, tmp_path / "out", no_one))  # type: ignore[misc]
        with pytest.raises(lzma.LZMAError) as caught:
            if name == "x.zip":
                with zipfile.ZipFile(tmp_path / name) as opened:
                    opened.read("x")
            else:
                lzma.decompress(data)
        assert said == (
            f"{tmp_path / name}: is damaged or not a plain archive ({caught.value}); delete it and get it again"
        )


# A whole dataset


class Two(DatasetConfig):
    """Two classes of one image each, and a list."""

    use: Literal["two"] = "two"
    terms = "Nobody's."
    n_images = 2

    root: Place
    """Where it lies."""

    def build(self, base: Path) -> Dataset:
        """Open it."""
        return Images(sorted(self.root.open(base).glob("images/*/*.png")))


class Images:
    """Images of files."""

    classes: Sequence[str] = ("ant", "bee")

    def __init__(self, paths: list[Path]) -> None:
        """Take the files."""
        self.paths = paths

    def __len__(self) -> int:
        """Count them."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        """Return one."""
        return Example(self.paths[index].name, index, "train", partial(open_image, self.paths[index]))


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, format="png")
    return file.getvalue()


@pytest.fixture
def two(server: Server, monkeypatch: pytest.MonkeyPatch) -> type[Two]:
    data = tar([("images/ant/1.png", picture()), ("images/bee/2.png", picture())])
    sum_ = f"sha256:{hashlib.sha256(data).hexdigest()}"
    monkeypatch.setattr(Two, "sources", (server.source("two.tgz", data, sum_), server.source("list.txt", b"1 2")))
    return Two


def bring(to: Path, told: Told | None = None) -> int:
    heard: Told = [] if told is None else told
    return get("two", {"two": Two}, to, lambda what, done, of: heard.append((what, done, of)))


def test_a_dataset(two: type[Two], server: Server, tmp_path: Path) -> None:
    told: Told = []
    assert bring(tmp_path / "a" / "two", told) == 2
    assert sorted(os.listdir(tmp_path / "a" / "two")) == [".saefw-get.json", "images", "list.txt"]
    assert {what for what, _, _ in told} == {
        "bytes of two.tgz",
        "bytes unpacked of two.tgz",
        "bytes of list.txt",
    }
    asked = len(server.asked)
    assert bring(tmp_path / "a" / "two") == 2 and len(server.asked) == asked, "what is there is not got again"


@pytest.mark.parametrize("broken", [1, 2])
def test_goes_on(two: type[Two], server: Server, tmp_path: Path, broken: int) -> None:
    server.cuts = [3_000] * fetch.TRIES if broken == 1 else [10**6, *[1] * fetch.TRIES]
    source, there = two.sources[broken - 1], 3_000 if broken == 1 else 1
    assert failing(lambda: bring(tmp_path / "two")) == (
        f"{source.url}: broke off after {there:,} of {source.bytes:,} bytes (the connection was closed); run it again "
        f"and it goes on from there, or put the file at {tmp_path / 'two' / WORK / source.name} yourself"
    )
    server.cuts, server.asked = [], []
    assert bring(tmp_path / "two") == 2
    assert server.asked == (["bytes=3000-", None] if broken == 1 else ["bytes=1-"])


def test_folders_that_hold_other_things(two: type[Two], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    sentence = "holds other things already; name a folder, new or empty"
    assert failing(lambda: bring(tmp_path / "mine")) == f"{tmp_path}/mine: {sentence}"
    file = tmp_path / "mine" / "thesis.txt"
    assert failing(lambda: bring(file)) == f"{file}: is a file; name a folder, new or empty"


def test_a_folder_that_nobody_may_write_to(two: type[Two]) -> None:
    assert failing(lambda: bring(Path("/proc/here"))) == "/proc/here: cannot be written to (No such file or directory)"


def test_names(two: type[Two], tmp_path: Path) -> None:
    datasets: dict[str, type[DatasetConfig]] = {"two": two, "folder": DatasetConfig}
    for name, sentence in {
        "tow": "'tow' is no dataset; did you mean 'two'? (to be had: two)",
        "folder": "'folder' is a dataset of files of your own (to be had: two)",
    }.items():
        assert failing(lambda name=name: get(name, datasets, tmp_path, lambda *_: None)) == sentence  # type: ignore[misc]


def test_images_are_counted(two: type[Two], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Two, "n_images", 3)
    assert failing(lambda: bring(tmp_path / "two")) == (
        f"{tmp_path}/two: holds 2 images, and two has 3; delete it and get it again"
    )


def test_two_at_once(two: type[Two], tmp_path: Path) -> None:
    from saefw.get import _alone

    with _alone(tmp_path / "two" / WORK):
        assert failing(lambda: bring(tmp_path / "two")) == f"{tmp_path}/two: another `saefw get` is at work there"
    assert bring(tmp_path / "two") == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with 1 MB of room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(server: Server, small_disk: Path) -> None:
    source = server.source("x.bin", os.urandom(2_000_000))
    with pytest.raises(OSError, match=r"^\[Errno 28\] ") as caught:
        fetch.fetch(source, small_disk / "new", no_one)
    sentence = "[Errno 28] 2,000,000 bytes are to come and 1,048,576 are free"
    assert str(caught.value) == f"{sentence}: '{small_disk / 'new'}'"
    # A size that is not true, so that the disk runs full while it comes.
    (small_disk / "ballast").write_bytes(bytes(500_000))
    told = source._replace(bytes=500_000)
    server.files["x.bin"] = os.urandom(500_000)

    def fill(done: int, of: int) -> None:
        if done == 100_000:
            (small_disk / "ballast").write_bytes(bytes(900_000))

    with pytest.raises(OSError, match=r"^\[Errno 28\] ") as caught:
        fetch.fetch(told, small_disk / "new", fill)
    assert str(caught.value) == f"[Errno 28] No space left on device: '{small_disk / 'new' / 'x.bin.part'}'"
    (small_disk / "ballast").unlink()
    assert fetch.fetch(told, small_disk / "new", no_one).read_bytes() == server.files["x.bin"]
    assert server.asked[-1] and server.asked[-1].startswith("bytes="), "it goes on where it broke off"


def test_full_disk_while_unpacking(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped({"x": os.urandom(2_000_000)}))
    with pytest.raises(OSError, match=r"^\[Errno 28\] ") as caught:
        unpack(tmp_path / "x.zip", small_disk / "out", no_one)
    assert str(caught.value) == (
        f"[Errno 28] 2,000,000 bytes are to be unpacked and 1,048,576 are free: '{small_disk / 'out.part'}'"
    )
    (tmp_path / "x.tgz").write_bytes(tar([("x", os.urandom(2_000_000))]))
    with pytest.raises(OSError, match=r"^\[Errno 28\] ") as caught:
        unpack(tmp_path / "x.tgz", small_disk / "out", no_one)
    assert str(caught.value) == f"[Errno 28] No space left on device: '{small_disk / 'out.part' / 'x'}'"
    assert not os.listdir(small_disk)
