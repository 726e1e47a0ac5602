"""What the parts of `scripts/bench` share."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

MIB = 1 << 20


def run(*command, **options):
    """Runs a command to its end; its output is shown only when it fails."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    if done.returncode != 0:
        sys.exit(f"bench: {' '.join(command)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def say(text):
    print(text, file=sys.stderr, flush=True)


def read_through(path):
    """Into the page cache; not the holes."""
    with open(path, "rb", buffering=0) as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # only a hole follows
                return
            at += len(file.read(8 * MIB))


def drop_caches():
    os.sync()
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3\n")


def compare(raw_or_qcow2, form, disk):
    """Ends the bench unless both show the guest the same bytes."""
    run("qemu-img", "compare", "-U", "-f", form, "-F", "qcow2", raw_or_qcow2, disk)


class Knibfs:
    """The program, its stores and its mount, in one folder."""

    def __init__(self, binary, work):
        self.binary, self.work = binary, work
        self.env = dict(os.environ, KNIBFS_STATE_DIR=str(work / "state"))

    def __call__(self, store, *command):
        return run(self.binary, "-s", store, *command, env=self.env)

    def backup(self, disk, name, compress):
        """A full backup of a plain disk file into a new store. Returns the seconds of the backup and the stored file."""
        store = self.work / name
        shutil.rmtree(store, ignore_errors=True)
        self(store, "init", store, *(["--write-once"] if compress else []))
        offering = self(store, "offering", "create", "bench", *(["--compress"] if compress else []))
        self(store, "vm", "add", "bench", "--disk", f"root={disk}", "--track", "scan", "--offering", offering)
        began = time.monotonic()
        backup = self(store, "backup", "bench")
        return time.monotonic() - began, store / "vms" / backup / "root.qcow2"

    def forget(self, name):
        shutil.rmtree(self.work / name)

    @contextlib.contextmanager
    def growing(self, disk, name, chain):
        """A store for many compressed backups of one disk; gone at the end."""
        store = self.work / name
        self(store, "init", store, "--write-once")
        offering = self(store, "offering", "create", "bench", "--compress", "--chain-size", chain)
        self(store, "vm", "add", "bench", "--disk", f"root={disk}", "--track", "scan", "--offering", offering)
        yield store
        self.forget(name)

    @contextlib.contextmanager
    def served(self, image, *options):
        """The raw view of a stored image, and the number of the process that serves it."""
        store, backup = image.parents[3], image.parent
        mount = self.work / "mnt"
        mount.mkdir(exist_ok=True)
        self(store, "mount", *options, mount)
        try:
            yield mount / "vms" / "bench" / backup.name / "root.raw", served_by(mount)
        finally:
            self(store, "umount", mount)


def served_by(mount):
    """The process that serves a mount: the last one that names it, for a keeper starts before its server."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"mount" in words and os.fsencode(mount) in words:
                found.append((int((folder / "stat").read_text().rsplit(")")[-1].split()[19]), int(folder.name)))
    return max(found)[1]


@contextlib.contextmanager
def storage_daemon(image, work):
    """qemu-storage-daemon with the image as a raw file; yields that file's path."""
    view, pid = work / "peer.raw", work / "peer.pid"
    view.touch()
    run(
        "qemu-storage-daemon", "--daemonize", "--pidfile", pid,
        "--blockdev", f"driver=file,node-name=file,filename={image},read-only=on,locking=off",
        "--blockdev", "driver=qcow2,node-name=image,file=file,read-only=on",
        "--export", f"type=fuse,id=export,node-name=image,mountpoint={view},writable=off",
    )
    number = int(pid.read_text())
    try:
        yield view
    finally:
        os.kill(number, 15)
        while pathlib.Path(f"/proc/{number}").exists():
            time.sleep(0.05)


def machine():
    cpu = next(
        (line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    qemu = run("qemu-img", "--version").splitlines()[0]
    return f"{os.cpu_count()} × {cpu}, {memory:.0f} GiB, Linux {os.uname().release}, {qemu}"
