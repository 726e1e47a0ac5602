//! A store that an earlier knibfs wrote (`tests/fixtures/format-1/make`) is read by this one: format 1 for ever.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

const FULL: &str = "2026-11-24T12-20-51Z";
const REMOVED: &str = "2026-11-24T12-20-51Z-2";
const INCREMENTAL: &str = "2026-11-24T12-20-51Z-3";
const ISOLATED: &str = "2026-11-24T12-20-52Z";

/// SHA-256 of each disk, as it was when the store was made.
const DISKS: [(&str, &str); 4] = [
    (FULL, "b042eb45cfb41ba5676eb2c281c3065d15cc715060f48e82ff361eb9fcad436b"),
    (REMOVED, "922384619d5995a853195c9b564f4c7568c87138022d897116f0fd23b8e702af"),
    (INCREMENTAL, "f61e977a916063ad7897c0b385649a64111ddc28a19e94ce1a7ec5982a3a0249"),
    (ISOLATED, "f61e977a916063ad7897c0b385649a64111ddc28a19e94ce1a7ec5982a3a0249"),
];

struct Old(tempfile::TempDir);

impl Old {
    fn unpack() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1/store.tar.gz");
        let tar = Command::new("tar").arg("-xzf").arg(packed).arg("-C").arg(dir.path()).status().unwrap();
        assert!(tar.success(), "tar failed");
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn knibfs(&self, arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_knibfs"))
            .args(arguments)
            .env("KNIBFS_STORE", self.path("store"))
            .env("KNIBFS_STATE_DIR", self.path("state"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn its_backups_are_listed_with_their_states() {
    let old = Old::unpack();
    let listed: serde_json::Value = serde_json::from_str(&old.knibfs(&["list", "--json"])).unwrap();
    let backups = listed["vms"][0]["backups"].as_array().unwrap();
    let seen: Vec<_> = backups
        .iter()
        .map(|b| {
            let text = |field: &str| b[field].as_str().unwrap();
            (text("name"), text("kind"), text("compression"), b["current"] == true, b["isolated"] == true)
        })
        .collect();
    assert_eq!(
        seen,
        [
            (FULL, "full", "Uncompressed", false, false),
            (INCREMENTAL, "incremental", "Compressed", true, false),
            (ISOLATED, "full", "Compressed", false, true),
        ]
    );
    let offerings: serde_json::Value =
        serde_json::from_str(&old.knibfs(&["offering", "list", "--json"])).unwrap();
    assert_eq!((&offerings[0]["name"], &offerings[0]["chain_size"]), (&"deflated".into(), &4.into()));
    assert_eq!(offerings[1]["name"], "packed");
}

#[test]
fn every_byte_is_as_it_was_written() {
    let old = Old::unpack();
    let checked: serde_json::Value =
        serde_json::from_str(&old.knibfs(&["check", "--read-data", "--json"])).unwrap();
    assert_eq!((&checked["backups"], &checked["images"]), (&4.into(), &4.into()));
    assert_eq!(checked["damage"], serde_json::json!([]));
    for (backup, hash) in DISKS {
        let out = old.path("out.raw");
        old.knibfs(&["export", &format!("web1/{backup}/root"), out.to_str().unwrap(), "-O", "raw"]);
        assert_eq!(sha256(&out), hash, "{backup}");
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn it_can_be_changed() {
    let old = Old::unpack();
    old.knibfs(&["compress", &format!("web1/{FULL}")]);
    old.knibfs(&["remove", &format!("web1/{ISOLATED}")]);
    old.knibfs(&["remove", &format!("web1/{INCREMENTAL}")]);
    let out = old.path("out.raw");
    old.knibfs(&["export", "web1/latest/root", out.to_str().unwrap(), "-O", "raw"]);
    assert_eq!(sha256(&out), DISKS[0].1);
    assert!(!old.path("store/vms/web1").join(REMOVED).exists());
}
