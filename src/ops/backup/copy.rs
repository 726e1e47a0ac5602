//! Copying one frozen volume into the staging folder.

use std::num::NonZero;

use knib_qcow::{Chain, ChainSource, Control, FileStorage, Format, NewImage, PlainPaths, write_image};

use super::before::{Taken, sums_chain};
use super::{BackupError, Run};
use crate::chain::{Method, VolumePlan};
use crate::hypervisor::ImageRef;
use crate::ops::codec::codec;
use crate::ops::control::Event;
use crate::store::manifest::{Compression, Disk, ImageFormat, Kind, Manifest};
use crate::store::sums::{SumsChain, SumsWriter};
use crate::store::{BackupName, Staging, StoreError, disk_file};

/// Clusters of 64 KiB: QEMU's default.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// What all disks of a backup have in common.
pub(super) struct Copy<'a> {
    pub run: &'a Run<'a>,
    pub history: &'a [Manifest],
    pub method: Method,
    /// The parent's name, where there is one.
    pub parent: Option<&'a BackupName>,
    /// Compress while copying.
    pub compression: Option<Compression>,
    pub staging: &'a Staging,
}

impl Copy<'_> {
    /// Copies the image `frozen` with all below it, or what changed of it.
    pub fn disk(&self, taken: &Taken, plan: &VolumePlan, frozen: &ImageRef) -> Result<Disk, BackupError> {
        let name = &taken.volume.name;
        let failed = |source| match source {
            knib_qcow::Error::Cancelled => BackupError::Cancelled,
            source => BackupError::Copy { disk: name.clone(), source },
        };
        let format = match frozen.format {
            ImageFormat::Raw => Format::Raw,
            ImageFormat::Qcow2 => Format::Qcow2,
        };
        let chain = Chain::open(&frozen.path, format, &PlainPaths).map_err(failed)?;
        let incremental = plan.kind == Kind::Incremental;
        let backing = self
            .parent
            .filter(|_| incremental)
            .map(|parent| (format!("../{parent}/{}", disk_file(name)), Format::Qcow2));
        let new = NewImage {
            size: chain.size(),
            cluster_bits: CLUSTER_BITS,
            compression: self.compression.map(codec),
            backing,
        };
        let what = format!("copying {name}");
        let control = &self.run.control;
        let total = if incremental { 0 } else { chain.size() };
        (control.progress)(Event::Begin { what: what.clone(), total });
        let progress = |done| (control.progress)(Event::Advance { what: what.clone(), done });
        let engine = Control {
            // One more than there are cores: one of them waits for the disk now and then.
            threads: std::thread::available_parallelism().map_or(2, NonZero::get).min(15) + 1,
            rate_limit: None,
            cancel: control.cancel,
            progress: &progress,
        };
        let mut sums = SumsWriter::create(&self.staging.sums_path(name), CLUSTER_BITS, chain.size())?;
        let storage = FileStorage::create_new(&self.staging.disk_path(name)).map_err(failed)?;
        let written = if !incremental {
            write_image(storage, &new, &ChainSource::whole(&chain, CLUSTER), &sums, &engine)
        } else if self.method == Method::Delta {
            write_image(storage, &new, &ChainSource::top(&chain, plan.layers, CLUSTER), &sums, &engine)
        } else {
            let layers = sums_chain(self.run.store, &self.run.record, taken.volume.id, self.history)
                .map_err(|why| StoreError::Invalid(format!("the parent of {name} changed: {why:?}")))?;
            let parent = SumsChain::new(layers)?;
            sums = sums.leave_out_what_is_in(parent.clone());
            let source = super::scan::ScanSource::new(&chain, parent, CLUSTER);
            write_image(storage, &new, &source, &sums, &engine)
        }
        .map_err(failed)?;
        let summary = sums.finish(written.file_len)?;
        (control.progress)(Event::End { what: what.clone() });
        Ok(Disk {
            name: name.clone(),
            volume: taken.volume.id,
            target: taken.volume.target.clone(),
            kind: plan.kind,
            reason: plan.why.to_string(),
            depth: plan.depth,
            virtual_size: chain.size(),
            file_size: written.file_len,
            cluster_size: CLUSTER,
            data_clusters: written.clusters,
            compressed_clusters: written.compressed_clusters,
            zero_clusters: written.zero_clusters,
            compression: self.compression.filter(|_| written.compressed_clusters > 0),
            sums_size: summary.len,
            sums_digest: summary.digest,
            primary: super::before::primary(frozen)?,
        })
    }
}
