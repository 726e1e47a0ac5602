//! `img convert`: copies images into a new one, or into one that is there.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use knib_qcow::{
    Before, Chain, ChainSource, Compression, CompressionType, Control, FileStorage, Format, LockedPaths,
    NewImage, NoObserver, Preallocation, Sink, Source, Storage, bitmap, write_image, write_raw,
};

use super::create::format_named;
use super::options::{Given, flag, long_flag, value};
use super::progress::Progress;
use super::{Command, Done, check_cache, rate, say, threads, warn};
use crate::img::create::{Plan, Wanted, target};
use crate::img::flat::Flat;
use crate::img::open::{Following, Mode, Opened, identity, open};
use crate::img::unsynced::Unsynced;
use crate::img::{Failure, name, size, snapshots};

/// Zeros in a row that are left out unless `-S` says otherwise, in bytes.
const SPARSE: u64 = 4096;
/// Most that `-S` may say, in bytes.
const SPARSE_MAX: u64 = 16 << 20;
/// Level of compressed zstd clusters, QEMU's.
const ZSTD_LEVEL: u32 = 3;
/// Level of compressed deflate clusters: with QEMU's number 6, this library leaves them almost 2 % larger.
const DEFLATE_LEVEL: u32 = 7;

pub const COMMAND: Command = Command {
    name: "convert",
    about: "Copy an image, or several in a row, into another",
    usage: "[OPTIONS] FILENAME [FILENAME2 …] OUTPUT_FILENAME",
    options: &[
        value('f', "source-format", "FMT", "format of the sources: raw or qcow2"),
        value('O', "target-format", "FMT", "format of the output: raw (default) or qcow2"),
        value('o', "target-options", "OPTIONS", "options of the output, as for create (-o help lists them)"),
        value(
            'B',
            "backing",
            "FILENAME",
            "let the output stand on this image, and hold only what differs from it",
        ),
        value('F', "backing-format", "FMT", "format of that image"),
        flag('c', "compress", "compress clusters (qcow2)"),
        flag('n', "no-create", "write into an image that is there"),
        long_flag("target-is-zero", "that image reads as zeros (with -n)"),
        value(
            'l',
            "source-snapshot",
            "SNAPSHOT",
            "copy this internal snapshot: ID, NAME, or snapshot.id=…,snapshot.name=…",
        ),
        value('S', "sparse-size", "SIZE", "leave out so many zeros in a row (4k); 0 writes all of them"),
        value('m', "parallel", "NUM", "at most so many worker threads, 1 to 16 (8)"),
        flag('W', "oob-writes", "accepted; writes are ordered at no cost"),
        flag('C', "copy-range-offloading", "accepted; the kernel may share or copy by itself"),
        value('r', "rate", "RATE", "at most so many bytes a second"),
        long_flag("salvage", "what cannot be read becomes zeros, and is told"),
        long_flag("bitmaps", "copy persistent bitmaps too"),
        long_flag("skip-broken-bitmaps", "leave out those that cannot be trusted"),
        value(
            't',
            "target-cache",
            "CACHE",
            "unsafe: the output is not synced; else it is durable at the end",
        ),
        value('T', "source-cache", "CACHE", "accepted; reads go through the page cache"),
        flag('p', "progress", "show progress"),
        flag('q', "quiet", "print errors only"),
        flag('U', "force-share", "read though another process may write"),
    ],
    run,
};

fn run(given: &Given) -> Done {
    let lists = given.texts("target-options")?;
    let of = given.text("target-format")?.unwrap_or("raw");
    if Wanted::asks_for_help(&lists) {
        say(&Wanted::help(format_named(of, "")?, given.words.len() > 1))?;
        return Ok(0);
    }
    let wishes = Wishes::of(given)?;
    let [sources @ .., output] = given.words.as_slice() else {
        return Err(Failure::new("Must specify image file name"));
    };
    if sources.is_empty() {
        return Err(Failure::new("Must specify image file name"));
    }
    let progress = Progress::of(given, 1.0);
    progress.begin();
    check_cache(given, "target-cache")?;
    check_cache(given, "source-cache")
        .map_err(|f| Failure::new(f.text.replace("Invalid cache", "Invalid source cache")))?;
    if sources.len() > 1 && given.has("source-snapshot") {
        return Err(Failure::new("No support for concatenating multiple snapshot"));
    }
    let format = format_named(of, "")?;
    let opened = sources
        .iter()
        .map(|n| open(n, given.text("source-format")?, Mode::reading(given.has("force-share"))))
        .collect::<Result<Vec<_>, _>>()?;
    let chains = opened.iter().map(|o| chain(o, given)).collect::<Result<Vec<_>, _>>()?;
    let total = chains.iter().map(|c| c.size().next_multiple_of(512)).sum();
    let mut wanted = Wanted::parse(format, &lists)?;
    for (option, key) in [("backing", "backing_file"), ("backing-format", "backing_fmt")] {
        if let Some(value) = given.text(option)? {
            if format == Format::Raw {
                return Err(Failure::new("Backing file not supported for file format 'raw'"));
            }
            wanted.set(key, value)?;
        }
    }
    let backing = wanted.get("backing_file").map(str::to_owned);
    if backing.is_some() && sources.len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ));
    }
    if backing.is_some() && wanted.get("backing_fmt").is_none() {
        return Err(Failure::new("Use of backing file requires explicit backing format"));
    }
    if wishes.compress && format == Format::Raw {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if wishes.compress && wanted.get("preallocation").is_some_and(|p| p != "off") {
        return Err(Failure::new("Compression and preallocation not supported at the same time"));
    }
    check_bitmaps(given, format, &opened)?;
    wanted.set("size", &u64::to_string(&total))?;
    let path = name::file(output)?;
    let work = Work { given, wishes: &wishes, chains: &chains, total, format, output, path: &path };
    let layers = match &backing {
        Some(backing) => Some(layers_above(chains.first(), &path, backing, wanted.get("backing_fmt"))?),
        None => None,
    };
    let target = if given.has("no-create") {
        work.write_existing(layers, &progress)?
    } else {
        work.make_new(&wanted, layers, &progress)?
    };
    if let Some(source) = opened.first().filter(|_| given.has("bitmaps")) {
        work.copy_bitmaps(source, target)?;
    }
    progress.end();
    Ok(0)
}

/// Options that are checked before anything is opened.
struct Wishes {
    compress: bool,
    sparse: u64,
    threads: usize,
    rate: Option<u64>,
    /// The output is left to the page cache.
    unsynced: bool,
}

impl Wishes {
    fn of(given: &Given) -> Result<Self, Failure> {
        let sparse = match given.text("sparse-size")? {
            None => SPARSE,
            Some(text) => {
                let bytes = size::parse(text).map_err(|_| {
                    Failure::new(format!("Invalid buffer size for sparse output specified: '{text}'."))
                })?;
                if !bytes.is_multiple_of(512) || bytes > SPARSE_MAX {
                    return Err(Failure::new(format!(
                        "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {SPARSE_MAX}. Select 0 to disable sparse detection (fully allocates output)."
                    )));
                }
                bytes
            }
        };
        let asked = match given.text("parallel")? {
            None => None,
            Some(text) => Some(number(text).filter(|n| (1..=16).contains(n)).ok_or_else(|| {
                Failure::new("Invalid number of coroutines specified. Must be between 1 and 16.")
            })?),
        };
        let compress = given.has("compress");
        for (broken, why) in [
            (
                given.has("skip-broken-bitmaps") && !given.has("bitmaps"),
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            (given.has("copy-range-offloading") && compress, "Cannot enable copy offloading when -c is used"),
            (
                given.has("copy-range-offloading") && given.has("sparse-size"),
                "Cannot enable copy offloading when -S is used",
            ),
            (
                given.has("target-is-zero") && !given.has("no-create"),
                "--target-is-zero requires use of -n flag",
            ),
            (
                given.has("no-create") && given.has("target-options"),
                "-o has no effect when skipping image creation",
            ),
        ] {
            if broken {
                return Err(Failure::new(why));
            }
        }
        let unsynced = given.text("target-cache")? == Some("unsafe");
        Ok(Self { compress, sparse, threads: threads(asked), rate: rate(given)?, unsynced })
    }
}

fn chain(opened: &Opened, given: &Given) -> Result<Chain, Failure> {
    let gate = Following::new(given.has("force-share"));
    match given.text("source-snapshot")? {
        None => opened.chain(&gate),
        Some(wanted) => {
            let then =
                snapshots::find(opened, &snapshots::Wanted::parse(wanted))?.view(opened.storage.clone());
            Chain::from_storage(then, opened.format, &gate).map_err(|e| opened.wrong(&e))
        }
    }
}

/// Refuses bitmaps where they cannot be copied, before anything is made.
fn check_bitmaps(given: &Given, format: Format, sources: &[Opened]) -> Result<(), Failure> {
    if !given.has("bitmaps") {
        return Ok(());
    }
    let [source] = sources else {
        return Err(Failure::new("Copying bitmaps only possible with single source"));
    };
    if source.header()?.is_none_or(|h| h.version < 3) {
        return Err(Failure::new("Source lacks bitmap support"));
    }
    if format == Format::Raw {
        return Err(Failure::new("Format driver 'raw' does not support bitmaps"));
    }
    let all = bitmap::list(&*source.storage).map_err(|e| source.wrong(&e))?;
    match all.iter().find(|b| b.in_use && !given.has("skip-broken-bitmaps")) {
        None => Ok(()),
        Some(broken) => Err(Failure::new(format!(
            "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use 'knibfs img bitmap --remove' to delete it",
            broken.name
        ))),
    }
}

/// How many of the source's newest layers lie above the backing file: those are copied. One, where that file is not in
/// the source's chain: it is to have the content of the source's own backing file.
fn layers_above(
    source: Option<&Chain>,
    output: &Path,
    backing: &str,
    format: Option<&str>,
) -> Result<usize, Failure> {
    let full = name::combine(output, backing);
    drop(open(full.as_ref(), format, Mode::Read).map_err(|f| {
        Failure::new(format!(
            "Could not open '{}': Could not open backing file: {}",
            output.display(),
            f.text
        ))
    })?);
    let wanted = identity(Path::new(&full));
    let paths = source.map(Chain::paths).unwrap_or_default();
    Ok(paths.iter().position(|p| identity(p) == wanted).filter(|n| *n > 0).unwrap_or(1))
}

struct Work<'a> {
    given: &'a Given,
    wishes: &'a Wishes,
    chains: &'a [Chain],
    total: u64,
    format: Format,
    output: &'a OsString,
    path: &'a Path,
}

/// What a source is written with.
trait Write {
    fn write<S: Source>(self, source: &S, control: &Control<'_>) -> knib_qcow::Result<()>;
}

impl Work<'_> {
    fn compression(&self, kind: CompressionType) -> Option<Compression> {
        let level = if kind == CompressionType::Zstd { ZSTD_LEVEL } else { DEFLATE_LEVEL };
        self.wishes.compress.then_some(Compression { kind, level })
    }

    fn storage(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        if self.wishes.unsynced { Arc::new(Unsynced(file)) } else { file }
    }

    /// Runs `to` with the sources as one.
    fn with_source(
        &self,
        cluster: u64,
        layers: Option<usize>,
        progress: &Progress,
        to: impl Write,
    ) -> Result<(), Failure> {
        let cancel = AtomicBool::new(false);
        let control = Control {
            threads: self.wishes.threads,
            rate_limit: self.wishes.rate,
            cancel: &cancel,
            progress: &|done| progress.at(done, self.total),
        };
        let lost =
            |offset: u64| warn(&format!("warning: error while reading offset {offset}: zeros are written"));
        let salvage = self.given.has("salvage");
        let done = match (self.chains, layers) {
            ([chain], Some(n)) => to.write(&ChainSource::top(chain, n, cluster), &control),
            ([chain], None) if !salvage && chain.size().is_multiple_of(512) => {
                to.write(&ChainSource::whole(chain, cluster), &control)
            }
            _ => {
                let lost: &(dyn Fn(u64) + Sync) = &lost;
                to.write(&Flat::new(self.chains, cluster, salvage.then_some(lost)), &control)
            }
        };
        done.map_err(Failure::from)
    }

    fn copy_bitmaps(&self, source: &Opened, target: Arc<FileStorage>) -> Result<(), Failure> {
        let cancel = AtomicBool::new(false);
        let control =
            Control { threads: self.wishes.threads, rate_limit: None, cancel: &cancel, progress: &|_| {} };
        let skip = self.given.has("skip-broken-bitmaps");
        let done = bitmap::copy(target, &*source.storage, skip, &control)
            .map_err(|e| Failure::new(format!("Failed to copy bitmaps: {e}")))?;
        for name in done.skipped {
            warn(&format!("warning: Skipping inconsistent bitmap '{name}'"));
        }
        Ok(())
    }

    /// The new image, written whole.
    fn make_new(
        &self,
        wanted: &Wanted,
        layers: Option<usize>,
        progress: &Progress,
    ) -> Result<Arc<FileStorage>, Failure> {
        let about = |f: Failure| {
            let output = self.output.to_string_lossy();
            Failure::new(format!("{output}: error while converting {}: {}", self.format.name(), f.text))
        };
        let plan = wanted.plan().map_err(about)?;
        let cluster = 1u64 << plan.qcow2.cluster_bits;
        let block_device = std::fs::metadata(self.path)
            .is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_block_device(&m.file_type()));
        if !block_device && self.wishes.sparse > 0 && is_usual(&plan, self.wishes.compress) {
            let file = target(self.path).map_err(about)?;
            file.set_len(0)?;
            let new = NewImage {
                size: self.total,
                cluster_bits: plan.qcow2.cluster_bits,
                compression: self.compression(plan.qcow2.compression),
                backing: plan.qcow2.backing.clone(),
            };
            let step = if self.format == Format::Raw { 65536 } else { cluster };
            let anew = Anew { file: self.storage(file.clone()), new, format: self.format };
            return self.with_source(step, layers, progress, anew).map(|()| file);
        }
        let file = plan.make(self.path).map_err(about)?;
        let before = Before {
            zeros: !file.is_block_device() || self.format == Format::Qcow2,
            backed: layers.is_some(),
            sparse: self.wishes.sparse,
        };
        let compression = self.compression(plan.qcow2.compression);
        let sink = Sink::new(self.storage(file.clone()), self.format, compression, &LockedPaths)?;
        self.with_source(cluster, layers, progress, Into { sink, size: self.total, before })?;
        Ok(file)
    }

    /// The image that was there, written over.
    fn write_existing(
        &self,
        layers: Option<usize>,
        progress: &Progress,
    ) -> Result<Arc<FileStorage>, Failure> {
        let of = self.format.name();
        let there = open(self.output, Some(of), Mode::Write)?;
        let kind = there.header()?.map_or(CompressionType::Deflate, |h| h.compression);
        let storage = self.storage(there.storage.clone());
        let sink = Sink::new(storage, self.format, self.compression(kind), &LockedPaths)?;
        if sink.size()? < self.total {
            return Err(Failure::new("output file is smaller than input file"));
        }
        let before = Before {
            zeros: self.given.has("target-is-zero"),
            backed: layers.is_some(),
            sparse: self.wishes.sparse,
        };
        let step = sink.cluster_size().unwrap_or(65536);
        self.with_source(step, layers, progress, Into { sink, size: self.total, before })?;
        Ok(there.storage)
    }
}

/// Whether the image can be written in one pass.
fn is_usual(plan: &Plan, compress: bool) -> bool {
    let q = &plan.qcow2;
    let usual = q.version == 3 && q.refcount_order == 4 && !q.extended_l2 && !q.lazy_refcounts;
    plan.preallocation == Preallocation::Off
        && (plan.format == Format::Raw
            || usual && q.data_file.is_none() && (compress || q.compression == CompressionType::Deflate))
}

struct Anew {
    file: Arc<dyn Storage>,
    new: NewImage,
    format: Format,
}

impl Write for Anew {
    fn write<S: Source>(self, source: &S, control: &Control<'_>) -> knib_qcow::Result<()> {
        match self.format {
            Format::Raw => write_raw(self.file, self.new.size, source, control).map(|_| ()),
            Format::Qcow2 => write_image(self.file, &self.new, source, &NoObserver, control).map(|_| ()),
        }
    }
}

struct Into {
    sink: Sink,
    size: u64,
    before: Before,
}

impl Write for Into {
    fn write<S: Source>(mut self, source: &S, control: &Control<'_>) -> knib_qcow::Result<()> {
        self.sink.fill(source, self.size, self.before, control)
    }
}

/// A number as C reads one: hexadecimal behind `0x`.
fn number(text: &str) -> Option<usize> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => usize::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}
