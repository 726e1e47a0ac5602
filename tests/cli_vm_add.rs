//! `vm add` with disk files: what is taken, and what is refused with nothing changed.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

struct Program {
    dir: tempfile::TempDir,
}

impl Program {
    fn new() -> Self {
        let program = Self { dir: tempfile::tempdir().unwrap() };
        let store = program.path("store");
        assert_eq!(program.run(&["init", store.to_str().unwrap()]).0, 0);
        fs::write(program.path("root.raw"), vec![1; 1 << 20]).unwrap();
        program
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_knibfs"))
            .args(arguments)
            .current_dir(self.dir.path())
            .env("KNIBFS_STORE", self.path("store"))
            .env("KNIBFS_STATE_DIR", self.path("state"))
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn qemu_img(&self, arguments: &[&str]) {
        let output = Command::new("qemu-img")
            .args(arguments)
            .current_dir(self.dir.path())
            .output()
            .expect("qemu-img is missing: install qemu-utils");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A refused `vm add`: what it said. No VM is there afterwards.
    fn refused(&self, arguments: &[&str]) -> String {
        let mut all = vec!["vm", "add", "web1"];
        all.extend(arguments);
        let (code, out, said) = self.run(&all);
        assert_eq!((code, out.as_str()), (1, ""), "{arguments:?}: {said}");
        assert_eq!(self.run(&["vm", "list"]).1, "", "{arguments:?} left a VM");
        said
    }
}

#[test]
fn a_vm_of_disk_files_is_added_with_absolute_paths_and_found_formats() {
    let program = Program::new();
    program.qemu_img(&["create", "-q", "-f", "qcow2", "data.qcow2", "10M"]);
    let arguments = ["vm", "add", "web1", "--disk", "root=root.raw", "--disk", "data=data.qcow2"];
    assert_eq!(program.run(&arguments), (0, "web1\n".into(), String::new()));
    let shown: Value = serde_json::from_str(&program.run(&["vm", "show", "web1", "--json"]).1).unwrap();
    let volumes = shown["volumes"].as_array().unwrap();
    let real = program.dir.path().canonicalize().unwrap();
    assert_eq!((volumes[0]["name"].as_str(), volumes[0]["format"].as_str()), (Some("root"), Some("raw")));
    assert_eq!((volumes[1]["name"].as_str(), volumes[1]["format"].as_str()), (Some("data"), Some("qcow2")));
    assert_eq!(volumes[0]["path"], real.join("root.raw").to_str().unwrap());
    assert_eq!(shown["source"]["track"], "scan");
    let (code, _, said) = program.run(&arguments);
    assert!(code == 1 && said.contains("there already is a VM \"web1\""), "{said}");
}

#[test]
fn disks_that_could_not_be_backed_up_are_refused() {
    let program = Program::new();
    fs::create_dir(program.path("folder")).unwrap();
    std::os::unix::fs::symlink("root.raw", program.path("link.raw")).unwrap();
    for other in ["vmdk", "vdi", "vhdx", "vpc", "qed"] {
        program.qemu_img(&["create", "-q", "-f", other, &format!("disk.{other}"), "4M"]);
    }
    let twice = ["--disk", "a=root.raw", "--disk", "a=folder"];
    for (arguments, words) in [
        (&["--disk", "root=nowhere.raw"][..], "there is no such file"),
        (&["--disk", "root=folder"], "neither a file nor a block device"),
        (&twice, "give each its own"),
        (&["--disk", "a=root.raw", "--disk", "b=link.raw"], "the same file as the disk a"),
        (&["--disk", "a=store/knibfs.toml"], "it lies in the store"),
        (&["--disk", "a=disk.vmdk"], "it is a VMDK image"),
        (&["--disk", "a=disk.vdi"], "it is a VDI image"),
        (&["--disk", "a=disk.vhdx"], "it is a VHDX image"),
        (&["--disk", "a=disk.vpc"], "it is a VPC image"),
        (&["--disk", "a=disk.qed"], "it is a QED image"),
        (&["--disk", "a=root.raw", "--track", "overlay"], "use `--track scan`"),
        (&["--disk", "a=root.raw", "--exclude-disk", "b"], "no such disk; it has a"),
        (&["--disk", "a=root.raw", "--offering", "gold"], "there is no offering"),
        (&["--disk", "a=root.raw", "--delta-dir", "nowhere"], "for deltas"),
        (&["--disk", "a=root.raw", "--delta-dir", "root.raw"], "it is not a folder"),
    ] {
        let said = program.refused(arguments);
        assert!(said.contains(words), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_disk_that_makes_no_sense_is_wrong_usage() {
    let program = Program::new();
    for arguments in [
        &["vm", "add", "web1"][..],
        &["vm", "add", "web1", "--disk", "root.raw"],
        &["vm", "add", "web1", "--disk", "../x=root.raw"],
        &["vm", "add", "web1", "--disk", "a="],
        &["vm", "add", "we/b", "--disk", "a=root.raw"],
        &["vm", "add", "web1", "--disk", "a=root.raw", "--track", "guess"],
    ] {
        assert_eq!(program.run(arguments).0, 2, "{arguments:?}");
    }
}

#[test]
fn an_excluded_disk_is_not_looked_at() {
    let program = Program::new();
    let (code, _, said) = program.run(&[
        "vm",
        "add",
        "web1",
        "--disk",
        "a=root.raw",
        "--disk",
        "b=nowhere",
        "--exclude-disk",
        "b",
    ]);
    assert_eq!(code, 0, "{said}");
}

/// What the loader maps before the program begins.
fn libraries_of(program: &str) -> String {
    let output = Command::new(program).env("LD_TRACE_LOADED_OBJECTS", "1").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_program_starts_without_libvirt_s_library() {
    assert!(libraries_of("virsh").contains("libvirt.so"), "this does not show libraries");
    let libraries = libraries_of(env!("CARGO_BIN_EXE_knibfs"));
    assert!(libraries.contains("libc.so") && !libraries.contains("libvirt"), "{libraries}");
}

#[test]
fn disk_files_need_no_libvirt_and_a_domain_is_refused_with_the_way_out() {
    let program = Program::new();
    // The loader looks here first, and goes on nowhere else when it finds one that is none.
    fs::write(program.path("libvirt.so.0"), "").unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_knibfs"))
            .args(arguments)
            .current_dir(program.dir.path())
            .env("KNIBFS_STORE", program.path("store"))
            .env("KNIBFS_STATE_DIR", program.path("state"))
            .env("LD_LIBRARY_PATH", program.dir.path())
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run(&["vm", "add", "db1", "--domain", "db1", "--uri", "qemu:///system"]);
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("qemu:///system: its library cannot be loaded") && said.contains("libvirt0"),
        "{said}"
    );
    assert_eq!(program.run(&["vm", "list"]).1, "");
    let root = format!("root={}", program.path("root.raw").display());
    for arguments in [&["vm", "add", "web1", "--disk", &root][..], &["backup", "web1"]] {
        assert_eq!(run(arguments).0, 0, "{arguments:?}");
    }
}
