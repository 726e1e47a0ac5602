//! New disks in a definition, and definitions of new domains.

use std::ops::Range;
use std::path::Path;

use roxmltree::{Document, Node};
use uuid::Uuid;

use super::{child, children, disk_nodes, escape, path_text, set_attribute, set_disk, splice};
use crate::hypervisor::ImageRef;

/// The devices of all disks in a definition, of any kind.
///
/// # Errors
/// The text is no XML.
pub fn targets(text: &str) -> Result<Vec<String>, String> {
    let document = read(text)?;
    let found = disk_nodes(document.root_element()).filter_map(target_of).map(str::to_owned);
    Ok(found.collect())
}

/// The first device of the kind of `like` (`vdb`: `vda`, `vdb`, …) that is not taken.
pub fn free_target(taken: &[String], like: &str) -> String {
    let prefix = ["vd", "sd", "hd", "xvd"].into_iter().find(|p| like.starts_with(p)).unwrap_or("vd");
    let letters = (0..).map(|number: u32| {
        // 25: z, 26: aa.
        let (mut name, mut rest) = (String::new(), number);
        loop {
            name.insert(0, char::from(b'a' + (rest % 26) as u8));
            rest /= 26;
            if rest == 0 {
                break format!("{prefix}{name}");
            }
            rest -= 1;
        }
    });
    let mut free = letters.filter(|name| taken.iter().all(|t| t != name));
    free.next().unwrap_or_else(|| format!("{prefix}a"))
}

/// How like its model a new disk is to be.
#[derive(Debug, Clone, Copy)]
pub struct Likeness {
    /// It keeps the model's address, for guests that know their disks by it.
    pub address: bool,
    /// It keeps the serial number.
    pub serial: bool,
}

/// A `<disk>` that is `target` and lies in `chain`, live image first; all else as the disk of `target` in the definition
/// `like`, if that has one: `was`.
///
/// # Errors
/// `like` is no XML, or a path cannot be named.
pub fn new_disk(
    like: Option<&str>,
    was: &str,
    target: &str,
    chain: &[ImageRef],
    keep: Likeness,
    is_block: &dyn Fn(&Path) -> bool,
) -> Result<String, String> {
    let model = like.map(|text| disk_text(text, was)).transpose()?.flatten();
    let model = model.unwrap_or_else(|| {
        let bus = if was.starts_with("sd") { "scsi" } else { "virtio" };
        format!("<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file=''/><target dev='{}' bus='{bus}'/></disk>", escape(was))
    });
    let text = format!("<domain><devices>{model}</devices></domain>");
    let text = set_disk(&text, was, chain, is_block)?;
    let document = read(&text)?;
    let disk = disk_nodes(document.root_element()).next().ok_or("has no disk")?;
    let mut edits = Vec::new();
    let mut gone = vec!["alias", "boot", "backingStore", "mirror"];
    if !keep.address {
        gone.push("address");
    }
    if !keep.serial {
        gone.extend(["serial", "wwn"]);
    }
    for name in gone {
        edits.extend(children(disk, name).map(|node| (node.range(), String::new())));
    }
    if let Some(node) = child(disk, "target") {
        set_attribute(&text, node, "dev", target, &mut edits);
    }
    // Images of the old chain, whose numbers mean nothing here.
    for name in ["index", "startupPolicy"] {
        let found = child(disk, "source").and_then(|s| s.attribute_node(name));
        edits.extend(found.map(|a| (a.range(), String::new())));
    }
    let text = splice(&text, edits);
    let document = read(&text)?;
    let disk = disk_nodes(document.root_element()).next().ok_or("has no disk")?;
    Ok(text.get(disk.range()).unwrap_or_default().to_owned())
}

/// A definition with one more `<disk>`.
///
/// # Errors
/// The definition has no `<devices>`, or is none.
pub fn add_disk(text: &str, disk: &str) -> Result<String, String> {
    let document = read(text)?;
    let devices = child(document.root_element(), "devices").ok_or("has no <devices>")?;
    let last = disk_nodes(document.root_element()).last();
    let at = match last {
        Some(last) => last.range().end,
        None => devices.first_child().map(|c| c.range().start).ok_or("has empty <devices>")?,
    };
    Ok(splice(text, vec![(at..at, format!("\n    {disk}"))]))
}

/// A definition without a disk; the same where it has none of that name.
///
/// # Errors
/// The text is no XML.
pub fn remove_disk(text: &str, target: &str) -> Result<String, String> {
    let document = read(text)?;
    let found = disk_nodes(document.root_element()).filter(|d| target_of(*d) == Some(target));
    Ok(splice(text, found.map(|d| (d.range(), String::new())).collect()))
}

/// The definition of another domain that is the same but for name, UUID, MAC addresses, identity in the guest's eyes, and
/// the files and sockets that belong to one domain alone: those of its consoles, and its TPM's state.
/// `nvram` is the file of its firmware variables; without one, libvirt makes it from the firmware's template.
///
/// # Errors
/// The text is no definition.
pub fn new_domain(text: &str, name: &str, uuid: Uuid, nvram: Option<&Path>) -> Result<String, String> {
    let document = read(text)?;
    let root = document.root_element();
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    let gone = |node: Node<'_, '_>| (node.range(), String::new());
    let named = child(root, "name").ok_or("has no <name>")?;
    edits.push((named.range(), format!("<name>{}</name><uuid>{uuid}</uuid>", escape(name))));
    edits.extend(child(root, "uuid").map(gone));
    edits.extend(child(root, "genid").map(|node| (node.range(), "<genid/>".into())));
    let devices = || children(root, "devices").flat_map(|d| children(d, "interface"));
    edits.extend(devices().flat_map(|i| children(i, "mac")).map(gone));
    let old = named.text().unwrap_or_default().trim();
    for (node, attribute) in own_files(root) {
        if let Some(path) = node.attribute(attribute) {
            set_attribute(text, node, attribute, &renamed(path, old, name), &mut edits);
        }
    }
    // libvirt refuses one that differs from the domain's own.
    let systems = children(root, "sysinfo").flat_map(|s| children(s, "system"));
    let entries = systems.flat_map(|s| children(s, "entry"));
    edits.extend(entries.filter(|e| e.attribute("name") == Some("uuid")).map(gone));
    if let Some(node) = child(root, "os").and_then(|os| child(os, "nvram")) {
        match nvram {
            None => edits.push(gone(node)),
            Some(path) => {
                let path = escape(path_text(path)?);
                match (child(node, "source"), node.text_storage()) {
                    (Some(source), _) => set_attribute(text, source, "file", &unescaped(&path), &mut edits),
                    (None, Some(_)) => {
                        let inner = node.first_child().map(|c| c.range());
                        edits.extend(inner.map(|range| (range, path)));
                    }
                    (None, None) => edits.push((node.range(), format!("<nvram>{path}</nvram>"))),
                }
            }
        }
    }
    Ok(splice(text, edits))
}

/// What names files that a domain writes to and sockets that it listens on.
fn own_files<'a, 'i>(root: Node<'a, 'i>) -> Vec<(Node<'a, 'i>, &'static str)> {
    let mut found = Vec::new();
    for device in children(root, "devices").flat_map(|d| d.children()) {
        match device.tag_name().name() {
            "serial" | "parallel" | "console" | "channel" => {
                let kind = device.attribute("type");
                // One that it connects to is another program's.
                let is_own = |source: &Node<'_, '_>| match kind {
                    Some("file") => true,
                    Some("unix") => source.attribute("mode") != Some("connect"),
                    _ => false,
                };
                found.extend(children(device, "source").filter(is_own).map(|node| (node, "path")));
                found.extend(children(device, "log").map(|node| (node, "file")));
            }
            "graphics" => {
                found.push((device, "socket"));
                found.extend(children(device, "listen").map(|node| (node, "socket")));
            }
            "tpm" => {
                let emulated =
                    children(device, "backend").filter(|b| b.attribute("type") == Some("emulator"));
                found.extend(emulated.flat_map(|b| children(b, "source")).map(|node| (node, "path")));
            }
            _ => {}
        }
    }
    found
}

/// The path of a domain's file, for another domain: with its name in the place of the old one, or before the file's.
fn renamed(path: &str, old: &str, new: &str) -> String {
    let (folder, file) = match path.rsplit_once('/') {
        Some((folder, file)) => (Some(folder), file),
        None => (None, path),
    };
    let file = match !old.is_empty() && file.contains(old) {
        true => file.replacen(old, new, 1),
        false => format!("{new}-{file}"),
    };
    folder.map_or(file.clone(), |folder| format!("{folder}/{file}"))
}

/// `set_attribute` escapes by itself.
fn unescaped(text: &str) -> String {
    let plain = [("&lt;", "<"), ("&gt;", ">"), ("&apos;", "'"), ("&quot;", "\""), ("&amp;", "&")];
    plain.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn disk_text(text: &str, target: &str) -> Result<Option<String>, String> {
    let document = read(text)?;
    let found = disk_nodes(document.root_element()).find(|d| target_of(*d) == Some(target));
    Ok(found.and_then(|d| text.get(d.range())).map(str::to_owned))
}

fn target_of<'a>(disk: Node<'a, '_>) -> Option<&'a str> {
    child(disk, "target").and_then(|t| t.attribute("dev"))
}

fn read(text: &str) -> Result<Document<'_>, String> {
    Document::parse(text).map_err(|e| format!("is no XML: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{ImageFormat, xml};

    const OLD: &str = "<domain type='kvm'>
  <name>web1</name>
  <uuid>00000000-0000-0000-0000-000000000007</uuid>
  <genid>00000000-0000-0000-0000-000000000008</genid>
  <sysinfo type='smbios'><system><entry name='uuid'>00000000-0000-0000-0000-000000000007</entry><entry name='serial'>s</entry></system></sysinfo>
  <os><nvram template='/fw'>/nvram/web1.fd</nvram></os>
  <devices>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source dev='/dev/vg/a' index='3'/>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <serial>one</serial>
      <boot order='1'/>
      <alias name='virtio-disk0'/>
      <address type='pci' slot='0x03'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
  </devices>
</domain>";

    fn image(path: &str) -> ImageRef {
        ImageRef { path: path.into(), format: ImageFormat::Qcow2 }
    }

    #[test]
    fn a_new_disk_is_like_its_model_but_lies_elsewhere() {
        let chain = [image("/images/new & old.qcow2"), image("/mnt/a.raw")];
        let keep = Likeness { address: false, serial: false };
        let disk = new_disk(Some(OLD), "vda", "vdc", &chain, keep, &|_| false).unwrap();
        for word in ["cache='none'", "type='qcow2'", "file='/images/new &amp; old.qcow2'", "dev='vdc'"] {
            assert!(disk.contains(word), "{word}: {disk}");
        }
        for word in ["serial", "boot", "alias", "address", "backingStore", "index", "/dev/vg", "block"] {
            assert!(!disk.contains(word), "{word}: {disk}");
        }
        let keep = Likeness { address: true, serial: true };
        let disk = new_disk(Some(OLD), "vda", "vda", &chain, keep, &|_| false).unwrap();
        assert!(disk.contains("<serial>one</serial>") && disk.contains("slot='0x03'"), "{disk}");
        let more = add_disk(&remove_disk(OLD, "vda").unwrap(), &disk).unwrap();
        assert_eq!(targets(&more).unwrap(), ["sda", "vda"]);
        assert_eq!(xml::parse(&more).unwrap().disks[1].source.path(), Some(chain[0].path.as_path()));
        let plain = new_disk(None, "root", "vdb", &chain, keep, &|_| false).unwrap();
        assert!(plain.contains("bus='virtio'") && plain.contains("dev='vdb'"), "{plain}");
    }

    #[test]
    fn a_new_domain_shares_no_identity_with_the_old_one() {
        let uuid = Uuid::from_u128(9);
        let new = new_domain(OLD, "web<2", uuid, Some(Path::new("/nvram/web2.fd"))).unwrap();
        let parsed = xml::parse(&new).unwrap();
        assert_eq!((parsed.name.as_str(), parsed.uuid), ("web<2", Some(uuid)));
        assert_eq!(parsed.nvram.as_deref(), Some(Path::new("/nvram/web2.fd")));
        assert!(!new.contains("52:54") && new.contains("<genid/>") && new.contains("name='serial'"), "{new}");
        assert!(!new.contains("0007") && !new.contains("0008"), "{new}");
        assert_eq!(xml::parse(&new_domain(OLD, "x", uuid, None).unwrap()).unwrap().nvram, None);
    }

    #[test]
    fn a_new_domain_writes_to_no_file_of_the_old_one_and_listens_on_none_of_its_sockets() {
        let old = "<domain><name>web1</name><devices>\
            <serial type='file'><source path='/log/web1.log'/><log file='/log/serial' append='on'/></serial>\
            <console type='pty'><source path='/dev/pts/3'/></console>\
            <channel type='unix'><source mode='bind' path='/run/agent'/></channel>\
            <channel type='unix'><source mode='connect' path='/run/server'/></channel>\
            <graphics type='vnc' socket='/run/web1.vnc'><listen type='socket' socket='/run/web1.vnc'/></graphics>\
            <tpm model='tpm-crb'><backend type='emulator'><source type='dir' path='/tpm/web1'/></backend></tpm>\
            <tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>\
            </devices></domain>";
        let new = new_domain(old, "db", Uuid::from_u128(9), None).unwrap();
        let there = [
            "'/log/db.log'",
            "'/log/db-serial'",
            "'/run/db-agent'",
            "<graphics type='vnc' socket='/run/db.vnc'><listen type='socket' socket='/run/db.vnc'/>",
            "'/tpm/db'",
            "'/dev/pts/3'",
            "'/run/server'",
            "'/dev/tpm0'",
        ];
        for text in there {
            assert!(new.contains(text), "{text}: {new}");
        }
        assert!(!new.contains("web1"), "{new}");
    }

    #[test]
    fn the_first_free_device_is_found() {
        let taken: Vec<String> = ["vda", "vdc", "sda"].map(str::to_owned).to_vec();
        assert_eq!(free_target(&taken, "vdz"), "vdb");
        assert_eq!(free_target(&taken, "sda"), "sdb");
        assert_eq!(free_target(&taken, "root"), "vdb");
        let many: Vec<String> = (b'a'..=b'z').map(|c| format!("vd{}", char::from(c))).collect();
        assert_eq!(free_target(&many, "vda"), "vdaa");
    }
}
