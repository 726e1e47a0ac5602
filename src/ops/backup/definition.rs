//! What a VM is beside its disks: its definition, the firmware's variables, the state of its TPM.

use std::fs;
use std::path::Path;

use crate::hypervisor::Guest;
use crate::store::{Staging, StoreError, StoreResult};

/// No firmware's variables and no TPM's state come near this. Bytes of one file.
const LARGEST: u64 = 64 << 20;

/// Copies them into the backup, readable for the owner only: they hold secrets.
pub(super) fn copy(guest: &Guest, staging: &Staging) -> StoreResult<()> {
    if !guest.xml.is_empty() {
        staging.write("domain.xml", guest.xml.as_bytes(), 0o600)?;
    }
    if let Some(nvram) = guest.nvram.as_ref().filter(|n| n.exists()) {
        file(nvram, staging, "nvram.fd")?;
    }
    match &guest.tpm_state {
        Some(state) => folder(state, staging, "tpm"),
        None => Ok(()),
    }
}

fn file(from: &Path, staging: &Staging, name: &str) -> StoreResult<()> {
    let meta = fs::metadata(from).map_err(StoreError::io("look at", from))?;
    if meta.len() > LARGEST {
        return Err(StoreError::Invalid(format!(
            "{} is larger than 64 MiB, which no state of a firmware or TPM is: look what it is",
            from.display()
        )));
    }
    let bytes = fs::read(from).map_err(StoreError::io("read", from))?;
    staging.write(name, &bytes, 0o600)
}

/// Folders and plain files; locks and sockets of a TPM that runs are no state.
fn folder(from: &Path, staging: &Staging, name: &str) -> StoreResult<()> {
    staging.create_dir(name)?;
    for entry in fs::read_dir(from).map_err(StoreError::io("read the folder", from))? {
        let entry = entry.map_err(StoreError::io("read the folder", from))?;
        let kind = entry.file_type().map_err(StoreError::io("look at", &entry.path()))?;
        let Some(part) = entry.file_name().to_str().map(|n| format!("{name}/{n}")) else { continue };
        if kind.is_dir() {
            folder(&entry.path(), staging, &part)?;
        } else if kind.is_file() && !part.ends_with("/.lock") {
            file(&entry.path(), staging, &part)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::hypervisor::Power;
    use crate::store::BackupId;
    use crate::store::layout_fixtures::store_with_vm;

    #[test]
    fn the_state_of_a_tpm_is_copied_for_the_owner_only() {
        let (dir, store, vm) = store_with_vm();
        let state = dir.path().join("swtpm");
        fs::create_dir_all(state.join("tpm2")).unwrap();
        fs::write(state.join("tpm2/tpm2-00.permall"), b"keys").unwrap();
        fs::write(state.join("tpm2/.lock"), b"").unwrap();
        let guest = Guest {
            uuid: None,
            name: "web1".into(),
            power: Power::Off,
            persistent: true,
            managed_save: false,
            volumes: vec![],
            skipped: vec![],
            refused: vec![],
            xml: "<domain/>".into(),
            nvram: Some(dir.path().join("none.fd")),
            tpm_state: Some(state.clone()),
        };
        let staging = store.stage(&vm, BackupId::random()).unwrap();
        copy(&guest, &staging).unwrap();
        let within = |name: &str| staging.dir().join(name);
        assert_eq!(fs::read(within("tpm/tpm2/tpm2-00.permall")).unwrap(), b"keys");
        assert!(!within("tpm/tpm2/.lock").exists() && !within("nvram.fd").exists());
        let modes = [("tpm", 0o700), ("tpm/tpm2/tpm2-00.permall", 0o600), ("domain.xml", 0o600)];
        for (name, mode) in modes {
            assert_eq!(fs::metadata(within(name)).unwrap().permissions().mode() & 0o777, mode, "{name}");
        }
        fs::File::create(state.join("huge")).unwrap().set_len(LARGEST + 1).unwrap();
        let again = store.stage(&vm, BackupId::random()).unwrap();
        assert!(copy(&guest, &again).unwrap_err().to_string().contains("larger than 64 MiB"));
    }
}
