"""The mount's part of `scripts/bench`: rows of knibfs' mount beside qemu-storage-daemon's FUSE export, and beside local files."""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import threading
import time

from bench_lib import MIB, compare, drop_caches, read_through, run, say, storage_daemon

SEED = 4  # the same offsets in every run and on every machine
CACHE = 256 * MIB  # the mount's default
LAYERS = 32
REPO = pathlib.Path(__file__).resolve().parent.parent


def data_extents(image, data=True):
    """Where the image holds data, or (data=False) none, as (start, length) seen by the guest."""
    return [
        (extent["start"], extent["length"])
        for extent in json.loads(run("qemu-img", "map", "-U", "--output=json", image))
        if (extent["data"] and not extent["zero"]) == data
    ]


def sequential(extents, total):
    for start, length in extents:
        for offset in range(start, start + length, MIB):
            if total <= 0:
                return
            size = min(MIB, start + length - offset)
            total -= size
            yield offset, size


def scattered(extents, count, size=4096):
    chance = random.Random(SEED)
    fitting = [(start, length) for start, length in extents if length >= size]
    for start, length in chance.choices(fitting, weights=[length // size for _, length in fitting], k=count):
        yield start + chance.randrange(length // size) * size, size


Reads = collections.namedtuple("Reads", "list queue direct unit")  # unit: what is compared, "MiB/s", "IOPS" or "s"


def fio(view, reads, work):
    """Replays the reads, at most `queue` of them at a time. Returns the figure that `unit` names."""
    log = work / "reads.log"
    with open(log, "w", encoding="ascii") as file:
        file.write(f"fio version 2 iolog\n{view} add\n{view} open\n")
        file.writelines(f"{view} read {offset} {size}\n" for offset, size in reads.list)
        file.write(f"{view} close\n")
    job = json.loads(run(
        "fio", "--name=reads", f"--read_iolog={log}", "--replay_no_stall=1", "--readonly", "--ioengine=libaio",
        f"--iodepth={reads.queue}", f"--direct={reads.direct}", "--output-format=json", cwd=work,
    ))["jobs"][0]
    if job["error"]:
        raise SystemExit(f"bench: fio reports error {job['error']} on {view}")
    if job["read"]["total_ios"] != len(reads.list):
        raise SystemExit(f"bench: fio made {job['read']['total_ios']} of {len(reads.list)} reads on {view}")
    return {
        "MiB/s": job["read"]["bw_bytes"] / MIB,
        "IOPS": job["read"]["iops"],
        "s": sum(size for _, size in reads.list) / job["read"]["bw_bytes"],
    }[reads.unit]


def buffered(path, pieces):
    """MiB/s of reading these pieces of a file into one buffer. Only the reads are timed."""
    buffer = memoryview(bytearray(MIB))
    with open(path, "rb", buffering=0) as file:
        fd, began = file.fileno(), time.monotonic()
        done = sum(os.preadv(fd, [buffer[:size]], offset) for offset, size in pieces)
        took = time.monotonic() - began
    if done != sum(size for _, size in pieces):
        raise SystemExit(f"bench: {done} bytes came of {path}, not all that were asked for")
    return done / MIB / took


def timed(*command):
    began = time.monotonic()
    run(*command)
    return time.monotonic() - began


def record_boot(disk, kernel, initrd, work):
    """Boots the guest from a throw-away overlay; returns the reads that it made of its disk, as (offset, size)."""
    overlay, trace, console = (work / name for name in ("boot.qcow2", "boot.trace", "boot.console"))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", overlay)
    accel = os.environ.get("KNIBFS_ACCEL") or run("bash", "-c", f". {pathlib.Path(__file__).parent}/lib.sh; accel")
    with open(trace, "wb") as events:
        guest = subprocess.Popen(
            [
                "qemu-system-x86_64", "-accel", accel, "-cpu", "max", "-smp", "2", "-m", "1024", "-nodefaults", "-no-reboot",
                "-display", "none", "-serial", f"file:{console}", "-kernel", kernel, "-initrd", initrd,
                "-append", "root=/dev/vda rw console=ttyS0", "-trace", "virtio_blk_handle_read",
                "-drive", f"file={overlay},if=virtio,cache=none,aio=threads",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=events,
        )
    try:
        limit = time.monotonic() + 300
        while b"login:" not in (console.read_bytes() if console.exists() else b""):
            if guest.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"bench: the guest did not come up: see {console}, {trace.read_bytes()[-500:]!r}")
            time.sleep(0.2)
    finally:
        guest.kill()
        guest.wait()
    overlay.unlink()
    reads = []
    for line in trace.read_text(errors="replace").splitlines():
        words = line.split()
        if "virtio_blk_handle_read" in line and "sector" in words and "nsectors" in words:
            sector, count = (int(words[words.index(name) + 1]) for name in ("sector", "nsectors"))
            reads.append((sector * 512, count * 512))
    if len(reads) < 100:
        raise SystemExit(f"bench: the guest made {len(reads)} reads: {trace.read_bytes()[:300]!r}")
    return reads


def forget_boots(image):
    """Reads all over a disk are taken for a boot's, and decoded ahead the next time: only the rows of boots are to show that."""
    for trace in image.parents[1].glob(".boot-*"):
        trace.unlink()


class Memory:
    """The most memory that a server had, in MiB."""

    def __init__(self):
        self.most = 0

    @contextlib.contextmanager
    def of(self, server):
        with server as (view, pid):
            yield view
            peak = next((line for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line))
            self.most = max(self.most, int(peak.split()[1]) / 1024)


class Mount:
    """All rows, each with its figure, the peer's, their ratio and the memory of knibfs."""

    def __init__(self, knibfs, disk, guest, runs, quick, work, rows, only):
        self.knibfs, self.disk, self.guest = knibfs, disk, guest
        self.runs, self.quick, self.work, self.rows, self.only = runs, quick, work, rows, only
        self.memory = Memory()

    def wants(self, label):
        return not self.only or self.only in label

    def served(self, image, *options):
        return self.memory.of(self.knibfs.served(image, *options))

    def row(self, label, unit, ours, theirs, what="times"):
        a, b = statistics.median(ours), statistics.median(theirs)
        figure = (lambda value: f"{value:,.2f} {unit}") if unit == "s" else (lambda value: f"{value:,.0f} {unit}")
        memory = f"{self.memory.most:.0f} MiB" if self.memory.most else ""
        if self.memory.most > CACHE / MIB + 64:
            memory += f": more than {CACHE // MIB} + 64"
        self.rows.append((label, figure(a), figure(b), f"{a / b:.2f} {what}", memory))
        self.memory.most = 0

    def all(self, compressed=None):
        self.images = {"zstd": compressed} if compressed else {}
        self.beside_the_peer("zstd")
        self.second_read()
        self.copy_out()
        self.passed_through()
        self.beside_the_peer("plain")
        self.beside_the_peer("holes", caches=("warm",))
        self.boot()
        self.deep_chain()
        self.many_backups()

    def image(self, kind):
        """The disk as a full backup, compressed (zstd) or plain; made when a row first needs it."""
        if kind not in self.images:
            self.images[kind] = self.knibfs.backup(self.disk, kind, kind == "zstd")[1]
        return self.images[kind]

    def beside_the_peer(self, label, caches=("cold", "warm")):
        """`holes` are those of the plain image: there is nothing to read or decode, only requests to answer."""
        share = 8 if self.quick else 1
        jobs = {
            "sequential 1 MiB": lambda e: Reads(list(sequential(e, 1536 * MIB // share)), 1, 0, "MiB/s"),
            "sequential 1 MiB direct": lambda e: Reads(list(sequential(e, 1536 * MIB // share)), 1, 1, "MiB/s"),
            "random 4 KiB direct, queue 1": lambda e: Reads(list(scattered(e, 16000 // share)), 1, 1, "IOPS"),
            "random 4 KiB direct, queue 32": lambda e: Reads(list(scattered(e, 96000 // share)), 32, 1, "IOPS"),
            "random 64 KiB direct, 4 readers": lambda e: Reads(list(scattered(e, 24000 // share, 65536)), 4, 1, "IOPS"),
        }
        extents = []
        for (job, reads), cache in itertools.product(jobs.items(), caches):
            name = f"raw view, {label}: {job}, {cache}"
            if not self.wants(name):
                continue
            if not extents:
                holes = label == "holes"
                image = self.image("plain" if holes else label)
                extents = data_extents(image, data=not holes)
                with self.knibfs.served(image) as (view, _):
                    compare(view, "raw", self.disk)
                with storage_daemon(image, self.work) as view:
                    compare(view, "raw", self.disk)
            reads, ours, theirs = reads(extents), [], []
            for turn in range(self.runs):
                say(f"{name}: run {turn + 1} of {self.runs}")
                for serve, into in ((self.served, ours), (lambda i: storage_daemon(i, self.work), theirs)):
                    forget_boots(image)
                    drop_caches()
                    if cache == "warm":
                        read_through(image)
                    with serve(image) as view:
                        into.append(fio(view, reads, self.work))
            self.row(name, reads.unit, ours, theirs)

    def second_read(self):
        name = "second buffered read (peer: a local file's)"
        if not self.wants(name):
            return
        image = self.image("zstd")
        local = self.work / "local.raw"
        run("qemu-img", "convert", "-O", "raw", self.disk, local)
        pieces, ours, theirs = list(sequential(data_extents(local), 512 * MIB)), [], []
        with self.served(image) as view:
            for path in (view, local):
                buffered(path, pieces)
            for turn in range(self.runs):
                say(f"{name}: run {turn + 1} of {self.runs}")
                ours.append(buffered(view, pieces))
                theirs.append(buffered(local, pieces))
            compare(view, "raw", self.disk)
        local.unlink()
        self.row(name, "MiB/s", ours, theirs)

    def copy_out(self):
        name = "cp of the sparse raw out of the mount (peer: knibfs export)"
        if not self.wants(name):
            return
        image = self.image("zstd")
        out, ours, theirs = self.work / "out.raw", [], []
        spec = f"bench/{image.parent.name}/root"
        for turn in range(self.runs):
            say(f"{name}: run {turn + 1} of {self.runs}")
            drop_caches()
            out.unlink(missing_ok=True)
            with self.served(image) as view:
                ours.append(timed("cp", "--sparse=auto", view, out) + timed("sync", out))
            compare(out, "raw", self.disk)
            drop_caches()
            out.unlink()
            began = time.monotonic()
            self.knibfs(image.parents[3], "export", spec, out, "-O", "raw")
            run("sync", out)
            theirs.append(time.monotonic() - began)
            compare(out, "raw", self.disk)
        out.unlink()
        self.row(name, "s", ours, theirs, "of the time")

    def passed_through(self):
        share = 8 if self.quick else 1
        image = None
        for job, queue, direct, unit in (
            ("sequential 1 MiB, warm", 1, 0, "MiB/s"),
            ("random 4 KiB direct, queue 1", 1, 1, "IOPS"),
            ("random 4 KiB direct, queue 32", 32, 1, "IOPS"),
        ):
            name = f"stored file, passthrough: {job} (peer: the same file in the store)"
            if not self.wants(name):
                continue
            image = image or self.image("plain")
            whole = [(0, image.stat().st_size)]
            pieces = scattered(whole, (16000 if queue == 1 else 96000) // share) if direct else sequential(whole, 1536 * MIB // share)
            reads, ours, theirs = Reads(list(pieces), queue, direct, unit), [], []
            for turn in range(self.runs):
                say(f"{name}: run {turn + 1} of {self.runs}")
                drop_caches()
                read_through(image)
                with self.served(image, "--passthrough") as view:
                    ours.append(fio(view.parent / image.name, reads, self.work))
                theirs.append(fio(image, reads, self.work))
            self.row(name, unit, ours, theirs)

    def boot(self):
        name = "replay of a recorded boot, cold, compressed"
        if not self.wants(name):
            return
        image = self.image("zstd")
        say(f"{name}: recording a boot")
        reads = Reads(record_boot(self.disk, *self.guest, self.work), 4, 1, "s")
        size = sum(size for _, size in reads.list) / MIB
        say(f"{name}: {len(reads.list)} reads, {size:.0f} MiB")
        first, ours, theirs = [], [], []
        for turn in range(self.runs):
            say(f"{name}: run {turn + 1} of {self.runs}")
            forget_boots(image)
            for into in (first, ours):
                drop_caches()
                with self.served(image) as view:
                    into.append(fio(view, reads, self.work))
            if not list(image.parents[1].glob(".boot-*")):
                raise SystemExit("bench: the boot left no trace")
            drop_caches()
            with storage_daemon(self.disk, self.work) as view:
                theirs.append(fio(view, reads, self.work))
        self.row(f"{name}, first boot (peer: a plain local qcow2)", "s", first, theirs, "of the time")
        self.row(f"{name}, with its trace (the same peer)", "s", ours, theirs, "of the time")

    def many_backups(self):
        """`benches/many_backups.rs`, which has no peer: beside each row stands its aim."""
        name = "store with 10,000 backups in 200 VMs (peer: the aim)"
        if not self.wants(name):
            return
        say(name)
        table = run("cargo", "bench", "--locked", "--quiet", "--bench", "many_backups", cwd=REPO)
        for line in table.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("|") and cells[1] != "median" and not cells[1].startswith("-"):
                row, median, worst, aim = cells
                median = f"{median}, worst {worst}" if median else worst
                self.rows.append((f"{name}: {row}", median, f"at most {aim}", "", ""))

    def deep_chain(self):
        """A disk of 512 MiB, changed a little and backed up, 32 times; and the same content in one full backup."""
        name = f"chain of {LAYERS} (peer: the same content at depth 1)"
        if not self.wants(name):
            return
        say(f"{name}: taking {LAYERS} backups")
        small = self.work / "small.qcow2"
        run("qemu-img", "convert", "-O", "raw", self.disk, self.work / "whole.raw")
        with open(self.work / "whole.raw", "rb") as whole, open(self.work / "small.raw", "wb") as piece:
            whole.seek(256 * MIB)
            for _ in range(512):
                piece.write(whole.read(MIB))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.work / "small.raw", small)
        for name_of in ("whole.raw", "small.raw"):
            (self.work / name_of).unlink()
        with self.knibfs.growing(small, "deep", LAYERS) as store:
            chance = random.Random(SEED)
            for layer in range(LAYERS):
                if layer:
                    writes = [f"write -q -P {layer} {chance.randrange(8192) * 65536} 64k" for _ in range(64)]
                    run("qemu-io", "-f", "qcow2", *(word for write in writes for word in ("-c", write)), small)
                deep = store / "vms" / self.knibfs(store, "backup", "bench") / "root.qcow2"
            flat = store / "vms" / self.knibfs(store, "backup", "--isolated", "bench") / "root.qcow2"
            extents = data_extents(flat)
            for job, reads in (
                ("4 KiB direct, queue 1", Reads(list(scattered(extents, 16000)), 1, 1, "IOPS")),
                ("sequential 1 MiB", Reads(list(sequential(extents, 512 * MIB)), 1, 0, "MiB/s")),
            ):
                ours, theirs = [], []
                for turn in range(self.runs):
                    say(f"{name}, {job}: run {turn + 1} of {self.runs}")
                    for image, into in ((deep, ours), (flat, theirs)):
                        drop_caches()
                        for layer in (store / "vms" / "bench").glob("*/root.qcow2"):
                            read_through(layer)
                        with self.served(image) as view:
                            if turn == 0:
                                compare(view, "raw", small)
                            into.append(fio(view, reads, self.work))
                self.row(f"{name}: {job}", reads.unit, ours, theirs)
        small.unlink()
