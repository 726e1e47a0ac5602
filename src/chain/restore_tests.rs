use super::*;

fn disk(name: &str, place: Place) -> DiskNow {
    DiskNow {
        name: DiskName::new(name).unwrap(),
        size: 100,
        wanted: None,
        place,
        others: vec![],
        snapshots: vec![],
    }
}

fn device(size: u64) -> Place {
    Place::Block { path: "/dev/loop7".into(), size }
}

/// A stopped VM with a file, without an offering, and a backup that is whole.
fn asked() -> Restore {
    Restore {
        into: Into::SameVm,
        quick: false,
        host: None,
        backup: BackupNow {
            name: "web1/b1".into(),
            state: BackupState::BackedUp,
            compression: CompressionState::Compressed,
            validation: ValidationState::Valid,
            damage: None,
        },
        vm: VmNow { name: "web1".into(), running: false, saved: false, has_domain: true, offering: None },
        disks: vec![disk("vda", Place::File)],
        room: vec![],
    }
}

fn host(trouble: Option<&str>, is_own: bool) -> Option<HostNow> {
    Some(HostNow { name: "b".into(), trouble: trouble.map(str::to_owned), is_own })
}

fn refused(change: impl FnOnce(&mut Restore)) -> String {
    let mut asked = asked();
    change(&mut asked);
    restore(&asked).expect_err("it was not refused").to_string()
}

fn allowed(change: impl FnOnce(&mut Restore)) -> Vec<Action> {
    let mut asked = asked();
    change(&mut asked);
    restore(&asked).unwrap_or_else(|e| panic!("{e}"))
}

/// Row "restoreBackup", normal: every volume is rewritten, what is gone is made again.
#[test]
fn files_are_swapped_devices_written_in_place_and_what_is_gone_is_made_again() {
    let disks = vec![disk("vda", Place::File), disk("vdb", device(100)), disk("vdc", Place::Nowhere)];
    let actions = allowed(|a| a.disks = disks);
    assert_eq!(actions, [Action::Swap, Action::InPlace, Action::Make]);
}

/// Rows "restoreVolume…AndAttachToVM" and "createVMFromBackup": new volumes only, whatever lies there.
#[test]
fn a_new_volume_or_vm_leaves_the_old_volumes_alone() {
    for into in [Into::NewVolume, Into::NewVm] {
        for place in [Place::File, Place::Nowhere, device(1)] {
            assert_eq!(allowed(|a| (a.into, a.disks[0].place) = (into, place)), [Action::Make]);
        }
    }
}

#[test]
fn a_running_vm_gets_new_volumes_but_is_not_rewritten() {
    assert!(refused(|a| a.vm.running = true).contains("running: shut it down"));
    assert!(refused(|a| (a.vm.running, a.quick) = (true, true)).contains("starts it again"));
    for quick in [false, true] {
        allowed(|a| (a.into, a.vm.running, a.quick) = (Into::NewVolume, true, quick));
    }
    assert!(refused(|a| a.vm.saved = true).contains("managedsave"));
    allowed(|a| (a.into, a.vm.saved, a.vm.running) = (Into::NewVm, true, true));
}

#[test]
fn quick_needs_the_offerings_flag_and_a_domain() {
    let said = refused(|a| (a.quick, a.vm.offering) = (true, Some(("gold".into(), false))));
    assert!(said.contains("\"gold\"") && said.contains("allowQuickRestore"), "{said}");
    allowed(|a| (a.quick, a.vm.offering) = (true, Some(("gold".into(), true))));
    allowed(|a| a.quick = true);
    allowed(|a| a.vm.offering = Some(("gold".into(), false)));
    assert!(refused(|a| (a.quick, a.vm.has_domain) = (true, false)).contains("plain disk files"));
    allowed(|a| a.vm.has_domain = false);
    assert!(refused(|a| (a.quick, a.disks[0].place) = (true, device(100))).contains("--storage"));
}

#[test]
fn a_host_is_for_quick_restores_and_must_be_known_and_up() {
    for into in [Into::SameVm, Into::NewVolume] {
        assert!(refused(|a| (a.into, a.host) = (into, host(None, false))).contains("only for quick"));
    }
    allowed(|a| (a.into, a.host) = (Into::NewVm, host(None, false)));
    allowed(|a| (a.quick, a.host) = (true, host(None, false)));
    let said = refused(|a| (a.quick, a.host) = (true, host(Some("there is no such host"), false)));
    assert_eq!(said, "the host b cannot be used: there is no such host");
    let running = |own| {
        move |a: &mut Restore| {
            (a.into, a.quick, a.vm.running, a.host) = (Into::NewVolume, true, true, host(None, own));
        }
    };
    assert!(refused(running(false)).contains("another host"));
    allowed(running(true));
}

/// "Refused while VM snapshots of those volumes exist", and what else is wrong with volumes.
#[test]
fn volumes_that_others_need_are_left_alone() {
    assert!(refused(|a| a.disks[0].snapshots = vec!["s1".into()]).contains("snapshots (s1)"));
    assert!(refused(|a| a.disks[0].others = vec!["domain \"db\"".into()]).contains("domain \"db\""));
}

#[test]
fn a_target_is_never_too_small() {
    assert!(refused(|a| a.disks[0].wanted = Some(99)).contains("100 bytes, and 99"));
    for wanted in [100, 101] {
        allowed(|a| a.disks[0].wanted = Some(wanted));
    }
    assert!(refused(|a| a.disks[0].place = device(99)).contains("/dev/loop7 has 99"));
    allowed(|a| a.disks[0].place = device(101));
    let room = |free| vec![Room { folder: "/images".into(), free, wanted: 10 }];
    assert!(refused(|a| a.room = room(9)).contains("/images: 9 bytes are free, up to 10"));
    allowed(|a| a.room = room(10));
}

#[test]
fn only_a_whole_backup_is_restored() {
    use BackupState as S;
    for state in
        [S::Allocated, S::Queued, S::BackingUp, S::Restoring, S::Removed, S::Expunged, S::Failed, S::Error]
    {
        assert!(refused(|a| a.backup.state = state).contains(&format!("is {state}, not BackedUp")));
    }
    for state in [CompressionState::Compressing, CompressionState::FinalizingCompression] {
        assert!(refused(|a| a.backup.compression = state).contains("being compressed"));
    }
    assert!(refused(|a| a.backup.validation = ValidationState::NotValid).contains("NotValid"));
    allowed(|a| a.backup.validation = ValidationState::UnableToValidate);
    assert!(refused(|a| a.backup.damage = Some("x.qcow2 is missing".into())).contains("x.qcow2 is missing"));
    assert!(refused(|a| a.disks.clear()).contains("no disk"));
}
