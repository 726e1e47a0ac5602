//! The program and a store in a folder, what it says, and whether it changed anything.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder with a store in `store`, what the host keeps about it in `state`, and logs in `log`.
#[derive(Debug, Clone)]
pub struct Lab {
    dir: PathBuf,
    store: PathBuf,
}

impl Lab {
    /// In that folder; there is no store yet.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), store: dir.join("store") }
    }

    /// With its store elsewhere.
    pub fn with_store(mut self, store: PathBuf) -> Self {
        self.store = store;
        self
    }

    /// Makes the store.
    pub fn init(self) -> Self {
        self.ok(&["init", self.store().to_str().unwrap()]);
        self
    }

    pub fn store(&self) -> &Path {
        &self.store
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The program, with any arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_knibfs"));
        command.args(arguments);
        self.environment(&mut command);
        command
    }

    /// The environment that names this store, for a command that runs the program in its turn.
    pub fn environment(&self, command: &mut Command) {
        command
            .current_dir(&self.dir)
            .env("KNIBFS_STORE", &self.store)
            .env("KNIBFS_STATE_DIR", self.path("state"))
            .env("NO_COLOR", "1");
    }

    /// A command that must succeed; what it printed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// A command that must succeed, with `--json`.
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// A command that is refused before it begins anything: its one sentence, which holds `words`.
    pub fn refused(&self, arguments: &[&str], words: &[&str]) -> String {
        let said = sentence(&self.command(arguments).output().unwrap(), 1);
        for words in words {
            assert!(said.contains(words), "{arguments:?}: no \"{words}\" in: {said}");
        }
        said
    }

    /// Takes a backup of `web1`; its folder in the store.
    pub fn backup(&self, more: &[&str]) -> PathBuf {
        let name = self.ok(&[&["backup", "web1"], more].concat());
        self.store.join("vms").join(name)
    }

    pub fn manifest(&self, backup: &Path) -> Value {
        serde_json::from_slice(&std::fs::read(backup.join("manifest.json")).unwrap()).unwrap()
    }

    /// `full` or `incremental`, and why, of the first disk.
    pub fn kind(&self, backup: &Path) -> (String, String) {
        let disk = &self.manifest(backup)["disks"][0];
        let text = |key: &str| disk[key].as_str().unwrap().to_owned();
        (text("kind"), text("reason"))
    }

    /// The folder where quick restores mount the store.
    pub fn mount_point(&self) -> Option<PathBuf> {
        // Tests put files of their own beside the folder that is about the store.
        let inside = std::fs::read_dir(self.path("state")).ok()?;
        let of_store = inside.map(|entry| entry.unwrap().path()).find(|path| path.is_dir())?;
        Some(of_store.join("mnt"))
    }

    pub fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        self.mount_point().is_some_and(|m| mounts.contains(m.to_str().unwrap()))
    }

    /// Takes the mount of quick restores away, where a test that failed left it.
    pub fn unmount(&self) {
        if let Some(mount) = self.mount_point().filter(|_| self.is_mounted()) {
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
    }

    /// Everything in the folder but what may change: the state of the host, logs, the guest's console.
    pub fn seen(&self) -> Seen {
        let mut all = BTreeMap::new();
        look(&self.dir, &mut all);
        if !self.store.starts_with(&self.dir) {
            look(&self.store, &mut all);
        }
        Seen(all)
    }
}

/// What a failed command said: exactly one line, on standard error, from the program, with nothing on standard output.
pub fn sentence(output: &Output, code: i32) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(output.stdout, b"", "{said}");
    assert!(said.starts_with("knibfs: ") && said.trim_end().lines().count() == 1, "not one sentence: {said}");
    said.trim_end().to_owned()
}

/// A folder's files as they were: kind, mode, owner, length and content.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen(BTreeMap<PathBuf, String>);

impl Seen {
    /// Fails, naming what differs, unless nothing does.
    pub fn assert_same(&self, now: &Seen, what: &str) {
        let differ: Vec<_> = self
            .0
            .iter()
            .filter(|(path, was)| now.0.get(*path) != Some(was))
            .map(|(path, was)| format!("{}: {was} became {:?}", path.display(), now.0.get(path)))
            .chain(
                now.0.keys().filter(|p| !self.0.contains_key(*p)).map(|p| format!("{} is new", p.display())),
            )
            .collect();
        assert!(differ.is_empty(), "{what} changed something:\n{}", differ.join("\n"));
    }
}

const MAY_CHANGE: [&str; 4] = ["state", "log", "console.log", "mnt"];

fn look(dir: &Path, all: &mut BTreeMap<PathBuf, String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if MAY_CHANGE.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let path = entry.path();
        let meta = path.symlink_metadata().unwrap();
        let about = format!("{:o} {}:{}", meta.permissions().mode(), meta.uid(), meta.gid());
        let about = if meta.is_dir() {
            look(&path, all);
            about
        } else if meta.is_symlink() {
            format!("{about} -> {}", std::fs::read_link(&path).unwrap().display())
        } else if meta.is_file() {
            let mut hash = blake3::Hasher::new();
            hash.update_reader(std::fs::File::open(&path).unwrap()).unwrap();
            format!("{about} {} bytes {}", meta.len(), hash.finalize())
        } else {
            about
        };
        all.insert(path, about);
    }
}

/// Runs a tool that must succeed.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}: {e}; scripts/install-deps installs it"));
    let both = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {both}");
    both
}

/// A file system of its own, in memory, gone when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounted at `path`, which is made.
    pub fn new(path: PathBuf, size: &str) -> Self {
        std::fs::create_dir(&path).unwrap();
        let options = format!("size={size}");
        tool("mount", &["-t", "tmpfs", "-o", &options, "knibfs-test", path.to_str().unwrap()]);
        Self { path }
    }

    /// Writes a file until nothing more fits.
    pub fn fill(&self) {
        use std::io::Write as _;
        let mut file = std::fs::File::create(self.path.join("filler")).unwrap();
        for block in [1 << 20, 4096, 1] {
            while file.write_all(&vec![1; block]).is_ok() {}
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// A command of the program that runs beside the test.
#[derive(Debug)]
pub struct Running {
    child: std::process::Child,
    errors: PathBuf,
}

impl Running {
    /// Starts it; with a failpoint's name, it stops there.
    pub fn start(lab: &Lab, arguments: &[&str], stop_at: Option<&str>) -> Self {
        let errors = lab.path("log").join(format!("{}.err", uuid::Uuid::new_v4()));
        std::fs::create_dir_all(lab.path("log")).unwrap();
        let mut command = lab.command(arguments);
        command.stdout(std::process::Stdio::piped()).stderr(std::fs::File::create(&errors).unwrap());
        if let Some(name) = stop_at {
            command.env("KNIBFS_FAILPOINT", format!("stop:{name}"));
        }
        let mut running = Self { child: command.spawn().unwrap(), errors };
        if let Some(name) = stop_at {
            running.wait(name, |running| running.state() == 'T');
        }
        running
    }

    /// Waits for a condition while it runs.
    pub fn wait(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while !condition(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended ({ended:?}) before {what}: {}", self.said());
            assert!(std::time::Instant::now() < end, "waited in vain for {what}: {}", self.said());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('X')
    }

    /// Its standard error so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Lets it go on after the place where it stopped.
    pub fn go_on(&self) {
        tool("kill", &["-CONT", &self.child.id().to_string()]);
    }

    /// Waits for its end; standard output, and whether it succeeded.
    pub fn end(mut self) -> (bool, String, String) {
        use std::io::Read as _;
        let mut out = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        let status = self.child.wait().unwrap();
        (status.success(), out.trim().to_owned(), self.said())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
