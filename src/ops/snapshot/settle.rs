//! Recording how a VM's images lie now.

use std::collections::BTreeSet;

use super::SnapshotError;
use super::tree;
use crate::hypervisor::Guest;
use crate::ops::hypervisor::target;
use crate::store::manifest::PrimaryImage;
use crate::store::{Store, VmRecord, VolumeId};

/// Records in `vm.json` which images are live, how the `intact` volumes are left (their next backup stays incremental:
/// it was knibfs that changed their chains), and which layers there are.
pub(super) fn save(
    store: &Store,
    record: &mut VmRecord,
    guest: &Guest,
    intact: &BTreeSet<VolumeId>,
) -> Result<(), SnapshotError> {
    for volume in &mut record.volumes {
        let Some(found) = guest.volumes.iter().find(|v| v.target == target(volume)) else { continue };
        if let Some(live) = found.chain.first() {
            volume.path.clone_from(&live.path);
            volume.format = live.format;
            volume.block_device = found.block_device;
        }
        let now = tree::chain(found)?;
        for layer in record.layers.iter_mut().filter(|l| l.volume == volume.id) {
            let renamed = now.iter().find(|i| (i.device, i.inode) == (layer.image.device, layer.image.inode));
            if let Some(image) = renamed {
                layer.image.clone_from(image);
            }
        }
        let left = record.tracking.volumes.get_mut(&volume.id).filter(|_| intact.contains(&volume.id));
        if let Some(left) = left {
            let owned = |image: PrimaryImage| {
                let was = left.images.iter().find(|i| (i.device, i.inode) == (image.device, image.inode));
                PrimaryImage { owner: was.and_then(|i| i.owner), ..image }
            };
            left.images = now.into_iter().map(owned).collect();
        }
    }
    // One that is not there may be away for now; whoever deletes one takes it out himself.
    record.layers.retain(|l| tree::is_there(&l.image) || l.image.path.symlink_metadata().is_err());
    Ok(store.save_vm(record)?)
}
