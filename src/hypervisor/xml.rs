//! Domain definitions: read what a disk is, change where it lies, keep every other byte.
//!
//! Changes are splices of byte ranges, so comments, unknown elements, namespaces and the order of attributes stay as
//! libvirt or a person wrote them. Format: <https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms>.

pub mod errors;
pub mod new;

use std::ops::Range;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};
use uuid::Uuid;

use super::{ImageFormat, ImageRef};

/// A definition, as far as backups need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainXml {
    /// The domain's name.
    pub name: String,
    /// Its UUID.
    pub uuid: Option<Uuid>,
    /// Its disks, in order.
    pub disks: Vec<DiskXml>,
    /// File of the firmware's variables.
    pub nvram: Option<PathBuf>,
    /// It has an emulated TPM whose state lies where libvirt keeps it, or at the path given.
    pub tpm: Option<TpmXml>,
}

/// An emulated TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmXml {
    /// Path of its state, where the definition gives one.
    pub source: Option<PathBuf>,
}

/// One `<disk>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskXml {
    /// Device in the guest.
    pub target: String,
    /// Serial number.
    pub serial: Option<String>,
    /// Where its data lies.
    pub source: DiskSource,
    /// Format of the live image as the definition says it.
    pub driver_type: Option<String>,
    /// What stands below it as the definition says it, nearest first.
    pub backing: Vec<BackingXml>,
    /// The definition says that the last of `backing` (or the disk itself) stands on nothing.
    pub terminated: bool,
    /// libvirt's number of the live image (`vda[4]`).
    pub index: Option<u32>,
    /// A job that mirrors the disk.
    pub mirror: Option<MirrorXml>,
    /// Why it is not taken.
    pub fate: Fate,
}

/// One `<backingStore>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingXml {
    /// Where it lies.
    pub source: DiskSource,
    /// Its format.
    pub format: Option<String>,
    /// libvirt's number of it.
    pub index: Option<u32>,
}

/// One `<mirror>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorXml {
    /// `active-commit` or `copy`.
    pub job: String,
    /// It has caught up.
    pub ready: bool,
    /// What it writes to.
    pub path: Option<PathBuf>,
}

/// Where data lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A file.
    File(PathBuf),
    /// A block device.
    Block(PathBuf),
    /// A volume of a storage pool.
    Volume {
        /// The pool's name.
        pool: String,
        /// The volume's name.
        volume: String,
    },
    /// No medium.
    Empty,
    /// Something else, by libvirt's word for it.
    Other(String),
}

/// Whether a disk is part of backups; the reason follows "because it".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is.
    Taken,
    /// It never is, and need not be.
    Skipped(String),
    /// It should be but cannot.
    Refused(String),
}

impl DiskSource {
    /// The path, of a file or block device.
    pub fn path(&self) -> Option<&Path> {
        match self {
            DiskSource::File(path) | DiskSource::Block(path) => Some(path),
            _ => None,
        }
    }
}

/// Reads a `<domain>`.
///
/// # Errors
/// What is wrong with it, in words that follow "the definition".
pub fn parse(text: &str) -> Result<DomainXml, String> {
    let document = Document::parse(text).map_err(|e| format!("is no XML: {e}"))?;
    let root = document.root_element();
    if !is(root, "domain") {
        return Err(format!("is a <{}>, not a <domain>", root.tag_name().name()));
    }
    domain(root)
}

/// All disks that the definition of a snapshot names: its own `<disks>` and the `<domain>`s that it keeps.
///
/// # Errors
/// As [`parse`].
pub fn parse_snapshot(text: &str) -> Result<Vec<DiskXml>, String> {
    let document = Document::parse(text).map_err(|e| format!("is no XML: {e}"))?;
    let root = document.root_element();
    let mut disks = Vec::new();
    for kept in children(root, "domain").chain(children(root, "inactiveDomain")) {
        disks.extend(domain(kept)?.disks);
    }
    for node in children(root, "disks").flat_map(|d| children(d, "disk")) {
        // Here the disk is known by `name` and its overlay is the source.
        let mut disk = disk(node);
        disk.target = node.attribute("name").unwrap_or_default().to_owned();
        disks.push(disk);
    }
    Ok(disks)
}

fn domain(root: Node<'_, '_>) -> Result<DomainXml, String> {
    let name = text_of(root, "name").ok_or("has no <name>")?;
    let uuid = match text_of(root, "uuid") {
        Some(text) => Some(Uuid::parse_str(&text).map_err(|_| format!("has the malformed uuid \"{text}\""))?),
        None => None,
    };
    let mut disks = Vec::new();
    for node in disk_nodes(root) {
        let disk = disk(node);
        if disk.target.is_empty() {
            return Err("has a <disk> without a <target dev=…>".into());
        }
        if disks.iter().any(|d: &DiskXml| d.target == disk.target) {
            return Err(format!("has the disk {} twice", disk.target));
        }
        disks.push(disk);
    }
    let nvram = child(root, "os").and_then(|os| child(os, "nvram")).and_then(|node| {
        let inner = child(node, "source").and_then(|s| s.attribute("file").map(str::to_owned));
        let path = inner.or_else(|| node.text().map(|t| t.trim().to_owned()))?;
        (!path.is_empty()).then(|| PathBuf::from(path))
    });
    let tpm = children(root, "devices").flat_map(|d| children(d, "tpm")).find_map(|tpm| {
        let backend = child(tpm, "backend")?;
        (backend.attribute("type") == Some("emulator")).then(|| TpmXml {
            source: child(backend, "source").and_then(|s| s.attribute("path")).map(PathBuf::from),
        })
    });
    Ok(DomainXml { name, uuid, disks, nvram, tpm })
}

fn disk(node: Node<'_, '_>) -> DiskXml {
    let source = source(node);
    let driver_type = child(node, "driver").and_then(|d| d.attribute("type")).map(str::to_owned);
    let (backing, terminated) = backing(node);
    let target = child(node, "target").and_then(|t| t.attribute("dev")).unwrap_or_default().to_owned();
    let mirror = child(node, "mirror").map(|m| MirrorXml {
        job: m.attribute("job").unwrap_or("copy").to_owned(),
        ready: m.attribute("ready") == Some("yes"),
        path: source_of(m, m.attribute("type")).path().map(Path::to_owned),
    });
    let fate = fate(node, &source, driver_type.as_deref(), &backing);
    let serial = text_of(node, "serial");
    let index = child(node, "source").and_then(index);
    DiskXml { target, serial, source, driver_type, backing, terminated, index, mirror, fate }
}

/// Skipping comes before refusing: a network cdrom is a cdrom.
fn fate(node: Node<'_, '_>, source: &DiskSource, driver: Option<&str>, backing: &[BackingXml]) -> Fate {
    let skipped = |why: &str| Fate::Skipped(why.to_owned());
    match node.attribute("device").unwrap_or("disk") {
        "disk" => {}
        "lun" => return skipped("is a LUN that is passed through"),
        other => return Fate::Skipped(format!("is a {other}")),
    }
    for (element, why) in
        [("readonly", "is read-only"), ("shareable", "is shareable"), ("transient", "is transient")]
    {
        if child(node, element).is_some() {
            return skipped(why);
        }
    }
    let inner = child(node, "source");
    if child(node, "encryption").is_some() || inner.is_some_and(|s| child(s, "encryption").is_some()) {
        return Fate::Refused("is encrypted by QEMU".into());
    }
    if inner.is_some_and(|s| child(s, "slices").is_some()) {
        return Fate::Refused("is a slice of a file".into());
    }
    match source {
        DiskSource::Empty => return skipped("has no medium"),
        DiskSource::Volume { .. } => return Fate::Refused(other_source("volume")),
        DiskSource::Other(kind) => return Fate::Refused(other_source(kind)),
        DiskSource::File(_) | DiskSource::Block(_) => {}
    }
    if let Some(layer) = backing.iter().find_map(|b| match &b.source {
        DiskSource::Other(kind) => Some(kind.as_str()),
        DiskSource::Volume { .. } => Some("volume"),
        _ => None,
    }) {
        return Fate::Refused(format!("stands on an image that {}", other_source(layer)));
    }
    for format in driver.into_iter().chain(backing.iter().filter_map(|b| b.format.as_deref())) {
        if image_format(format).is_none() {
            return Fate::Refused(format!("has the format {format}; only raw and qcow2 can be backed up"));
        }
    }
    Fate::Taken
}

fn other_source(kind: &str) -> String {
    match kind {
        "network" => "is a network disk".into(),
        "volume" => "is given as a volume of a storage pool; give it by its path in the definition".into(),
        other => format!("is of the kind \"{other}\""),
    }
}

/// libvirt's name of a format.
pub fn image_format(name: &str) -> Option<ImageFormat> {
    match name {
        "raw" => Some(ImageFormat::Raw),
        "qcow2" => Some(ImageFormat::Qcow2),
        _ => None,
    }
}

/// The layers below a disk, and whether the last one says that nothing stands below it.
fn backing(disk: Node<'_, '_>) -> (Vec<BackingXml>, bool) {
    let mut layers = Vec::new();
    let mut above = disk;
    while let Some(node) = child(above, "backingStore") {
        if child(node, "source").is_none() {
            return (layers, true);
        }
        let format = child(node, "format").and_then(|f| f.attribute("type")).map(str::to_owned);
        layers.push(BackingXml { source: source(node), format, index: index(node) });
        above = node;
    }
    (layers, false)
}

fn source(node: Node<'_, '_>) -> DiskSource {
    source_of(node, node.attribute("type"))
}

fn source_of(node: Node<'_, '_>, kind: Option<&str>) -> DiskSource {
    let inner = child(node, "source");
    let attribute = |name| inner.and_then(|s| s.attribute(name)).filter(|v| !v.is_empty()).map(PathBuf::from);
    match kind.unwrap_or("file") {
        "file" => attribute("file").map_or(DiskSource::Empty, DiskSource::File),
        "block" => attribute("dev").map_or(DiskSource::Empty, DiskSource::Block),
        "volume" => {
            let name = |key| inner.and_then(|s| s.attribute(key)).unwrap_or_default().to_owned();
            DiskSource::Volume { pool: name("pool"), volume: name("volume") }
        }
        other => DiskSource::Other(other.to_owned()),
    }
}

fn index(node: Node<'_, '_>) -> Option<u32> {
    node.attribute("index")?.parse().ok()
}

/// Makes `target` lie in `chain` (live image first): its source, its format, and its backing stores where the
/// definition lists some. Where it lists none, libvirt reads them from the headers, and it still lists none after.
/// `is_block` tells which paths are block devices.
///
/// # Errors
/// The definition has no such disk, or is no definition.
pub fn set_disk(
    text: &str,
    target: &str,
    chain: &[ImageRef],
    is_block: &dyn Fn(&Path) -> bool,
) -> Result<String, String> {
    let document = Document::parse(text).map_err(|e| format!("is no XML: {e}"))?;
    let disk = disk_nodes(document.root_element())
        .find(|d| child(*d, "target").and_then(|t| t.attribute("dev")) == Some(target))
        .ok_or_else(|| format!("has no disk {target}"))?;
    let top = chain.first().ok_or("cannot name an empty chain")?;
    let (kind, name) = kind_and_attribute(is_block(&top.path));
    let mut edits = Vec::new();

    set_attribute(text, disk, "type", kind, &mut edits);
    let path = path_text(&top.path)?;
    match child(disk, "source") {
        Some(source) => {
            // The other kind's attribute would be left over.
            let other = source.attribute_node(if name == "file" { "dev" } else { "file" });
            match other {
                Some(other) => edits.push((other.range(), format!("{name}='{}'", escape(path)))),
                None => set_attribute(text, source, name, path, &mut edits),
            }
        }
        None => edits.push(insert_child(text, disk, &format!("<source {name}='{}'/>", escape(path)))?),
    }
    match child(disk, "driver") {
        Some(driver) => set_attribute(text, driver, "type", top.format_name(), &mut edits),
        None => edits.push(insert_child(
            text,
            disk,
            &format!("<driver name='qemu' type='{}'/>", top.format_name()),
        )?),
    }
    if let Some(old) = child(disk, "backingStore")
        && child(old, "source").is_some()
    {
        let mut new = String::from("<backingStore/>");
        for layer in chain.iter().skip(1).rev() {
            let (kind, name) = kind_and_attribute(is_block(&layer.path));
            new = format!(
                "<backingStore type='{kind}'><format type='{}'/><source {name}='{}'/>{new}</backingStore>",
                layer.format_name(),
                escape(path_text(&layer.path)?)
            );
        }
        edits.push((old.range(), new));
    } else if let Some(old) = child(disk, "backingStore")
        && chain.len() > 1
    {
        // It said that the disk stands on nothing, which is no longer so: let libvirt read the headers.
        edits.push((old.range(), String::new()));
    }
    Ok(splice(text, edits))
}

impl ImageRef {
    /// The name that QEMU and libvirt have for its format.
    pub fn format_name(&self) -> &'static str {
        match self.format {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        }
    }
}

/// The XML that takes a snapshot: `overlays` are made, `others` take no part.
///
/// # Errors
/// A path that is no UTF-8.
pub fn snapshot(overlays: &[super::NewOverlay], others: &[&str]) -> Result<String, String> {
    let mut text = String::from("<domainsnapshot><disks>");
    for new in overlays {
        text.push_str(&format!(
            "<disk name='{}' snapshot='external' type='file'><driver type='qcow2'/><source file='{}'/></disk>",
            escape(&new.target),
            escape(path_text(&new.path)?)
        ));
    }
    for other in others {
        text.push_str(&format!("<disk name='{}' snapshot='no'/>", escape(other)));
    }
    text.push_str("</disks></domainsnapshot>");
    Ok(text)
}

fn kind_and_attribute(block: bool) -> (&'static str, &'static str) {
    if block { ("block", "dev") } else { ("file", "file") }
}

fn path_text(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("cannot name {}: it is no UTF-8", path.display()))
}

fn set_attribute(
    text: &str,
    node: Node<'_, '_>,
    name: &str,
    value: &str,
    edits: &mut Vec<(Range<usize>, String)>,
) {
    match node.attribute_node(name) {
        Some(old) if old.value() == value => {}
        Some(old) => edits.push((old.range(), format!("{name}='{}'", escape(value)))),
        None => {
            let at = name_end(text, node);
            edits.push((at..at, format!(" {name}='{}'", escape(value))));
        }
    }
}

/// Where the name in a start tag ends.
fn name_end(text: &str, node: Node<'_, '_>) -> usize {
    let start = node.range().start;
    let rest = text.get(start..).unwrap_or_default();
    start + rest.find(|c: char| c.is_whitespace() || c == '>' || c == '/').unwrap_or(rest.len())
}

/// A new first child of a node that has children.
fn insert_child(text: &str, node: Node<'_, '_>, new: &str) -> Result<(Range<usize>, String), String> {
    let first = node.first_child().ok_or("has an empty <disk>")?;
    let at = first.range().start;
    // The same line break and indent as before the first child.
    let space = first.text().filter(|t| first.is_text() && t.trim().is_empty()).unwrap_or_default();
    debug_assert!(text.is_char_boundary(at));
    Ok((at..at, format!("{space}{new}")))
}

fn splice(text: &str, mut edits: Vec<(Range<usize>, String)>) -> String {
    // From the end, so that earlier ranges stay right; of two inserts at one place the later one goes in last.
    edits.sort_by_key(|(range, _)| range.start);
    let mut out = text.to_owned();
    for (range, new) in edits.into_iter().rev() {
        out.replace_range(range, &new);
    }
    out
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\r' | '\t' => out.push_str(&format!("&#{};", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

fn disk_nodes<'a, 'input>(root: Node<'a, 'input>) -> impl Iterator<Item = Node<'a, 'input>> {
    children(root, "devices").flat_map(|d| children(d, "disk"))
}

fn children<'a, 'input>(
    node: Node<'a, 'input>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |c| is(*c, name))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    children(node, name).next()
}

/// An element of that name in no namespace: metadata of other programs may have a `<x:disk>`.
fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().namespace().is_none() && node.tag_name().name() == name
}

fn text_of(node: Node<'_, '_>, name: &'static str) -> Option<String> {
    let text = child(node, name)?.text()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
#[path = "xml_tests.rs"]
mod tests;
