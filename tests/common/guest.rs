//! Guests of libvirt for tests: defined in a folder of their own, gone with everything when dropped.
//!
//! ```ignore
//! let guest = Guest::new("backup").disk("vda", Disk::qcow2("256M")).with_system().start();
//! guest.wait_for_agent();
//! guest.write("/mnt/vda/hello", b"hello");
//! assert_eq!(guest.read("/mnt/vda/hello"), b"hello");
//! ```
//!
//! A guest without [`Builder::with_system`] runs QEMU with nothing to boot: enough for snapshots and block jobs.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use knibfs::hypervisor::{Images, LibvirtDomain};
use serde_json::{Value, json};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::sys;

use super::guest_files::{GuestSystem, script};
use super::qemu_images::{QemuImages, qemu_img};

/// The host that tests run guests on: `KNIBFS_TEST_URI`, else the libvirt of our own that `scripts/libvirt-start` starts.
pub fn uri() -> &'static str {
    static URI: OnceLock<String> = OnceLock::new();
    URI.get_or_init(|| match std::env::var("KNIBFS_TEST_URI") {
        Ok(uri) => uri,
        Err(_) => script("libvirt-start", &["URI"]).remove(0),
    })
}

/// A second host on this machine, for restores to another one: `KNIBFS_TEST_URI_2`, else one that `scripts/libvirt-start` starts.
pub fn other_uri() -> &'static str {
    static URI: OnceLock<String> = OnceLock::new();
    URI.get_or_init(|| match std::env::var("KNIBFS_TEST_URI_2") {
        Ok(uri) => uri,
        Err(_) => second_libvirt(),
    })
}

fn second_libvirt() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/libvirt-start");
    let out = std::process::Command::new(path).arg("second").env_remove("KNIBFS_TEST_URI").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let uri = text.lines().find_map(|line| line.strip_prefix("URI="));
    uri.unwrap_or_else(|| panic!("no second libvirt: {}", String::from_utf8_lossy(&out.stderr))).to_owned()
}

/// `kvm` where `KNIBFS_ACCEL` says that guests come up with it: a `/dev/kvm` alone is no proof.
fn domain_type() -> &'static str {
    if std::env::var("KNIBFS_ACCEL").is_ok_and(|a| a == "kvm") { "kvm" } else { "qemu" }
}
/// A guest without hardware acceleration on a busy machine is slow; one that is not ready by then never will be.
const BOOT: Duration = Duration::from_secs(180);

/// What a disk is made of.
#[derive(Debug, Clone)]
pub enum Disk {
    /// A new qcow2 file of that size (`256M`).
    Qcow2(String),
    /// A new raw file.
    Raw(String),
    /// A new raw file that the guest gets as a block device (a loop device).
    Block(String),
    /// A file that is there, with its format.
    Existing(PathBuf, &'static str),
    /// Any XML, taken as it is.
    Xml(String),
}

impl Disk {
    pub fn qcow2(size: &str) -> Self {
        Disk::Qcow2(size.into())
    }

    pub fn raw(size: &str) -> Self {
        Disk::Raw(size.into())
    }

    pub fn block(size: &str) -> Self {
        Disk::Block(size.into())
    }
}

/// A guest that is being described.
#[derive(Debug)]
pub struct Builder {
    name: String,
    dir: tempfile::TempDir,
    disks: Vec<(String, Disk)>,
    system: Option<GuestSystem>,
    memory_mib: u32,
    devices: String,
    firmware: String,
    uri: String,
}

impl Builder {
    pub fn disk(mut self, target: &str, disk: Disk) -> Self {
        self.disks.push((target.to_owned(), disk));
        self
    }

    /// Boots the small Linux system with the guest agent.
    pub fn with_system(mut self) -> Self {
        self.system = Some(GuestSystem::get());
        self.memory_mib = 512;
        self
    }

    /// More XML for `<os>`.
    pub fn firmware(mut self, xml: &str) -> Self {
        self.firmware.push_str(xml);
        self
    }

    /// More XML for `<devices>`.
    pub fn devices(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    /// On another libvirt than that of the tests.
    pub fn at(mut self, uri: &str) -> Self {
        uri.clone_into(&mut self.uri);
        self
    }

    /// The folder that new disks will lie in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes the disks and defines the domain.
    pub fn define(self) -> Guest {
        virt::error::clear_error_callback();
        let mut loops = Vec::new();
        let mut disks = String::new();
        for (target, disk) in &self.disks {
            disks.push_str(&disk_xml(self.dir.path(), target, disk, &mut loops));
        }
        let boot = self.system.as_ref().map_or(String::new(), |system| {
            format!(
                "<kernel>{}</kernel><initrd>{}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>",
                system.kernel.display(),
                system.initrd.display()
            )
        });
        let agent = self.system.as_ref().map_or("", |_| {
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
        });
        let console = self.dir.path().join("console.log");
        let xml = format!(
            "<domain type='{}'><name>{}</name><memory unit='MiB'>{}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type>{}{boot}</os><features><acpi/></features>\
             <cpu mode='maximum'/><on_crash>destroy</on_crash>\
             <devices>{disks}{agent}{}<serial type='file'><source path='{}'/></serial>\
             <memballoon model='none'/></devices></domain>",
            domain_type(),
            self.name,
            self.memory_mib,
            self.firmware,
            self.devices,
            console.display()
        );
        let connect = Connect::open(Some(&self.uri)).unwrap_or_else(|e| {
            let why = e.message();
            panic!("cannot reach libvirt at {}: {why}; start it with scripts/libvirt-start", self.uri)
        });
        let domain = connect.define_domain_xml(&xml).unwrap_or_else(|e| panic!("{}: {xml}", e.message()));
        Guest { name: self.name, dir: self.dir, loops, uri: self.uri, connect, domain }
    }

    /// Defines and starts it.
    pub fn start(self) -> Guest {
        let guest = self.define();
        guest.start();
        guest
    }
}

fn disk_xml(dir: &Path, target: &str, disk: &Disk, loops: &mut Vec<PathBuf>) -> String {
    let (kind, attribute, path, format) = match disk {
        Disk::Xml(xml) => return xml.clone(),
        Disk::Existing(path, format) => ("file", "file", path.clone(), *format),
        Disk::Qcow2(size) => ("file", "file", new_image(dir, target, "qcow2", size), "qcow2"),
        Disk::Raw(size) => ("file", "file", new_image(dir, target, "raw", size), "raw"),
        Disk::Block(size) => {
            let device = attach_loop(&new_image(dir, target, "raw", size));
            loops.push(device.clone());
            ("block", "dev", device, "raw")
        }
    };
    format!(
        "<disk type='{kind}' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>\
         <source {attribute}='{}'/><target dev='{target}' bus='virtio'/><serial>serial-{target}</serial></disk>",
        path.display()
    )
}

fn new_image(dir: &Path, target: &str, format: &str, size: &str) -> PathBuf {
    let path = dir.join(format!("{target}.{format}"));
    qemu_img(&["create", "-q", "-f", format, path.to_str().unwrap(), size]).unwrap();
    path
}

fn attach_loop(path: &Path) -> PathBuf {
    let out = std::process::Command::new("losetup").args(["--show", "-f"]).arg(path).output().unwrap();
    assert!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
    PathBuf::from(String::from_utf8(out.stdout).unwrap().trim())
}

/// A domain of a test.
pub struct Guest {
    name: String,
    dir: tempfile::TempDir,
    loops: Vec<PathBuf>,
    uri: String,
    connect: Connect,
    domain: Domain,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a command in the guest said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub code: i64,
    pub out: Vec<u8>,
    pub err: Vec<u8>,
}

impl Guest {
    /// Begins a guest whose name has `test` in it and is used by nothing else.
    pub fn new(test: &str) -> Builder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("knib-{test}-{}-{number}", std::process::id());
        // QEMU may run as another user: the folder must let it in.
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Builder {
            name,
            dir,
            disks: Vec::new(),
            system: None,
            memory_mib: 64,
            devices: String::new(),
            firmware: String::new(),
            uri: uri().to_owned(),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn uuid(&self) -> uuid::Uuid {
        self.domain.uuid().unwrap()
    }

    /// What libvirt's crate knows of it, for what this harness has no call for.
    pub fn raw(&self) -> (&Connect, &Domain) {
        (&self.connect, &self.domain)
    }

    /// The domain of that name on another host is the guest from now on: it was moved there.
    pub fn follow(&mut self, uri: &str) {
        let connect = Connect::open(Some(uri)).unwrap();
        let found = connect.lookup_domain_by_name(&self.name);
        self.domain = found.unwrap_or_else(|e| panic!("{} is not at {uri}: {}", self.name, e.message()));
        (self.connect, self.uri) = (connect, uri.to_owned());
    }

    /// The host that it is on.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// A path in the guest's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The guest as knibfs sees it, with `qemu-img` as its image engine.
    pub fn hypervisor(&self) -> LibvirtDomain {
        self.hypervisor_with(Arc::new(QemuImages))
    }

    pub fn hypervisor_with(&self, images: Arc<dyn Images>) -> LibvirtDomain {
        LibvirtDomain::open(&self.uri, &self.name, images).unwrap().with_program(env!("CARGO_BIN_EXE_knibfs"))
    }

    pub fn start(&self) {
        self.domain
            .create()
            .map(drop)
            .unwrap_or_else(|e| panic!("{} does not start: {}{}", self.name, e.message(), self.tpm_log()));
    }

    /// What the tools that make a TPM wrote where libvirt only says that they failed.
    fn tpm_log(&self) -> String {
        let base =
            self.uri.split_once("?socket=").and_then(|(_, socket)| Path::new(socket).parent()?.parent());
        let log = base.map(|base| base.join(format!("tpm-log/libvirt/qemu/{}-swtpm.log", self.name)));
        log.and_then(|log| std::fs::read_to_string(log).ok())
            .map_or_else(String::new, |log| format!("\n{log}"))
    }

    pub fn pause(&self) {
        self.domain.suspend().unwrap();
    }

    pub fn resume(&self) {
        self.domain.resume().unwrap();
    }

    /// As a power cut would.
    pub fn destroy(&self) {
        self.domain.destroy().unwrap();
    }

    pub fn is_running(&self) -> bool {
        self.domain.is_active().unwrap()
    }

    /// Shuts the guest down and waits until it is off: file systems are clean then.
    pub fn shutdown(&self) {
        // The small system has no service manager that could do this.
        let line =
            "sync; test -d /run/systemd/system && exec poweroff; umount -a -t ext4; sync; exec poweroff -f";
        let arguments = json!({"path": "/bin/sh", "arg": ["-c", line]});
        self.agent(json!({"execute": "guest-exec", "arguments": arguments})).unwrap();
        self.wait("the guest to be off", || !self.is_running());
    }

    /// Definition of this run.
    pub fn live_xml(&self) -> String {
        self.domain.xml_desc(0).unwrap()
    }

    /// Definition of the next run.
    pub fn persistent_xml(&self) -> String {
        self.domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).unwrap()
    }

    /// Waits for a condition; a test that waits in vain says for what, and what the guest's console said.
    pub fn wait(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + BOOT;
        while !condition() {
            assert!(
                Instant::now() < end,
                "{}: waited in vain for {what}; console:\n{}",
                self.name,
                self.console()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the guest wrote to its serial console.
    pub fn console(&self) -> String {
        let text = std::fs::read(self.path("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    pub fn wait_for_agent(&self) {
        self.wait("the guest agent", || self.agent(json!({"execute": "guest-ping"})).is_ok());
    }

    /// One command to the guest agent; its answer's `return`.
    pub fn agent(&self, command: Value) -> Result<Value, String> {
        let said = self
            .domain
            .qemu_agent_command(&command.to_string(), 30, 0)
            .map_err(|e| e.message().to_owned())?;
        let answer: Value = serde_json::from_str(&said).unwrap();
        Ok(answer["return"].clone())
    }

    /// Whether the guest's file systems are frozen.
    pub fn is_frozen(&self) -> bool {
        self.agent(json!({"execute": "guest-fsfreeze-status"})).unwrap() == json!("frozen")
    }

    /// Starts a command in the guest; [`Guest::finish`] waits for it.
    pub fn begin(&self, command: &[&str], input: &[u8]) -> i64 {
        let arguments = json!({
            "path": command[0], "arg": &command[1..], "capture-output": true, "input-data": base64(input),
        });
        let started = self.agent(json!({"execute": "guest-exec", "arguments": arguments})).unwrap();
        started["pid"].as_i64().unwrap()
    }

    /// Waits for a command to end.
    pub fn finish(&self, pid: i64) -> Said {
        let end = Instant::now() + BOOT;
        loop {
            let status = json!({"execute": "guest-exec-status", "arguments": {"pid": pid}});
            let status = self.agent(status).unwrap();
            if status["exited"] == json!(true) {
                let data = |key: &str| unbase64(status[key].as_str().unwrap_or_default());
                let code = status["exitcode"].as_i64().unwrap_or(-1);
                return Said { code, out: data("out-data"), err: data("err-data") };
            }
            assert!(Instant::now() < end, "{}: command {pid} does not end", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a command, whatever its exit code.
    pub fn try_exec(&self, command: &[&str]) -> Said {
        self.finish(self.begin(command, b""))
    }

    /// Runs a command that must succeed; its output.
    pub fn exec(&self, command: &[&str]) -> String {
        let said = self.try_exec(command);
        let err = String::from_utf8_lossy(&said.err);
        assert_eq!(said.code, 0, "{}: {command:?}: {err}", self.name);
        String::from_utf8_lossy(&said.out).into_owned()
    }

    /// Runs a shell command line that must succeed; its output.
    pub fn sh(&self, line: &str) -> String {
        self.exec(&["/bin/sh", "-c", line])
    }

    /// Makes a file system on a disk that has none and mounts it at `/mnt/<target>`.
    pub fn mkfs(&self, target: &str) {
        self.sh(&format!("mkfs.ext4 -q -F /dev/{target} && mkdir -p /mnt/{target}"));
        self.mount(target);
    }

    /// Mounts a disk at `/mnt/<target>`.
    pub fn mount(&self, target: &str) {
        self.sh(&format!("mkdir -p /mnt/{target} && mount -t ext4 /dev/{target} /mnt/{target}"));
    }

    /// Writes a file, durable when it returns.
    pub fn write(&self, path: &str, bytes: &[u8]) {
        let said = self.finish(self.begin(&["/bin/sh", "-c", &format!("cat > '{path}' && sync")], bytes));
        assert_eq!(said.code, 0, "{}: {}", self.name, String::from_utf8_lossy(&said.err));
    }

    pub fn read(&self, path: &str) -> Vec<u8> {
        let said = self.try_exec(&["/bin/cat", path]);
        assert_eq!(said.code, 0, "{}: {}", self.name, String::from_utf8_lossy(&said.err));
        said.out
    }

    pub fn exists(&self, path: &str) -> bool {
        self.try_exec(&["/bin/sh", "-c", &format!("test -e '{path}'")]).code == 0
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("console of {}:\n{}", self.name, self.console());
        }
        let _ = self.domain.destroy();
        let _ = self.domain.undefine_flags(
            sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | sys::VIR_DOMAIN_UNDEFINE_NVRAM,
        );
        for device in &self.loops {
            let _ = std::process::Command::new("losetup").arg("-d").arg(device).status();
        }
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let six = (word >> (18 - 6 * i)) & 63;
            out.push(if i <= chunk.len() { char::from(ALPHABET[six as usize]) } else { '=' });
        }
    }
    out
}

fn unbase64(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut word, mut bits) = (0u32, 0);
    for c in text.bytes() {
        let Some(six) = ALPHABET.iter().position(|a| *a == c) else { continue };
        word = (word << 6 | six as u32) & 0xff_ffff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push((word >> bits) as u8);
        }
    }
    out
}
