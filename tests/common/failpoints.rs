//! The failpoints that operations pass, as the tests that kill them there have seen them.
//!
//! `tests/failpoints.rs` compares all of these with the source: a new failpoint must be in the list of a test that kills there.

/// The failpoints that one operation passes.
#[derive(Debug, Clone, Copy)]
pub struct List {
    pub called: &'static str,
    groups: &'static [&'static [&'static str]],
}

impl List {
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.groups.iter().copied().flatten().copied()
    }
}

/// Each record of the store that is written.
const WRITES: &[&str] = &["remove.begin", "write.begin", "write.done", "write.rename"];
/// Files of the store, and new images, that get their names.
const RENAMES: &[&str] = &["rename.begin", "rename.done"];
/// Every backup.
const BACKUP: &[&str] = &[
    "backup-copied",
    "backup-planned",
    "backup-publish",
    "backup-published",
    "backup-record",
    "backup-recorded",
    "backup-snapshot",
    "backup-snapshotted",
];
/// Every restore that writes new images.
const RESTORE: &[&str] =
    &["restore-planned", "restore-recorded", "restore-swap", "restore-swapped", "restore-written"];
/// A domain that is started on the mount and pulls its data.
const PULL: &[&str] = &["pull-flushing", "pull-started", "restore-started"];

macro_rules! lists {
    ($($list:ident = $($group:ident +)* [$($name:literal),* $(,)?];)*) => {
        $(pub const $list: List = List { called: stringify!($list), groups: &[$($group,)* &[$($name),*]] };)*

        /// All lists.
        pub const ALL: &[List] = &[$($list),*];
    };
}

lists! {
    BACKUP_OVERLAY = WRITES + RENAMES + BACKUP + [
        "backup-merge",
        "backup-merged",
        "backup-unlink",
        "overlay-linked",
        "overlay-made",
        "overlay-merged",
        "overlay-rebased",
        "overlay-swapped",
    ];

    BACKUP_SCAN = WRITES + RENAMES + BACKUP + [];

    COMPRESS = WRITES + RENAMES + [
        "compress.begun",
        "compress.recorded",
        "compress.swap",
        "compress.swapped",
    ];

    DOMAIN_BACKUP_OFF = WRITES + RENAMES + BACKUP + [
        "backup-merge",
        "backup-merged",
        "backup-unlink",
        "offline-defined",
        "offline-merged",
        "offline-overlay",
        "offline-rebased",
    ];

    DOMAIN_BACKUP_RUNNING = WRITES + RENAMES + BACKUP + [
        "backup-merge",
        "backup-merged",
        "backup-unlink",
        "commit-ready",
        "commit-started",
        "snapshot-frozen",
        "snapshot-taken",
    ];

    DOMAIN_BACKUP_UNDONE = [
        "backup-undone-disk",
        "backup-unlink",
        "commit-ready",
        "commit-started",
        "remove.begin",
    ];

    DOMAIN_DETACHED = WRITES + RENAMES + BACKUP + [
        "backup-merge",
        "backup-merged",
        "backup-unlink",
        "detached-merged",
        "detached-unlinked",
        "offline-defined",
        "offline-merged",
        "offline-overlay",
        "offline-rebased",
    ];

    DOMAIN_NEW_VM = WRITES + RENAMES + RESTORE + [
        "create-dir.begin",
        "restore-defined",
        "restore-done",
    ];

    DOMAIN_NEW_VM_QUICK = WRITES + RENAMES + RESTORE + PULL + [
        "create-dir.begin",
        "restore-defined",
        "restore-done",
        "restore-pulled",
    ];

    DOMAIN_NEW_VOLUME = WRITES + RENAMES + RESTORE + [
        "restore-attached",
        "restore-done",
    ];

    DOMAIN_NEW_VOLUME_QUICK = WRITES + RENAMES + RESTORE + PULL + [
        "restore-attached",
        "restore-done",
        "restore-pulled",
    ];

    DOMAIN_PULL_OFF = WRITES + [
        "disks-placed",
        "restore-copied-offline",
        "restore-done",
        "restore-flat",
        "restore-pulled",
    ];

    DOMAIN_REMOVE = WRITES + RENAMES + [
        "backup-unlink",
        "commit-ready",
        "commit-started",
        "delta-merge",
        "delta-merged",
        "remove-decided",
        "remove-deleted",
        "remove-planned",
        "remove-recorded",
        "remove-taken",
    ];

    DOMAIN_REOPEN = WRITES + PULL + [
        "reopen-saved",
        "restore-done",
        "restore-pulled",
    ];

    DOMAIN_RESTORE = WRITES + RENAMES + RESTORE + [
        "backup-unlink",
        "disks-placed",
        "restore-done",
        "restore-dropped",
        "restore-linked",
        "restore-named",
        "restore-placed",
    ];

    DOMAIN_RESTORE_DEVICE = WRITES + RESTORE + [
        "backup-unlink",
        "disks-placed",
        "restore-device",
        "restore-done",
        "restore-dropped",
    ];

    DOMAIN_RESTORE_HOST = WRITES + RENAMES + RESTORE + PULL + [
        "backup-unlink",
        "disks-placed",
        "restore-copied",
        "restore-done",
        "restore-dropped",
        "restore-linked",
        "restore-moved",
        "restore-named",
        "restore-placed",
        "restore-pulled",
    ];

    DOMAIN_RESTORE_QUICK = WRITES + RENAMES + RESTORE + PULL + [
        "backup-unlink",
        "disks-placed",
        "restore-done",
        "restore-dropped",
        "restore-linked",
        "restore-named",
        "restore-placed",
        "restore-pulled",
    ];

    DOMAIN_UNASSIGN = WRITES + [
        "backup-unlink",
        "commit-ready",
        "commit-started",
        "delta-merge",
        "delta-merged",
        "release-planned",
        "release-recorded",
    ];

    DOMAIN_VM_REMOVE = WRITES + [
        "backup-unlink",
        "commit-ready",
        "commit-started",
        "delta-merge",
        "delta-merged",
        "remove-vm-finished",
        "remove-vm-planned",
        "remove-vm-recorded",
    ];

    NEW_VM = WRITES + RENAMES + RESTORE + [
        "create-dir.begin",
        "restore-done",
    ];

    NEW_VOLUME = WRITES + RENAMES + RESTORE + [
        "restore-done",
    ];

    PRUNE = WRITES + RENAMES + [
        "absorb-deleted",
        "absorb-planned",
        "absorb-recorded",
        "absorb-renumbered",
        "absorb-swap",
        "absorb-swapped",
        "remove-decided",
        "remove-hidden",
        "remove-planned",
        "remove-taken",
    ];

    REMOVE_BATCH = WRITES + RENAMES + [
        "remove-decided",
        "remove-deleted",
        "remove-hidden",
        "remove-planned",
        "remove-recorded",
        "remove-taken",
    ];

    REMOVE_OVERLAY = WRITES + RENAMES + [
        "delta-merge",
        "delta-merged",
        "overlay-merged",
        "overlay-rebased",
        "remove-decided",
        "remove-deleted",
        "remove-planned",
        "remove-recorded",
        "remove-taken",
    ];

    RESTORE_OVERLAY = WRITES + RENAMES + RESTORE + [
        "backup-unlink",
        "restore-done",
        "restore-dropped",
    ];

    RESTORE_SCAN = WRITES + RENAMES + RESTORE + [
        "restore-done",
    ];

    RESTORE_UNDONE = WRITES + [
        "restore-undone-disk",
    ];

    SNAPSHOT_CREATE_FILES = WRITES + [
        "overlay-linked",
        "overlay-made",
        "overlay-swapped",
        "snapshot-live",
        "snapshot-planned",
        "snapshot-recorded",
    ];

    SNAPSHOT_CREATE_OFF = WRITES + [
        "offline-defined",
        "offline-overlay",
        "snapshot-live",
        "snapshot-planned",
        "snapshot-recorded",
    ];

    SNAPSHOT_CREATE_RUNNING = WRITES + [
        "snapshot-frozen",
        "snapshot-live",
        "snapshot-planned",
        "snapshot-recorded",
        "snapshot-taken",
    ];

    SNAPSHOT_REMOVE_FILES = WRITES + [
        "overlay-merged",
        "overlay-rebased",
        "snapshot-merge",
        "snapshot-merge-data",
        "snapshot-merge-recorded",
        "snapshot-merge-unlinked",
        "snapshot-merged",
        "snapshot-planned",
        "snapshot-recorded",
        "snapshot-tidied",
    ];

    SNAPSHOT_REMOVE_BRANCH = WRITES + [
        "backup-unlink",
        "snapshot-merge",
        "snapshot-merge-data",
        "snapshot-merge-recorded",
        "snapshot-merge-unlinked",
        "snapshot-merged",
        "snapshot-planned",
        "snapshot-rebased",
        "snapshot-recorded",
        "snapshot-tidied",
    ];

    SNAPSHOT_REMOVE_OFF = WRITES + [
        "backup-unlink",
        "offline-merged",
        "snapshot-deleted",
        "snapshot-merge",
        "snapshot-merge-data",
        "snapshot-merge-recorded",
        "snapshot-merge-unlinked",
        "snapshot-merged",
        "snapshot-planned",
        "snapshot-recorded",
        "snapshot-tidied",
    ];

    SNAPSHOT_REMOVE_RUNNING = WRITES + [
        "backup-unlink",
        "commit-ready",
        "commit-started",
        "snapshot-merge",
        "snapshot-merge-data",
        "snapshot-merge-recorded",
        "snapshot-merge-unlinked",
        "snapshot-merged",
        "snapshot-planned",
        "snapshot-recorded",
        "snapshot-tidied",
    ];

    SNAPSHOT_REVERT = WRITES + [
        "backup-unlink",
        "disks-placed",
        "snapshot-deleted",
        "snapshot-merge-data",
        "snapshot-overlay",
        "snapshot-placed",
        "snapshot-planned",
        "snapshot-recorded",
        "snapshot-tidied",
    ];

    SNAPSHOT_REVERT_FILES = WRITES + [
        "overlay-swapped",
        "snapshot-overlay",
        "snapshot-placed",
        "snapshot-planned",
        "snapshot-recorded",
        "snapshot-tidied",
    ];

    VM_REMOVE = WRITES + [
        "delta-merge",
        "delta-merged",
        "overlay-merged",
        "overlay-rebased",
        "remove-vm-finished",
        "remove-vm-planned",
        "remove-vm-recorded",
    ];

    VM_REMOVE_BARE = WRITES + RENAMES + [
        "remove-vm-finished",
        "remove-vm-planned",
        "remove-vm-recorded",
    ];
}
