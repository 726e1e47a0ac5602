//! A store with chains of real qcow2 files, built cluster by cluster, so that every byte and its place is known.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use jiff::Timestamp;
use knibfs::store::manifest::{
    BackupState, Compression, CompressionState, Disk, ImageFormat, Kind, Parent, PrimaryImage,
    ValidationState,
};
use knibfs::store::sums::{Place, SumsWriter};
use knibfs::store::vm::{Source, Track, Volume};
use knibfs::store::{BackupId, BackupName, Manifest, Store, VmId, VmName, VmRecord, VolumeId};

pub const BITS: u32 = 16;
pub const CLUSTER: u64 = 1 << BITS;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Plain,
    Compressed,
    Zero,
}

pub type Layer = BTreeMap<u64, Shape>;

pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub store: Store,
    pub vm: VmRecord,
    pub backups: Vec<Manifest>,
    pub layers: Vec<Layer>,
    pub size: u64,
    pub zstd: bool,
}

/// Bytes of a cluster: half text, half noise, and never the same in two layers.
pub fn content(layer: usize, cluster: u64) -> Vec<u8> {
    let seed =
        (layer as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ cluster.wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mut state = seed | 1;
    let mut out: Vec<u8> = Vec::with_capacity(CLUSTER as usize);
    let line = format!("layer {layer} cluster {cluster} of the test's disk\n");
    while out.len() < CLUSTER as usize / 2 {
        out.extend_from_slice(line.as_bytes());
    }
    out.resize_with(CLUSTER as usize, || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    out
}

/// A VM of one plain disk file.
pub fn vm_record(name: &str) -> VmRecord {
    VmRecord {
        volumes: vec![Volume {
            id: VolumeId::random(),
            name: "root".parse().unwrap(),
            path: "/images/root.raw".into(),
            format: ImageFormat::Raw,
            target: None,
            serial: None,
            block_device: false,
            detached: false,
        }],
        ..VmRecord::new(VmId::random(), VmName::new(name).unwrap(), Source::Disks { track: Track::Scan })
    }
}

impl Fixture {
    pub fn new(size: u64, zstd: bool) -> Self {
        let dir = tempfile::Builder::new().prefix("knibfs-mount").tempdir().unwrap();
        let store = Store::init(&dir.path().join("store"), false).unwrap();
        let vm = vm_record("web1");
        store.create_vm(&vm).unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        Self { dir, store, vm, backups: vec![], layers: vec![], size, zstd }
    }

    /// A full backup and incrementals on it.
    pub fn chain(size: u64, zstd: bool, layers: &[Layer]) -> Self {
        let mut fixture = Self::new(size, zstd);
        for layer in layers {
            fixture.add(layer.clone());
        }
        fixture
    }

    /// Another backup on the last one.
    pub fn add(&mut self, layer: Layer) -> BackupName {
        let parent = self.backups.last().cloned();
        self.add_on(layer, parent.as_ref())
    }

    /// Another backup; a full one where there is no parent.
    pub fn add_on(&mut self, layer: Layer, parent: Option<&Manifest>) -> BackupName {
        let number = self.backups.len();
        let manifest = take(&self.store, &self.vm, number, parent, &layer, self.size, self.zstd);
        let name = manifest.name.clone();
        self.backups.push(manifest);
        self.layers.push(layer);
        name
    }

    /// What the guest sees of a range in backup `of`.
    pub fn expected(&self, of: usize, offset: u64, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len);
        let end = (offset + len as u64).min(self.size);
        let mut at = offset;
        while at < end {
            let cluster = at / CLUSTER;
            let stop = ((cluster + 1) * CLUSTER).min(end);
            let held = (0..=of).rev().find_map(|l| self.layers[l].get(&cluster).map(|s| (l, *s)));
            let bytes = match held {
                None | Some((_, Shape::Zero)) => vec![0; CLUSTER as usize],
                Some((layer, _)) => content(layer, cluster),
            };
            out.extend_from_slice(&bytes[(at % CLUSTER) as usize..(at % CLUSTER + stop - at) as usize]);
            at = stop;
        }
        out
    }

    /// What `.knibfs/status` counted.
    pub fn counted(&self, name: &str) -> u64 {
        let status = fs::read_to_string(self.mnt().join(".knibfs/status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(&format!("knibfs_mount_{name} ")));
        line.unwrap_or_else(|| panic!("no {name}: {status}")).parse().unwrap()
    }

    pub fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    pub fn stored(&self, of: usize) -> PathBuf {
        let disk = &self.backups[of].disks[0].name;
        self.store.disk_path(&self.vm.name, &self.backups[of].name, disk)
    }

    pub fn in_mount(&self, of: usize, file: &str) -> PathBuf {
        self.mnt().join("vms/web1").join(self.backups[of].name.as_str()).join(file)
    }

    pub fn knibfs(&self, arguments: &[&str]) -> Output {
        command(self.store.root(), &self.dir.path().join("log")).args(arguments).output().unwrap()
    }

    /// Mounts with the real program, in the background.
    pub fn mount(&self, options: &[&str]) -> Mount<'_> {
        let log = self.dir.path().join("log");
        let mut arguments = vec!["mount", "--log-dir", log.to_str().unwrap()];
        arguments.extend(options);
        let mnt = self.mnt();
        arguments.push(mnt.to_str().unwrap());
        let output = self.knibfs(&arguments);
        assert!(output.status.success(), "mount failed: {}", String::from_utf8_lossy(&output.stderr));
        Mount(self)
    }

    pub fn unmount(&self) {
        let mnt = self.mnt().canonicalize().unwrap_or_else(|_| self.mnt());
        if knib_fuse::mount_at(&mnt).unwrap().is_some() {
            knib_fuse::unmount(&mnt).unwrap();
        }
    }

    pub fn log(&self) -> String {
        let path = self.dir.path().join("log").join(format!("mount-{}.log", self.store.id()));
        fs::read_to_string(path).unwrap()
    }
}

/// Backup number `number` of a VM's only disk, whose cluster `n` holds `content(number, n)` where it is of data.
pub fn take(
    store: &Store,
    vm: &VmRecord,
    number: usize,
    parent: Option<&Manifest>,
    layer: &Layer,
    size: u64,
    zstd: bool,
) -> Manifest {
    let volume = &vm.volumes[0];
    let taken: Timestamp = "2026-11-23T22:32:42Z".parse::<Timestamp>().unwrap()
        + jiff::SignedDuration::from_secs(number as i64 * 60);
    let id = BackupId::random();
    let staging = store.stage(&vm.name, id).unwrap();
    let writer = SumsWriter::create(&staging.sums_path(&volume.name), BITS, size).unwrap();
    let backing = parent.map(|p| format!("../{}/root.qcow2", p.name));
    let image = build_image(number, layer, size, zstd, backing.as_deref(), &writer);
    let summary = writer.finish(image.len() as u64).unwrap();
    write_sparse(&staging.disk_path(&volume.name), &image);
    staging.write("domain.xml", b"<domain><secret/></domain>", 0o600).unwrap();
    let count = |shape: Shape| layer.values().filter(|s| **s == shape).count() as u64;
    let mut manifest = Manifest {
        id,
        name: BackupName::at(taken, 1),
        vm: vm.name.clone(),
        vm_id: vm.id,
        sequence: number as u64 + 1,
        parent: parent.map(|p| Parent { id: p.id, name: p.name.clone() }),
        position: parent.map_or(0, |p| p.position) + 1,
        isolated: false,
        end_of_chain: false,
        state: BackupState::BackedUp,
        compression: CompressionState::Uncompressed,
        validation: ValidationState::NotValidated,
        started: taken,
        taken,
        finished: taken,
        quiesced: false,
        source: vm.source.clone(),
        disks: vec![Disk {
            name: volume.name.clone(),
            volume: volume.id,
            target: None,
            kind: if parent.is_some() { Kind::Incremental } else { Kind::Full },
            reason: "of the test".into(),
            depth: parent.map_or(0, |p| p.disks[0].depth) + 1,
            virtual_size: size,
            file_size: image.len() as u64,
            cluster_size: CLUSTER,
            data_clusters: count(Shape::Plain) + count(Shape::Compressed),
            compressed_clusters: count(Shape::Compressed),
            zero_clusters: count(Shape::Zero),
            compression: Some(if zstd { Compression::Zstd } else { Compression::Zlib }),
            sums_size: summary.len,
            sums_digest: summary.digest,
            primary: PrimaryImage {
                path: volume.path.clone(),
                format: volume.format,
                device: 1,
                inode: 2,
                virtual_size: size,
                modified: None,
                owner: None,
            },
        }],
        skipped: vec![],
        notes: vec![],
        knibfs_version: "0".into(),
    };
    staging.publish(store, &mut manifest).unwrap();
    manifest
}

fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = fs::File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (n, page) in bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        file.write_all_at(page, n as u64 * 4096).unwrap();
    }
}

pub fn command(store: &Path, state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_knibfs"));
    command.env("KNIBFS_STORE", store).env("KNIBFS_STATE_DIR", state).env("NO_COLOR", "1");
    command
}

/// A mount that is taken away when it goes out of scope.
pub struct Mount<'a>(pub &'a Fixture);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        self.0.unmount();
    }
}

impl Drop for Fixture {
    /// A test that fails leaves no mount either.
    fn drop(&mut self) {
        self.unmount();
    }
}

fn encode(zstd: bool, guest: &[u8]) -> Vec<u8> {
    if zstd {
        return zstd::bulk::compress(guest, 1).unwrap();
    }
    use std::io::Write as _;
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(guest).unwrap();
    encoder.finish().unwrap()
}

/// A qcow2 file as QEMU's docs/interop/qcow2.txt has it: header, clusters in guest order, L2, L1, refcounts.
fn build_image(
    number: usize,
    layer: &Layer,
    size: u64,
    zstd: bool,
    backing: Option<&str>,
    writer: &SumsWriter,
) -> Vec<u8> {
    let cluster = CLUSTER as usize;
    let mut image = vec![0; cluster];
    let mut entries: BTreeMap<u64, u64> = BTreeMap::new();
    let mut spans = vec![(0u64, CLUSTER)];
    for (&at, shape) in layer {
        let mut guest = if *shape == Shape::Zero { vec![0; cluster] } else { content(number, at) };
        // Past the end of the disk a cluster is zeros.
        guest.truncate(size.saturating_sub(at * CLUSTER).min(CLUSTER) as usize);
        guest.resize(cluster, 0);
        let (place, stored, entry) = match shape {
            Shape::Zero => (Place::Zero, vec![], 1),
            Shape::Plain => {
                image.resize(image.len().next_multiple_of(cluster), 0);
                let offset = image.len() as u64;
                spans.push((offset, CLUSTER));
                (Place::Data { offset, len: CLUSTER }, guest.clone(), offset | 1 << 63)
            }
            Shape::Compressed => {
                let stored = encode(zstd, &guest);
                let (offset, len) = (image.len() as u64, stored.len() as u64);
                let sectors = ((offset + len - 1) >> 9) - (offset >> 9);
                let from = offset & !511;
                spans.push((from, (sectors + 1) * 512));
                let entry = 1 << 62 | sectors << (62 - (BITS - 8)) | offset;
                (Place::Compressed { offset, len }, stored, entry)
            }
        };
        writer.record_cluster(at, place, &writer.digest_cluster(&guest, &stored)).unwrap();
        image.extend_from_slice(&stored);
        entries.insert(at, entry);
    }
    let per_table = CLUSTER / 8;
    let mut put = |image: &mut Vec<u8>, words: &[u64]| {
        image.resize(image.len().next_multiple_of(cluster), 0);
        let offset = image.len() as u64;
        words.iter().for_each(|w| image.extend_from_slice(&w.to_be_bytes()));
        image.resize(image.len().next_multiple_of(cluster), 0);
        let bytes = &image[offset as usize..];
        writer.record_metadata(offset, bytes).unwrap();
        spans.push((offset, bytes.len() as u64));
        offset
    };
    let l1_len = size.div_ceil(CLUSTER).div_ceil(per_table);
    let mut l1 = vec![0; l1_len as usize];
    for (index, slot) in l1.iter_mut().enumerate() {
        let first = index as u64 * per_table;
        let mut table = vec![0; per_table as usize];
        let mut used = false;
        for (&at, &entry) in entries.range(first..first + per_table) {
            table[(at - first) as usize] = entry;
            used = true;
        }
        if used {
            *slot = put(&mut image, &table) | 1 << 63;
        }
    }
    let l1_offset = put(&mut image, &l1);
    // 16-bit counts: one block counts 2 GiB of the file.
    let table_offset = image.len() as u64;
    let block_offset = table_offset + CLUSTER;
    spans.push((table_offset, 2 * CLUSTER));
    let mut counts = vec![0u16; cluster / 2];
    for (offset, len) in spans {
        for cluster in offset / CLUSTER..(offset + len).div_ceil(CLUSTER) {
            counts[cluster as usize] += 1;
        }
    }
    let mut tail = block_offset.to_be_bytes().to_vec();
    tail.resize(cluster, 0);
    counts.iter().for_each(|c| tail.extend_from_slice(&c.to_be_bytes()));
    writer.record_metadata(table_offset, &tail).unwrap();
    image.extend_from_slice(&tail);
    let header = header(size, zstd, backing, l1_len, l1_offset, table_offset);
    image[..header.len()].copy_from_slice(&header);
    writer.record_metadata(0, &header).unwrap();
    image
}

fn header(size: u64, zstd: bool, backing: Option<&str>, l1_len: u64, l1: u64, refcounts: u64) -> Vec<u8> {
    let mut h = Vec::new();
    let mut extensions = Vec::new();
    if backing.is_some() {
        extensions.extend_from_slice(&0xe279_2acau32.to_be_bytes());
        extensions.extend_from_slice(&5u32.to_be_bytes());
        extensions.extend_from_slice(b"qcow2\0\0\0");
    }
    extensions.extend_from_slice(&[0; 8]);
    let name_at = 112 + extensions.len() as u64;
    h.extend_from_slice(b"QFI\xfb\0\0\0\x03");
    h.extend_from_slice(&(if backing.is_some() { name_at } else { 0 }).to_be_bytes());
    h.extend_from_slice(&(backing.map_or(0, str::len) as u32).to_be_bytes());
    h.extend_from_slice(&BITS.to_be_bytes());
    h.extend_from_slice(&size.to_be_bytes());
    h.extend_from_slice(&0u32.to_be_bytes());
    h.extend_from_slice(&(l1_len as u32).to_be_bytes());
    h.extend_from_slice(&l1.to_be_bytes());
    h.extend_from_slice(&refcounts.to_be_bytes());
    h.extend_from_slice(&1u32.to_be_bytes());
    h.extend_from_slice(&[0; 12]);
    h.extend_from_slice(&(if zstd { 8u64 } else { 0 }).to_be_bytes());
    h.extend_from_slice(&[0; 16]);
    h.extend_from_slice(&4u32.to_be_bytes());
    h.extend_from_slice(&112u32.to_be_bytes());
    h.push(u8::from(zstd));
    h.extend_from_slice(&[0; 7]);
    h.extend_from_slice(&extensions);
    h.extend_from_slice(backing.unwrap_or_default().as_bytes());
    h
}
